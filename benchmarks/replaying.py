"""A study played without training: the scheduler's own mirror, over curves that are known."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from optuna.trial import TrialState

from service.scheduler.mirror import Mirror
from service.scheduler.suggestion import Suggestion

HEEDED_AFTER = 1
"""Epochs that a trial still trains when its verdict has been reached, as by a worker that reports
every epoch."""

CurveOf = Callable[[int, Suggestion], Sequence[float]]
"""What a trial of this number would train to its end: the loss of every epoch."""


@dataclass(frozen=True)
class Played:
    """What a study came to."""

    best_loss: float
    """The lowest of any epoch that was trained."""
    epochs: int
    complete: frozenset[int]
    """The numbers of the trials that ran to their end, and did not diverge."""


def play(mirror: Mirror, curve_of: CurveOf, trials: int, lanes: int) -> Played:
    """Play so many trials in so many lanes, which go on to the next one as soon as one ends."""
    running: list[_Lane] = []
    seen: list[float] = []
    complete: set[int] = set()
    while True:
        first = mirror.next_number
        made = mirror.suggest(min(lanes - len(running), trials - first))
        running += [_Lane(first + i, curve_of(first + i, one)) for i, one in enumerate(made)]
        if not running:
            return Played(min(filter(math.isfinite, seen)), len(seen), frozenset(complete))
        seen += [lane.train_epoch(mirror) for lane in running]
        complete |= {lane.number for lane in running if lane.ended is TrialState.COMPLETE}
        running = [lane for lane in running if lane.ended is None]


@dataclass
class _Lane:
    """A trial in training; ``stops_at`` is the epoch at which a verdict reaches it."""

    number: int
    curve: Sequence[float]
    epoch: int = 0
    stops_at: float = math.inf
    ended: TrialState | None = None

    def train_epoch(self, mirror: Mirror) -> float:
        """Train for an epoch, report it, and end if it was the last one; return its loss."""
        loss = self.curve[self.epoch]
        self.epoch += 1
        pruned = mirror.report(self.number, [(self.epoch, loss)]) is not None
        if self.epoch == len(self.curve) and math.isfinite(loss):
            self._end(mirror, TrialState.COMPLETE, min(self.curve))
        elif self.epoch == len(self.curve) or self.epoch >= self.stops_at:
            self._end(mirror, TrialState.PRUNED, None)
        elif pruned and self.stops_at == math.inf:
            self.stops_at = self.epoch + HEEDED_AFTER
        return loss

    def _end(self, mirror: Mirror, state: TrialState, value: float | None) -> None:
        mirror.tell(self.number, state, value)
        self.ended = state
