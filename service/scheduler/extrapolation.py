"""Our own pruner: it stops a trial that would not catch up with the best, however it goes on.

Strong regularization looks worse early and wins late, so trials are never compared at the same
epoch. Each one's own curve says how much it may still gain, and what it may reach in the end is
compared with what the best trial has reached already.
"""

from collections.abc import Mapping
from math import inf, isfinite, log2, sqrt

import numpy as np
from optuna import Study
from optuna.pruners import BasePruner
from optuna.trial import FrozenTrial, TrialState

from service.scheduler.changes import Changes

NOISE_MARGIN = 0.75
"""How many standard deviations of an epoch's noise a trial may still gain by luck; tuned."""
LEAST_EPOCHS = 3
"""Of the later half of a curve; with fewer, nobody knows its noise."""


class ExtrapolationPruner(BasePruner):
    """Prunes a trial whose curve, extrapolated in its favour, ends above the best loss so far.

    Losses are minimized, and a trial counts with its best epoch. Nothing is pruned before
    ``first_epoch``, and never the trial that leads. The verdict depends on the study's trials
    alone; what is kept between calls only saves time, and binds an object to one study.
    """

    def __init__(
        self, first_epoch: int, max_epochs: int, noise_margin: float = NOISE_MARGIN
    ) -> None:
        self._first_epoch = first_epoch
        self._max_epochs = max_epochs
        self._noise_margin = noise_margin
        self._changes = Changes()
        self._best_complete = inf
        self._running: dict[int, float] = {}

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Return whether the trial is not expected to come below the best loss of any trial."""
        if max(trial.intermediate_values, default=0) < self._first_epoch:
            return False
        prospect = extrapolate(trial.intermediate_values, self._max_epochs, self._noise_margin)
        return prospect is not None and prospect > self._best_loss(study)

    def _best_loss(self, study: Study) -> float:
        """Return the best loss of all trials that have completed or are running."""
        for trial in self._changes.among(study.get_trials(deepcopy=False)):
            self._running.pop(trial.number, None)
            match trial.state:
                case TrialState.COMPLETE if trial.value is not None:
                    self._best_complete = min(self._best_complete, trial.value)
                case TrialState.RUNNING:
                    losses = filter(isfinite, trial.intermediate_values.values())
                    self._running[trial.number] = min(losses, default=inf)
        return min(self._best_complete, min(self._running.values(), default=inf))


def extrapolate(
    losses: Mapping[int, float], max_epochs: int, noise_margin: float = NOISE_MARGIN
) -> float | None:
    """Return how low a trial may still come by ``max_epochs``, judged by its losses by epoch.

    A learning curve gains less with each doubling of the epochs. So for each doubling that is left,
    the trial is credited with what the latest one has gained: of the best loss, or of the mean if
    that fell by more, as when a loss that had risen comes down again. On top comes a margin for the
    noise of single epochs. Losses that are not finite do not count. Returns None where the curve is
    too short to tell. To stop what will not beat the best is the criterion of Domhan, Springenberg
    & Hutter (2015); they extrapolate by a mixture of eleven parametric curves instead.
    """
    finite = [(epoch, loss) for epoch, loss in sorted(losses.items()) if isfinite(loss)]
    if not finite:
        return None
    now = finite[-1][0]
    earlier = np.array([loss for epoch, loss in finite if now < 4 * epoch <= 2 * now])
    later = np.array([loss for epoch, loss in finite if 2 * epoch > now])
    if not len(earlier) or len(later) < LEAST_EPOCHS:
        return None
    best = min(loss for _, loss in finite)
    best_before = min(loss for epoch, loss in finite if 2 * epoch <= now)
    gain = max(best_before - best, float(earlier.mean() - later.mean()))
    noise = float(np.diff(later).std()) / sqrt(2)
    return best - log2(max_epochs / now) * gain - noise_margin * noise
