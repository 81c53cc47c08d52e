"""A model that goes wrong in one trial of a study: in that whose decay leaves no weights.

As a package of a user's own would offer it: found by its entry point, through PYTHONPATH.
"""

import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FATAL_DECAY = 999.0
"""AdamW takes 0.001 × 999 of each weight away at every step."""

SLOW_FROM = 200
_calls = 0


def build(settings: Mapping[str, Any], input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Return a linear model; ``fault`` says what happens once it has lost its weights, or here."""
    if settings["fault"] == "kills-its-builder":
        os._exit(1)
    while settings["fault"] == "never-ends":
        time.sleep(1)
    return Faulty(math.prod(input_shape), classes, settings["fault"])


class Faulty(nn.Module):
    def __init__(self, features: int, classes: int, fault: str) -> None:
        super().__init__()
        self.linear = nn.Linear(features, classes)
        self.fault = FAULTS[fault]

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(x.flatten(1))
        # Asking for a number keeps it from being mapped over lanes: each lane is by itself here.
        if self.linear.weight.detach().norm().item() < 0.05:
            return self.fault(logits)
        return logits


def raises(logits: Tensor) -> Tensor:
    raise ZeroDivisionError("no weights are left")


def hangs(logits: Tensor) -> Tensor:
    """Never return; leave a mark that it has begun."""
    (Path(os.environ["REGTUNE_DATA_DIR"]) / "hung").touch()
    while True:
        time.sleep(1)


def kills(logits: Tensor) -> Tensor:
    os._exit(1)


def eats_memory(logits: Tensor) -> Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory")


def slows_down(logits: Tensor) -> Tensor:
    """Take a second each time, once this process has called it often; leave a mark that it does.

    A process that finds the mark of another is spared.
    """
    global _calls
    _calls += 1
    mark = Path(os.environ["REGTUNE_DATA_DIR"]) / "slow"
    if _calls == SLOW_FROM and not mark.exists():
        mark.write_text(str(os.getpid()))
    if _calls >= SLOW_FROM and mark.read_text() == str(os.getpid()):
        time.sleep(1)
    return logits


FAULTS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "raises": raises,
    "nan": lambda logits: logits * float("nan"),
    "hangs": hangs,
    "kills": kills,
    "memory": eats_memory,
    "slow": slows_down,
}
