"""The median pruner, for studies whose trials are too many to be gone through at each epoch."""

from bisect import insort
from math import isnan

from optuna import Study
from optuna.pruners import BasePruner
from optuna.trial import FrozenTrial, TrialState

from service.scheduler.changes import Changes

_FEW = 8
"""So many losses are put in their places one by one; each moves half of those that are known."""


class MedianPruner(BasePruner):
    """Prunes as ``optuna.pruners.MedianPruner`` does: what is worse than half of the others.

    A trial's best loss so far is compared with the median of the losses that the complete trials
    had at the same epoch. Those are kept in order, by epoch, so an object belongs to one study.
    """

    def __init__(self, startup_trials: int, first_epoch: int) -> None:
        self._startup_trials = startup_trials
        self._first_epoch = first_epoch
        self._changes = Changes()
        self._complete = 0
        self._losses: dict[int, list[float]] = {}

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Return whether the trial is to be stopped at its last epoch."""
        self._take_in(study)
        epoch = trial.last_step
        if epoch is None or epoch < self._first_epoch:
            return False
        if not self._complete or self._complete < self._startup_trials:
            return False
        own = [loss for loss in trial.intermediate_values.values() if not isnan(loss)]
        if not own:
            return True
        others = self._losses.get(epoch)
        return others is not None and min(own) > _median(others)

    def _take_in(self, study: Study) -> None:
        fresh: dict[int, list[float]] = {}
        for trial in self._changes.among(study.get_trials(deepcopy=False)):
            if trial.state is not TrialState.COMPLETE:
                continue
            self._complete += 1
            for epoch, loss in trial.intermediate_values.items():
                if not isnan(loss):
                    fresh.setdefault(epoch, []).append(loss)
        for epoch, losses in fresh.items():
            known = self._losses.setdefault(epoch, [])
            if len(losses) > _FEW:  # all of a study that was begun by another replica
                known.extend(losses)
                known.sort()
            else:
                for loss in losses:
                    insort(known, loss)


def _median(ordered: list[float]) -> float:
    low, high = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    return low if low == high else high - (high - low) * 0.5  # to the last bit as NumPy has it
