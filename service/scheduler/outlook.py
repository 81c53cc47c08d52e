"""What a sampler is told of running trials: what they may be expected to come to.

TPE takes a running trial for a bad one, lest two lanes try the same place. With many lanes most of
what is known so lies idle: of 32 trials on eight lanes, each is suggested without the eight that
were suggested just before, although their curves have told for epochs how they fare.
"""

import copy
from collections.abc import Container, Iterator
from contextlib import contextmanager
from math import isfinite

from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, TrialState

from service.scheduler.extrapolation import extrapolate

EXPECTED_SHARE = 0.5
"""Of what a trial could gain yet, as the pruner has it, which errs in its favour; measured."""


class OutlookStorage(InMemoryStorage):
    """Optuna's storage in memory, in which running trials may be seen as if they had completed."""

    def __init__(self, max_epochs: int) -> None:
        super().__init__()
        self._max_epochs = max_epochs
        self._looking_ahead = False
        self._expected: dict[int, tuple[FrozenTrial, FrozenTrial]] = {}

    @contextmanager
    def looking_ahead(self) -> Iterator[None]:
        """Show running trials, within the block, as complete with the losses expected of them.

        Those whose curves are too short to tell are shown as running.
        """
        self._looking_ahead = True
        try:
            yield
        finally:
            self._looking_ahead = False

    def get_all_trials(
        self,
        study_id: int,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
    ) -> list[FrozenTrial]:
        """Return the trials of a study, as Optuna's storage does, or as they may end."""
        if not self._looking_ahead or states == (TrialState.WAITING,):
            return super().get_all_trials(study_id, deepcopy, states)
        trials = super().get_all_trials(study_id, deepcopy=False)
        self._expected = {
            trial.number: self._expect(trial)
            for trial in trials
            if trial.state is TrialState.RUNNING
        }
        for number, (_, ahead) in self._expected.items():
            trials[number] = ahead
        return trials if states is None else [trial for trial in trials if trial.state in states]

    def _expect(self, trial: FrozenTrial) -> tuple[FrozenTrial, FrozenTrial]:
        """Return a running trial and how it may end; worked out once for each epoch of it.

        The storage puts a new object in a trial's place whenever it changes.
        """
        known = self._expected.get(trial.number)
        if known is not None and known[0] is trial:
            return known
        return trial, _as_it_may_end(trial, self._max_epochs)


def _as_it_may_end(trial: FrozenTrial, max_epochs: int) -> FrozenTrial:
    ahead = copy.copy(trial)
    # All parameters are chosen; what TPE noted while they were not, it would read at each look.
    ahead.system_attrs = {}
    prospect = extrapolate(trial.intermediate_values, max_epochs, noise_margin=0.0)
    if prospect is None:
        return ahead
    best = min(filter(isfinite, trial.intermediate_values.values()))
    ahead.state = TrialState.COMPLETE
    ahead.value = best - EXPECTED_SHARE * (best - prospect)
    return ahead
