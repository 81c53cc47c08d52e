"""Which trials of a study in memory have changed, so that nobody goes through all of them again."""

from collections.abc import Sequence
from itertools import compress
from operator import is_not

from optuna.trial import FrozenTrial


class Changes:
    """The trials that have changed since the last look; each change is seen once.

    Optuna's storage in memory never changes a trial's object but puts a new one in its place, so an
    object that was seen before tells nothing new. Ended trials stay as they are.
    """

    def __init__(self) -> None:
        self._seen: Sequence[FrozenTrial] = ()
        self._ended = 0

    def among(self, trials: Sequence[FrozenTrial]) -> Sequence[FrozenTrial]:
        """Return those of all trials of the study, in order of number, that are new or changed."""
        before, now = self._seen[self._ended :], trials[self._ended :]
        changed = [*compress(now, map(is_not, now, before)), *now[len(before) :]]
        self._seen = trials
        while self._ended < len(trials) and trials[self._ended].state.is_finished():
            self._ended += 1
        return changed
