"""Which rows and which noise each lane sees in each step of an epoch."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from regtune.spec.training import steps_per_epoch
from worker.tasks.preparation import Split
from worker.training.model import INPUT_KEYS, PERTURBATIONS
from worker.training.noise import INPUT, PERTURBATION, data_order, member_seed, step_keys


@dataclass(frozen=True, order=True)
class Place:
    """What a lane's rows and noise depend on: its member, and its epoch, counted from 1."""

    member: int
    epoch: int


KEPT_BYTES = 2**26
"""Orders of rows are kept for lanes that come to the same place later, so many bytes of them."""


STEPS_AT_ONCE = 128
"""For so many steps at once their rows and noise keys are cut out, and at most so many taken."""


@dataclass(frozen=True)
class Order:
    """The rows that K lanes see in an epoch, one after the other, by number.

    ``numbers_GR`` has a row for each of G groups of lanes that see the same; ``group`` says which
    one each lane belongs to. It is a number instead of K where all lanes see the same, and then
    their batches have no lane axis.
    """

    numbers_GR: NDArray[np.int64]
    group: Sequence[int] | int

    def of_lanes(self, device: torch.device) -> Tensor:
        """Return each lane's numbers, ``(K, R)``; or those of all, ``(R,)``."""
        if isinstance(self.group, int):
            return _on(self.numbers_GR[self.group], device)
        group_K = _on(np.array(self.group), device)
        return _on(self.numbers_GR, device).index_select(0, group_K)

    def cut(self, sizes: Sequence[int], device: torch.device) -> Iterator[Tensor]:
        """Yield the numbers of each of these batches, ``(K, B)`` or ``(B,)``, side by side.

        Those of some steps at once: threads that compute would get into each other's way if each
        step cut its own.
        """
        numbers_GR, begin = _on(self.numbers_GR, device), 0
        for size, alike in groupby(sizes):
            end = begin + size * len(list(alike))
            numbers_GSB = numbers_GR[:, begin:end].view(len(numbers_GR), -1, size)
            yield from _of_lanes(numbers_GSB.movedim(1, 0), self.group)
            begin = end

    @property
    def seen_apart(self) -> int:
        """How many lanes see rows of their own, though perhaps the same: K, or one for all."""
        return 1 if isinstance(self.group, int) else len(self.group)


class Batches:
    """The batches of a study.

    Every epoch sees each row once, in batches whose sizes differ by one at most. Where splits
    differ in size, by one row at most, a random row of the larger ones is left out of each epoch.
    """

    def __init__(
        self, splits: Sequence[Split], batch_size: int, seed: int, sites: int, device: torch.device
    ) -> None:
        self.rows = min(len(split.training) for split in splits)
        self.sizes = batch_sizes(self.rows, batch_size)
        self._splits = splits
        self._seeds = [member_seed(seed, member) for member in range(len(splits))]
        self._sites = sites
        self._device = device
        self._kept_order = lru_cache(max(1, KEPT_BYTES // (8 * self.rows)))(self._order)

    def of_epoch(self, places: Sequence[Place]) -> tuple[Order, Iterator[Tensor]]:
        """Return the order of K lanes' rows, and on the device their noise keys, step by step.

        Those are ``(K, N, 2)``, or ``(N, 2)`` of a single lane, which has no lane axis. Batches are
        cut from the order by ``sizes``. Lanes at the same place see the same rows and noise; they
        come to the device once, and each step gets them as if they were its lanes' own: to share
        them there too would save a tenth of a step, and be a second program to record and to
        compile.
        """
        distinct = sorted(set(places))
        number = {place: number for number, place in enumerate(distinct)}
        group = [number[place] for place in places] if len(places) > 1 else 0
        order = Order(np.stack([self._kept_order(place) for place in distinct]), group)
        keys_SGN2 = _on(np.stack([self._keys(place) for place in distinct], 1), self._device)
        return order, _of_lanes(keys_SGN2, group)

    @property
    def bytes_of_epoch(self) -> int:
        """What ``of_epoch`` takes on the device for a lane that shares its place with no other."""
        keys = len(self.sizes) * (self._sites + PERTURBATIONS + INPUT_KEYS) * 8
        return 8 * self.rows + keys

    def _order(self, place: Place) -> NDArray[np.int64]:
        training = self._splits[place.member].training
        shuffled = data_order(self._seeds[place.member], place.epoch, len(training))
        return training[shuffled[: self.rows]]

    def _keys(self, place: Place) -> NDArray[np.int32]:
        seed, steps = self._seeds[place.member], len(self.sizes)
        return np.concatenate(
            [
                step_keys(seed, place.epoch, steps, self._sites),
                step_keys(seed, place.epoch, steps, PERTURBATIONS, PERTURBATION),
                step_keys(seed, place.epoch, steps, INPUT_KEYS, INPUT),
            ],
            axis=1,
        )


def _on(numbers: NDArray[Any], device: torch.device) -> Tensor:
    return torch.from_numpy(numbers).to(device, non_blocking=True)


def of_each_step(
    parts_S: Tensor, function: Callable[[Tensor], Tensor] = lambda some: some
) -> Iterator[Tensor]:
    """Yield what ``function`` makes of each step's part, of some steps at once."""
    for some in torch.split(parts_S, STEPS_AT_ONCE):
        yield from function(some).unbind()


def _of_lanes(parts_SG: Tensor, group: Sequence[int] | int) -> Iterator[Tensor]:
    """Yield each step's parts, of groups, once for each lane, ``(K, …)``, or that of all lanes."""
    if isinstance(group, int):
        return of_each_step(parts_SG[:, group])
    group_K = _on(np.array(group), parts_SG.device)
    return of_each_step(parts_SG, lambda some: some.index_select(1, group_K))


def batch_sizes(rows: int, batch_size: int) -> list[int]:
    """Return the sizes of an epoch's batches: each row once, sizes differ by one at most."""
    steps = steps_per_epoch(rows, batch_size)
    size, larger = divmod(rows, steps)
    return [size + 1] * larger + [size] * (steps - larger)
