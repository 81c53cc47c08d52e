"""The studies that a worker leaves to others: for good, or until it tries again."""

import time
from collections.abc import Callable, Collection, Iterator
from math import inf

from regtune.spec import NO_SHAPE

FIRST_SECONDS, MOST_SECONDS = 120.0, 3600.0
"""How long a worker without room for a study waits before it tries again: twice as long each time.

Another program may hold the device's memory for a minute, a disk may be full for a night; and a try
may mean to read a large data set.
"""


class Refusals(Collection[int]):
    """Ids of studies; a study that is postponed is among them until its time has come."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ends: dict[int, float] = {}
        self._seconds: dict[int, float] = {}
        self._shapes: set[tuple[int, str]] = set()

    def __iter__(self) -> Iterator[int]:
        now = self._clock()
        return iter([study_id for study_id, end in self._ends.items() if now < end])

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, study_id: object) -> bool:
        return study_id in list(iter(self))

    def add(self, study_id: int) -> None:
        """Refuse a study for as long as the worker runs."""
        self._ends[study_id] = inf

    def postpone(self, study_id: int, shape: str = NO_SHAPE) -> float:
        """Refuse a study for a while, because of a shape; return for how many seconds."""
        self._shapes.add((study_id, shape))
        seconds = min(MOST_SECONDS, 2 * self._seconds.get(study_id, FIRST_SECONDS / 2))
        self._seconds[study_id] = seconds
        self._ends[study_id] = self._clock() + seconds
        return seconds

    def postponed(self, study_id: int, shape: str = NO_SHAPE) -> bool:
        """Say whether a study was refused for a while because of a shape, and not trained since."""
        return (study_id, shape) in self._shapes

    def forget(self, study_id: int, shape: str = NO_SHAPE) -> None:
        """Take note that a study has been trained in this shape: what it lacked is there."""
        self._shapes.discard((study_id, shape))
        self._seconds.pop(study_id, None)
