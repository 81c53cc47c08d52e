"""Early stopping, as a value: what one lane's validation losses so far amount to.

An epoch improves when its loss is below the best so far by more than ``min_delta``; the weights of
that epoch become the best ones. After ``patience`` epochs in a row without an improvement the lane
stops. L. Prechelt, Early Stopping – But When? (1998); the convention is that of Keras.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Self


@dataclass(frozen=True)
class EarlyStopping:
    """The state after some epochs; ``best_epoch`` counts from 1 and is 0 before any improvement."""

    patience: int
    min_delta: float
    epoch: int = 0
    best_epoch: int = 0
    best_loss: float = inf

    def observe(self, validation_loss: float) -> Self:
        """Return the state after one more epoch. A loss that is not a number never improves."""
        now = replace(self, epoch=self.epoch + 1)
        if validation_loss < self.best_loss - self.min_delta:
            return replace(now, best_epoch=now.epoch, best_loss=validation_loss)
        return now

    @property
    def improved(self) -> bool:
        """Whether the latest epoch is the best one."""
        return self.epoch == self.best_epoch

    @property
    def epochs_left(self) -> int:
        """After how many more epochs without an improvement patience will have run out."""
        return self.patience - (self.epoch - self.best_epoch)

    @property
    def stops(self) -> bool:
        """Whether patience has run out."""
        return self.epochs_left <= 0


def replay(validation_losses: Sequence[float], patience: int, min_delta: float) -> EarlyStopping:
    """Return how a training with ``patience`` would have ended, from one recorded curve.

    Exact for every patience up to the one the curve was recorded with: patience decides only when
    to stop, never how an epoch goes.
    """
    state = EarlyStopping(patience, min_delta)
    for loss in validation_losses:
        state = state.observe(loss)
        if state.stops:
            break
    return state
