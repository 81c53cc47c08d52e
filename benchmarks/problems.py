"""The networks and rows that a contest is about, and engines over them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks.peers import BATCH_ROWS, CLASSES, LEARNING_RATE, Held, Network, Strengths, cnn, mlp
from regtune.spec import TaskSpec, Training, Validation
from regtune.spec.training import Precision
from regtune.task import Data, Storage
from worker.tasks.preparation import prepare
from worker.training import engine as engine_module
from worker.training.engine import Engine
from worker.training.lanes import LaneTrial
from worker.training.residence import OnDevice

STRENGTHS = Strengths(weight_decay=0.05, dropout=0.2, l1_lambda=1e-3)
VALIDATION = Validation(fraction=0.2)
SEED = 0
FOREVER = 10_000
"""Epochs and patience that no lane reaches."""


@dataclass(frozen=True)
class Problem:
    """A network, and what of it a quick run looks at."""

    name: str
    network: Network
    quick_rows: int
    quick_lanes: tuple[int, ...]

    def build(self, settings: object, input_shape: object, classes: object) -> nn.Module:
        """Build the network as the engine asks for it; its dropout rate is each lane's own."""
        return self.network(0.5)


PROBLEMS = {
    "mlp": Problem("mlp", mlp, quick_rows=9_600, quick_lanes=(16,)),
    "cnn": Problem("cnn", cnn, quick_rows=1_600, quick_lanes=(4,)),
}


@dataclass(frozen=True)
class Setting:
    """What holds for all contenders of one problem."""

    problem: Problem
    data: Data
    data_dir: Path
    device: torch.device
    threads: int
    rounds: int
    lanes: Sequence[int]
    quick: bool
    peak: float

    @property
    def rows(self) -> int:
        """Rows to train and to validate on."""
        return len(self.data.train_y)

    @property
    def validation_rows(self) -> int:
        """Rows to validate on after each epoch."""
        return self.rows // 5

    @property
    def steps(self) -> int:
        """Steps of an epoch; all batches are full."""
        return (self.rows - self.validation_rows) // BATCH_ROWS


def build_engine(
    setting: Setting,
    lanes: int,
    *,
    compiles: bool,
    precision: Precision = "float32",
    data_on_device: OnDevice = "auto",
) -> Engine:
    """Build an engine over the benchmark's own network and rows."""
    with (
        patch.object(engine_module, "find_dataset", lambda name: lambda storage: setting.data),
        patch.object(engine_module, "find_model", lambda name: setting.problem.build),
    ):
        return Engine(
            task=TaskSpec(dataset="mnist", model=f"benchmark-{setting.problem.name}"),
            training=Training(
                batch_size=BATCH_ROWS,
                learning_rate=LEARNING_RATE,
                max_epochs=FOREVER,
                precision=precision,
                seed=SEED,
            ),
            validation=VALIDATION,
            storage=Storage(setting.data_dir),
            device=setting.device,
            max_lanes=lanes,
            knobs={"weight_decay", "dropout", "l1_lambda"},
            threads=setting.threads,
            compiles=compiles,
            data_on_device=data_on_device,
        )


def some_trials(lanes: int) -> list[LaneTrial]:
    """Return trials that never end."""
    return [
        LaneTrial(
            key=key,
            weight_decay=STRENGTHS.weight_decay,
            dropout=STRENGTHS.dropout,
            l1_lambda=STRENGTHS.l1_lambda,
            patience=FOREVER,
            learning_rate=LEARNING_RATE,
        )
        for key in range(lanes)
    ]


def held_rows(setting: Setting) -> Held:
    """Return the peers' rows: the same as the lanes', standardized alike."""
    return Held.of(prepare(setting.data, VALIDATION, SEED, torch.float32).on(setting.device))


def sample_batch() -> tuple[Tensor, Tensor]:
    """Return a batch of the shapes of MNIST, on the CPU."""
    return torch.randn(BATCH_ROWS, 1, 28, 28), torch.randint(CLASSES, (BATCH_ROWS,))
