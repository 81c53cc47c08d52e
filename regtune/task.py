"""What is trained: data sets and models, the built-in ones and a user's own, by the same door.

A package offers data sets and models through entry points of two groups, ``regtune.datasets`` and
``regtune.models``. Names are listed without importing anything, so that a service without torch
knows them; only a worker loads what is behind a name.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from regtune.errors import NotFound

DATASETS = "regtune.datasets"
MODELS = "regtune.models"

RowFunction = Callable[[Any, Any], Any]
"""A function of a model's outputs ``(B, outputs)`` and targets ``(B,)``, to one number a row.

Both are tensors of torch. It must not branch on their values: it runs under ``vmap``.
"""


@dataclass(frozen=True)
class Columns:
    """Rows of a table, of which some columns are categories.

    ``numbers`` is ``(rows, columns)``, float32, NaN where a value is missing. ``categories`` is
    ``(rows, columns)``, int32: numbers of values, counted from 0 in each column, -1 where missing.
    """

    numbers: NDArray[np.float32]
    categories: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, rows: NDArray[np.int64] | slice) -> "Columns":
        return Columns(self.numbers[rows], self.categories[rows])


Inputs = NDArray[Any] | Columns


@dataclass(frozen=True)
class Data:
    """A data set in memory, for classification or for regression.

    ``train_x`` and ``test_x`` are ``(rows, *features)``, float32 or uint8, or the columns of a
    table; neither normalized nor imputed nor encoded, since that depends on which rows are trained
    on, so that only the worker can. With ``classes``, ``train_y`` and ``test_y`` are ``(rows,)``,
    int64, from 0 to ``classes - 1``; with ``classes=None`` they are numbers to predict, float32.
    Validation rows are taken from the training rows; test rows are looked at once, at the best
    weights.

    ``loss`` and ``score`` take the place of the built-in ones; both are means over rows.
    """

    train_x: Inputs
    train_y: NDArray[Any]
    test_x: Inputs
    test_y: NDArray[Any]
    classes: int | None
    loss: RowFunction | None = None
    score: RowFunction | None = None

    @property
    def outputs(self) -> int:
        """How many numbers a model has to return for a row: one for each class, or one."""
        return self.classes or 1

    def content_hash(self) -> str:
        """Return a hash of all rows: the same for the same rows in the same order, everywhere."""
        digest = hashlib.sha256(repr(self.classes).encode())
        for part in (self.train_x, self.train_y, self.test_x, self.test_y):
            arrays = (part.numbers, part.categories) if isinstance(part, Columns) else (part,)
            for array in arrays:
                digest.update(f"{array.dtype.str}{array.shape}".encode())
                digest.update(np.ascontiguousarray(array).data)
        return f"sha256:{digest.hexdigest()}"


@dataclass(frozen=True)
class Storage:
    """Where a worker lets data sets read from, by its own configuration.

    ``data_dir`` is where data sets are kept and downloaded. ``roots`` are the only folders and
    addresses under which a study may name a file.
    """

    data_dir: Path
    roots: tuple[str, ...] = ()


class DatasetLoader(Protocol):
    """Loads a data set, from ``storage`` where it needs files, by the study's settings of it."""

    def __call__(self, storage: Storage, **settings: Any) -> Data:
        """Return the data set; raise InvalidData if its files are missing or broken."""


class ModelBuilder(Protocol):
    """Builds a model, as a ``torch.nn.Module`` from ``(batch, *features)`` to ``outputs``."""

    def __call__(
        self, settings: Mapping[str, Any], input_shape: tuple[int, ...], outputs: int
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
