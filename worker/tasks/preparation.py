"""From a data set to tensors: which rows validate, and how inputs are standardized."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.model_selection import train_test_split
from torch import Tensor

from regtune.task import Data


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
class Prepared:
    """The rows of one study: trained on, validated on, and looked at once at the end."""

    training: Rows
    validation: Rows
    test: Rows
    classes: int


def prepare(
    data: Data, validation_fraction: float, seed: int, device: torch.device, dtype: torch.dtype
) -> Prepared:
    """Split off the validation rows and standardize the inputs.

    The split is stratified by class and a pure function of ``seed``, so every trial of a study
    sees the same rows. Mean and standard deviation come from the rows trained on alone: one pair
    for each feature of a table ``(N, features)``, one for each channel of images
    ``(N, channels, height, width)``. A feature that never varies is left at zero.
    """
    training, validation = _split(data.train_y, validation_fraction, seed)
    mean, deviation = _statistics(data.train_x[training])

    def rows(x: NDArray[np.generic], y: NDArray[np.int64]) -> Rows:
        standardized = torch.from_numpy(x).to(dtype).sub_(mean).div_(deviation)
        return Rows(standardized.to(device), torch.from_numpy(y).to(device))

    return Prepared(
        training=rows(data.train_x[training], data.train_y[training]),
        validation=rows(data.train_x[validation], data.train_y[validation]),
        test=rows(data.test_x.copy(), data.test_y),
        classes=data.classes,
    )


def _split(
    labels: NDArray[np.int64], validation_fraction: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the numbers of the rows to train on and of those to validate on, both ascending."""
    training, validation = train_test_split(
        np.arange(len(labels)), test_size=validation_fraction, stratify=labels, random_state=seed
    )
    return np.sort(training), np.sort(validation)


def _statistics(x: NDArray[np.generic]) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation along the feature axis, shaped to broadcast over rows."""
    others = tuple(axis for axis in range(x.ndim) if axis != 1)
    mean = x.mean(axis=others, dtype=np.float64, keepdims=True)
    deviation = x.std(axis=others, dtype=np.float64, keepdims=True)
    return torch.from_numpy(mean), torch.from_numpy(np.where(deviation > 0, deviation, 1.0))
