"""Our own pruner: it stops a trial that would not catch up with the best, however it goes on.

Strong regularization looks worse early and wins late, so trials are never compared at the same
epoch. Each one's own curve says how much it may still gain, and what it may reach in the end is
compared with what the best trial has reached already.
"""

from collections.abc import Mapping
from math import inf, isfinite, log2, sqrt
from statistics import fmean

import numpy as np
from optuna import Study
from optuna.pruners import BasePruner
from optuna.trial import FrozenTrial, TrialState

from service.scheduler.changes import Changes

NOISE_MARGIN = 1.25
"""How many standard deviations of an epoch's noise a trial may still gain by luck; tuned."""
LEAST_SHARE = 0.7
"""Of what a doubling of the epochs has gained, what the next one is credited with at least; tuned.
"""
LEAST_EPOCHS = 4
"""With fewer, nobody knows a curve's gain and its noise."""
NOISY_EPOCHS = 3
"""From so many at least, the latest ones, its noise is told."""


class ExtrapolationPruner(BasePruner):
    """Prunes a trial whose curve, extrapolated in its favour, ends above the best loss so far.

    Losses are minimized, and a trial counts with its best epoch. Nothing is pruned before
    ``first_epoch``, and never the trial that leads. The verdict depends on the study's trials
    alone; what is kept between calls only saves time, and binds an object to one study.
    """

    def __init__(
        self,
        first_epoch: int,
        max_epochs: int,
        noise_margin: float = NOISE_MARGIN,
        least_share: float = LEAST_SHARE,
    ) -> None:
        self._first_epoch = first_epoch
        self._max_epochs = max_epochs
        self._noise_margin = noise_margin
        self._least_share = least_share
        self._changes = Changes()
        self._best_complete = inf
        self._running: dict[int, float] = {}

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Return whether the trial is not expected to come below the best loss of any trial."""
        if max(trial.intermediate_values, default=0) < self._first_epoch:
            return False
        prospect = extrapolate(
            trial.intermediate_values, self._max_epochs, self._noise_margin, self._least_share
        )
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
    losses: Mapping[int, float],
    max_epochs: int,
    noise_margin: float = NOISE_MARGIN,
    least_share: float = LEAST_SHARE,
) -> float | None:
    """Return how low a trial may still come by ``max_epochs``, judged by its losses by epoch.

    A learning curve gains less with each doubling of the epochs. Each one that is left is credited
    with a share of what the one before it has gained: the latest one's share of its predecessor's
    gain, but ``least_share`` at the least and all at the most. On top comes a margin for the noise
    of single epochs. Losses that are not finite do not count. Returns None where the curve is too
    short to tell. To stop what will not beat the best is the criterion of Domhan, Springenberg &
    Hutter (2015); they extrapolate by a mixture of eleven parametric curves instead.
    """
    finite = {epoch: loss for epoch, loss in sorted(losses.items()) if isfinite(loss)}
    if len(finite) < LEAST_EPOCHS:
        return None
    now = max(finite)
    gain, gain_before = _gain(finite, now), _gain(finite, now / 2)
    if gain is None:
        return None
    share = gain / gain_before if gain_before else 1.0
    share = min(1.0, max(least_share, share))
    curve = list(finite.values())
    latest = curve[-max(NOISY_EPOCHS, sum(2 * epoch > now for epoch in finite)) :]
    noise = float(np.diff(latest).std()) / sqrt(2)
    credit = gain * share * _power_sum(share, log2(max_epochs / now))
    return min(curve) - credit - noise_margin * noise


def _gain(losses: Mapping[int, float], end: float) -> float | None:
    """Return what a doubling of the epochs has gained, by those up to ``end``; None if too few.

    That is by how much the best loss has fallen, or the mean if that fell by more, as when a loss
    that had risen comes down again; nothing where neither has. Whole epochs are seldom exactly half
    of others, so both are measured by how far apart they are.
    """
    before = [epoch for epoch in losses if 2 * epoch <= end]
    earlier = [epoch for epoch in before if end < 4 * epoch]
    later = [epoch for epoch in losses if epoch <= end < 2 * epoch]
    if not (earlier and later):
        return None
    least, least_before = (min(map(losses.__getitem__, some)) for some in (before + later, before))
    mean, mean_before = (fmean(map(losses.__getitem__, some)) for some in (later, earlier))
    return max(
        (least_before - least) / log2(later[-1] / before[-1]),
        (mean_before - mean) / log2(fmean(later) / fmean(earlier)),
    )


def _power_sum(base: float, terms: float) -> float:
    """Return 1 + base + base² + … of so many terms, which need not be a whole number."""
    return terms if base == 1 else (1 - base**terms) / (1 - base)
