"""From a data set to tensors: which rows train and which validate, and how inputs are standardized.

A trial may be trained several times, as *members* with other rows and other noise: on each fold of
a cross-validation, and again with another seed. A member's rows are its split.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedKFold, train_test_split
from torch import Tensor

from regtune.spec import Validation
from regtune.task import Data
from worker.training.noise import member_seed


@dataclass(frozen=True)
class Rows:
    """Inputs ``(N, *features)`` and labels ``(N,)``, int64, on the training device."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return self.y.shape[0]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one row's input."""
        return tuple(self.x.shape[1:])


@dataclass(frozen=True)
class Split:
    """Which rows one member of a trial trains on and which it validates on, by number.

    Inputs are stored as the first split standardizes them; ``scale`` and ``shift``, broadcast over
    rows, turn them into what this one would have made of them.
    """

    training: NDArray[np.int64]
    validation: NDArray[np.int64]
    scale: Tensor
    shift: Tensor


@dataclass(frozen=True)
class Prepared:
    """The rows of one study, its splits, and the rows that are looked at once at the end."""

    rows: Rows
    splits: tuple[Split, ...]
    test: Rows
    classes: int


def prepare(
    data: Data, validation: Validation, seed: int, device: torch.device, dtype: torch.dtype
) -> Prepared:
    """Split the training rows and standardize the inputs.

    Splits are stratified by class and a pure function of ``seed``, so every trial of a study sees
    the same rows. Mean and standard deviation come from the rows trained on alone: one pair for
    each feature of a table ``(N, features)``, one for each channel of images
    ``(N, channels, height, width)``. A feature that never varies is left at zero.
    """
    chosen = list(_split(data.train_y, validation, seed))
    statistics = [_statistics(data.train_x[training]) for training, _ in chosen]
    mean, deviation = statistics[0]

    def rows(x: NDArray[np.generic], y: NDArray[np.int64]) -> Rows:
        standardized = torch.from_numpy(x.copy()).to(dtype).sub_(mean).div_(deviation)
        return Rows(standardized.to(device), torch.from_numpy(y).to(device))

    return Prepared(
        rows=rows(data.train_x, data.train_y),
        splits=tuple(
            Split(
                training,
                validated,
                scale=(deviation / own_deviation)[0].to(device, dtype),
                shift=((mean - own_mean) / own_deviation)[0].to(device, dtype),
            )
            for (training, validated), (own_mean, own_deviation) in zip(
                chosen, statistics, strict=True
            )
        ),
        test=rows(data.test_x, data.test_y),
        classes=data.classes,
    )


def _split(
    labels: NDArray[np.int64], validation: Validation, seed: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield, for each member, the rows to train on and those to validate on, both ascending."""
    every_row = np.arange(len(labels))
    for repeat in range(validation.repeats):
        repeat_seed = member_seed(seed, repeat * (validation.folds or 1))
        if validation.folds:
            folds = StratifiedKFold(validation.folds, shuffle=True, random_state=repeat_seed)
            yield from folds.split(every_row, labels)
        else:
            training, validated = train_test_split(
                every_row,
                test_size=validation.fraction,
                stratify=labels,
                random_state=repeat_seed,
            )
            yield np.sort(training), np.sort(validated)


def _statistics(x: NDArray[np.generic]) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation along the feature axis, shaped to broadcast over rows."""
    others = tuple(axis for axis in range(x.ndim) if axis != 1)
    mean = x.mean(axis=others, dtype=np.float64, keepdims=True)
    deviation = x.std(axis=others, dtype=np.float64, keepdims=True)
    return torch.from_numpy(mean), torch.from_numpy(np.where(deviation > 0, deviation, 1.0))
