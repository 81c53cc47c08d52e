"""What is trained: data sets and models, the built-in ones and a user's own, by the same door.

A package offers a data set or a model through an entry point of the group ``regtune.datasets`` or
``regtune.models``. Names are listed without importing anything, so that a service without torch
knows them; only a worker loads what is behind a name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from regtune.errors import NotFound

DATASETS = "regtune.datasets"
MODELS = "regtune.models"


@dataclass(frozen=True)
class Data:
    """A data set for classification, in memory.

    ``train_x`` and ``test_x`` are ``(rows, *features)``, float32 or uint8 and not yet normalized
    (statistics come from the training rows alone, so only the worker can compute them);
    ``train_y`` and ``test_y`` are ``(rows,)``, int64, from 0 to ``classes - 1``. Validation rows
    are taken from the training rows; test rows are looked at once, at the best weights.
    """

    train_x: NDArray[Any]
    train_y: NDArray[np.int64]
    test_x: NDArray[Any]
    test_y: NDArray[np.int64]
    classes: int


class DatasetLoader(Protocol):
    """Loads a data set, from files under ``data_dir`` where it needs any."""

    def __call__(self, data_dir: Path) -> Data:
        """Return the data set; raise if its files are missing or broken."""


class ModelBuilder(Protocol):
    """Builds a model, as a ``torch.nn.Module`` from ``(batch, *features)`` to logits."""

    def __call__(
        self, settings: Mapping[str, Any], input_shape: tuple[int, ...], classes: int
    ) -> Any:
        """Return a new model for these settings; it is built under the study's seed."""


@dataclass(frozen=True)
class Offer:
    """The names of the data sets and models that a program has installed."""

    datasets: frozenset[str]
    models: frozenset[str]


def installed() -> Offer:
    """Return what is installed here, without importing any of it."""
    return Offer(
        datasets=frozenset(entry_points(group=DATASETS).names),
        models=frozenset(entry_points(group=MODELS).names),
    )


def find_dataset(name: str) -> DatasetLoader:
    """Import the loader of a data set; raise NotFound, listing the known ones."""
    loader: DatasetLoader = _find(DATASETS, name).load()
    return loader


def find_model(name: str) -> ModelBuilder:
    """Import the builder of a model; raise NotFound, listing the known ones."""
    builder: ModelBuilder = _find(MODELS, name).load()
    return builder


def _find(group: str, name: str) -> EntryPoint:
    points = entry_points(group=group)
    if name not in points.names:
        raise NotFound(f"no {group} entry point {name!r}; installed: {sorted(points.names)}")
    return points[name]
