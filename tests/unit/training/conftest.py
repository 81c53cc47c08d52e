from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from regtune.spec import TaskSpec, Training, Validation
from regtune.task import Data, Storage
from worker.tasks.models import mlp
from worker.training import engine as engine_module
from worker.training.engine import Engine
from worker.training.lanes import LaneEpoch, LaneTrial
from worker.training.residence import OnDevice

CLASSES, FEATURES = 3, 6

Curves = dict[int, list[LaneEpoch]]


def overlapping_blobs(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Classes that overlap, so that a network that trains for long enough overfits."""
    random = np.random.default_rng(seed)
    y = np.arange(rows) % CLASSES
    x = random.normal(size=(rows, FEATURES)) + 0.7 * np.eye(FEATURES)[y]
    return x.astype(np.float32), y.astype(np.int64)


def blobs(storage: Storage) -> Data:
    return Data(*overlapping_blobs(76, seed=1), *overlapping_blobs(40, seed=2), classes=CLASSES)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from threads, and processes that share the cores lose much."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make_engine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Engine]:
    """Build engines on a small data set, with any model and any training."""

    def make(
        *,
        model: Callable[..., nn.Module] = mlp,
        settings: dict[str, Any] | None = None,
        dtype: torch.dtype = torch.float64,
        max_lanes: int = 8,
        seed: int = 3,
        threads: int = 1,
        validation: Validation | None = None,
        knobs: frozenset[str] = engine_module.KNOBS,
        data_on_device: OnDevice = "auto",
        device: str = "cpu",
        **training: Any,
    ) -> Engine:
        monkeypatch.setattr(engine_module, "find_dataset", lambda name: blobs)
        monkeypatch.setattr(engine_module, "find_model", lambda name: model)
        defaults = {"batch_size": 16, "max_epochs": 12, "learning_rate": 0.01}
        return Engine(
            task=TaskSpec(
                dataset="blobs",
                model="own",
                **({"hidden": [16]} if settings is None else settings),
            ),
            training=Training(**(defaults | {"seed": seed} | training)),
            validation=validation or Validation(),
            storage=Storage(Path("unused")),
            device=torch.device(device),
            max_lanes=max_lanes,
            dtype=dtype,
            threads=threads,
            knobs=knobs,
            compiles=False,
            data_on_device=data_on_device,
        )

    return make


def trial(key: int = 0, **strengths: Any) -> LaneTrial:
    defaults = {
        "weight_decay": 0.0,
        "dropout": 0.0,
        "l1_lambda": 0.0,
        "patience": 1000,
        "learning_rate": 0.01,
    }
    return LaneTrial(key=key, **(defaults | strengths))


def train(engine: Engine, epochs: int) -> Curves:
    """Train for some epochs, letting ended lanes leave; return each trial's epochs."""
    curves: Curves = {}
    for _ in range(epochs):
        for epoch in engine.train_epoch():
            curves.setdefault(epoch.key, []).append(epoch)
        engine.leave([key for key in engine.lanes if curves[key][-1].ended])
    return curves


def train_until_it_ends(engine: Engine) -> list[LaneEpoch]:
    curve = engine.train_epoch()
    while curve[-1].ended is None:
        curve += engine.train_epoch()
    return curve


def losses(curve: list[LaneEpoch]) -> torch.Tensor:
    return torch.tensor([[e.train_loss, e.validation_loss] for e in curve], dtype=torch.float64)
