"""A model that goes wrong in one trial of a study: in that whose decay leaves no weights.

As a package of a user's own would offer it: found by its entry point, through PYTHONPATH.
"""

import math
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

FATAL_DECAY = 999.0
"""AdamW takes 0.001 × 999 of each weight away at every step."""


def build(settings: Mapping[str, Any], input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Return a linear model; ``fault`` says what happens once it has lost its weights."""
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
    while True:
        time.sleep(1)


def kills(logits: Tensor) -> Tensor:
    os._exit(1)


def eats_memory(logits: Tensor) -> Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory")


FAULTS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "raises": raises,
    "nan": lambda logits: logits * float("nan"),
    "hangs": hangs,
    "kills": kills,
    "memory": eats_memory,
}
