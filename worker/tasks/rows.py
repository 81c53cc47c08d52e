"""Rows of a data set: as they are stored on the host, and as a step wants them on the device."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BLOCK_BYTES = 2**24
"""Rows are standardized, and looked through, so many bytes of float64 at a time.

They may lie in a file that is larger than the machine's memory.
"""


@dataclass(frozen=True)
class Standardization:
    """How stored inputs become numbers of ``dtype``: (x − ``center``) · ``factor``.

    Both broadcast over rows; None for inputs that are standardized already. The result is the same
    on every device, one row or all at a time.
    """

    dtype: torch.dtype
    center: Tensor | None = None
    factor: Tensor | None = None

    @classmethod
    def by(
        cls, mean: Tensor, deviation: Tensor, dtype: torch.dtype, stored: torch.dtype
    ) -> "Standardization":
        """Return what gives inputs stored in a type a mean of 0 and a deviation of 1.

        ``mean`` and ``deviation`` are float64. Bytes are computed with in ``dtype``, which holds
        them exactly, so that a step can do it; anything else in float64.
        """
        precise = dtype if stored is torch.uint8 else torch.float64
        return cls(dtype, mean.to(precise), (1 / deviation).to(precise))

    def of_row(self, row: Tensor) -> tuple[Tensor, ...]:
        """Return center and factor for each number of a row; nothing if there is nothing to do.

        They lie in memory as the row does, or are single numbers: anything else is broadcast along
        axes so short that it takes three times as long.
        """
        if self.center is None or self.factor is None:
            return ()
        parts = self.center[0], self.factor[0]
        if parts[0].numel() == 1:
            return parts
        lying = torch.empty_like(row, dtype=self.dtype)
        return tuple(torch.empty_like(lying).copy_(one) for one in parts)

    def to(self, device: torch.device) -> "Standardization":
        """Return the same for inputs on ``device``."""
        if self.center is None or self.factor is None:
            return self
        return replace(self, center=self.center.to(device), factor=self.factor.to(device))

    def write(self, stored: Tensor, to: Tensor) -> None:
        """Write to ``to`` what these stored inputs become."""
        if self.center is None or self.factor is None:
            to.copy_(stored)
        elif self.center.dtype == to.dtype:
            to.copy_(stored).sub_(self.center).mul_(self.factor)
        else:  # rounded once it is done: seconds since 1970 have more digits than float32
            to.copy_((stored.to(self.center.dtype) - self.center) * self.factor)


@dataclass(frozen=True)
class Rows:
    """Inputs ``(N, *features)`` and targets ``(N,)``.

    Either as a step wants them; or, with ``pending``, of whatever type the data set has, and that
    is still to be done to them.

    Targets are labels, int64, or numbers of the same type as the inputs; for a loss of the task's
    own they may be anything, ``(N, …)``.
    """

    x: Tensor
    y: Tensor
    pending: Standardization | None = None

    def __len__(self) -> int:
        return self.y.shape[0]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one row's input."""
        return tuple(self.x.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        """Of what type inputs are for a step."""
        return self.pending.dtype if self.pending else self.x.dtype

    @property
    def bytes_each(self) -> int:
        """What a row takes as a step wants it."""
        return self.dtype.itemsize * prod(self.input_shape) + self.y[:1].nbytes

    @property
    def bytes_kept(self) -> int:
        """What a row takes where all of them are kept, bytes as they are."""
        return self.x[:1].nbytes + self.y[:1].nbytes if self.are_bytes else self.bytes_each

    @property
    def are_bytes(self) -> bool:
        """Whether inputs are bytes, which steps can standardize by themselves.

        As numbers they would take four times the memory, and be read from there in every step.
        """
        return self.pending is not None and self.x.dtype is torch.uint8

    @property
    def finished(self) -> bool:
        """Whether what is stored is what a step wants."""
        pending = self.pending
        return pending is None or (pending.center is None and pending.dtype == self.x.dtype)

    def on(
        self,
        device: torch.device,
        memory_format: torch.memory_format = torch.contiguous_format,
        *,
        keep_bytes: bool = False,
    ) -> "Rows":
        """Return all rows on ``device`` as a step wants them, images in this memory format.

        ``keep_bytes`` leaves bytes what they are.
        """
        if self.pending is None:
            return Rows(self.x.to(device), self.y.to(device))
        if keep_bytes and self.are_bytes:
            x = _room(self.x.shape, self.x.dtype, device, memory_format)
            return Rows(x.copy_(self.x), self.y.to(device), self.pending.to(device))
        if self.pending.center is None:
            return Rows(self.x.to(device, self.dtype), self.y.to(device))
        x = _room(self.x.shape, self.dtype, device, memory_format)
        for some in blocks(self.x.shape):
            part = torch.empty(self.x[some].shape, dtype=self.dtype)
            self.pending.write(self.x[some], part)
            x[some] = part.to(device)
        return Rows(x, self.y.to(device))

    def first(self, count: int) -> "Rows":
        """Return the first few rows, stored alike."""
        return replace(self, x=self.x[:count], y=self.y[:count])


def _room(
    shape: torch.Size, dtype: torch.dtype, device: torch.device, memory_format: torch.memory_format
) -> Tensor:
    """Return a tensor of whatever its memory holds.

    On a CPU that is NumPy's, which asks the system for huge pages, as torch does not: steps read
    rows from all over it, and that takes 0.8 of the time then.
    """
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device, memory_format=memory_format)
    like = torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format)
    numbers = np.empty(like.numel(), dtype=torch.empty(0, dtype=dtype).numpy().dtype)
    return torch.from_numpy(numbers).as_strided(shape, like.stride())


def blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Yield the rows of an array of this shape, a few megabytes at a time."""
    rows = max(1, BLOCK_BYTES // (8 * max(1, prod(shape[1:]))))
    for begin in range(0, shape[0], rows):
        yield slice(begin, min(begin + rows, shape[0]))


def statistics(
    x: NDArray[Any], numbers: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return mean and standard deviation of the rows of these numbers, along the feature axis.

    They are shaped to broadcast over rows. One pass over blocks of rows, whose moments are joined
    as in T. F. Chan, G. H. Golub and R. J. LeVeque, Updating Formulae and a Pairwise Algorithm for
    Computing Sample Variances (1979). A feature that never varies has a deviation of exactly 0.
    """
    others = tuple(axis for axis in range(x.ndim) if axis != 1)
    corner = tuple(slice(None) if axis < 2 else slice(1) for axis in range(x.ndim))
    first = x[numbers[:1]][corner].astype(np.float64)
    count, mean, squares = 0, np.zeros_like(first), np.zeros_like(first)
    for some in blocks((len(numbers), *x.shape[1:])):
        apart = x[numbers[some]] - first
        own_count = apart.size // first.size
        own_mean = apart.mean(axis=others, keepdims=True)
        apart -= own_mean
        apart *= apart
        gap = own_mean - mean
        squares += apart.sum(axis=others, keepdims=True)
        squares += gap**2 * (count * own_count / (count + own_count))
        count += own_count
        mean = mean + gap * (own_count / count)
    return mean + first, np.sqrt(squares / count)
