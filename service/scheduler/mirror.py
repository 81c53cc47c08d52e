"""The mirror: an Optuna study in memory that has seen every trial of one in the database.

Suggestions come from it and results are told to it, through Optuna's public API, so that a
sampler never waits for the database. It is rebuilt from the database whenever it may have missed
something; nothing is lost with it.
"""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from math import inf
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy import Row, text
from sqlalchemy.orm import Session

from regtune.leasing import Suggestion
from regtune.spec import StudySpec
from service.scheduler.outlook import OutlookStorage
from service.scheduler.pruning import keeps_notes, make_pruner
from service.scheduler.suggestion import (
    as_suggestion,
    common_distributions,
    distributions,
    kind_of,
    make_sampler,
    predetermined,
    suggest_rest,
)

_STOP_AT, _SEEN_TO_END = "regtune:stop_at", "regtune:seen_to_end"
"""Our own notes beside those of pruners that keep some: the epoch at which such a one has said
stop, which it says once, and that it has seen all epochs of a trial that has ended."""


class Mirror:
    """An in-memory Optuna study, and its trials that have not ended, by number."""

    def __init__(self, spec: StudySpec) -> None:
        self.spec = spec
        self._storage = OutlookStorage(spec.training.max_epochs)
        # Hyperband hashes the study's name, so the mirror bears the same.
        self._study = optuna.create_study(
            study_name=spec.name, storage=self._storage, pruner=make_pruner(spec)
        )
        self._study_id = self._storage.get_study_id_from_name(spec.name)
        self._common = common_distributions(spec)
        self._keeps_notes = keeps_notes(spec)
        self._open: dict[int, optuna.Trial] = {}
        self._judged: dict[int, int] = {}
        self._doomed: dict[int, int] = {}
        self._known_notes: dict[int, Mapping[str, Any]] = {}
        self._next = 0

    @property
    def next_number(self) -> int:
        """The number that the next suggestion gets."""
        return self._next

    @property
    def open_numbers(self) -> Sequence[int]:
        """The trials that it has not seen end."""
        return list(self._open)

    @property
    def judged_epochs(self) -> Mapping[int, int]:
        """The last epoch that the pruner has seen, by trial number."""
        return self._judged

    def suggest(self, count: int, seconds: float = inf) -> Sequence[Suggestion]:
        """Return the next suggestions; the mirror takes them for running from here on.

        Once ``seconds`` are over there will be no more than the one that was begun.
        """
        due = time.monotonic() + seconds
        made: list[Suggestion] = []
        while len(made) < count and (not made or time.monotonic() < due):
            made.append(self._suggest_one())
        return made

    def report(
        self, number: int, epochs: Sequence[tuple[int, float]], *, over: bool = False
    ) -> int | None:
        """Show the pruner new epochs of an open trial; return the epoch at which it says stop.

        Once it has said so, that stands, for another attempt at the trial too: some pruners say it
        once alone, and whoever was to hear it may be gone. ``over`` says that the trial has ended
        by itself, so that the answer matters no more, and all its epochs have been.
        """
        asked = self._keeps_notes or not over
        for epoch, loss in epochs:
            if epoch > self._judged.get(number, 0):
                self._show(number, epoch, loss, asked=asked, over=over)
        return None if over else self._doomed.get(number)

    def take_notes(self, number: int) -> Mapping[str, Any]:
        """Return what sampler and pruner have noted on an open trial since this was last asked."""
        notes, known = dict(self._notes(number)), self._known_notes[number]
        self._known_notes[number] = notes
        return {key: note for key, note in notes.items() if known.get(key) != note}

    def tell(self, number: int, state: TrialState, value: float | None) -> Mapping[str, Any]:
        """Let an open trial end; return what has been noted on it, as ``take_notes`` does.

        A pruned trial counts with the last epoch that was reported of it.
        """
        trial = self._open.pop(number)
        self._judged.pop(number, None)
        self._doomed.pop(number, None)
        if self._keeps_notes:
            self._storage.set_trial_system_attr(self._trial_id(number), _SEEN_TO_END, True)
        self._study.tell(trial, value if state is TrialState.COMPLETE else None, state=state)
        notes = self.take_notes(number)
        del self._known_notes[number]
        return notes

    def restore(self, trials: Sequence[FrozenTrial]) -> Mapping[int, Mapping[str, Any]]:
        """Take over the trials of a study in the database, ordered by number.

        Return what is noted only now on those that have ended, by number.
        """
        noted = {}
        for trial in trials:
            number = self._next
            if not trial.state.is_finished():
                self._reopen(trial)
            elif self._lacks_notes(trial):
                self._reopen(trial, over=True)
                noted[number] = self.tell(number, trial.state, trial.value)
            else:
                self._study.add_trial(trial)
                self._next += 1
        return noted

    def _lacks_notes(self, trial: FrozenTrial) -> bool:
        """Say whether a trial has ended while no scheduler was there to let its pruner note it."""
        return (
            self._keeps_notes
            and bool(trial.intermediate_values)
            and _SEEN_TO_END not in trial.system_attrs
        )

    def _suggest_one(self) -> Suggestion:
        number = self._next
        point = predetermined(self.spec, number)
        if point is not None:
            self._study.enqueue_trial(point)
        self._study.sampler = make_sampler(self.spec, number)
        with self._outlook():
            trial = self._study.ask(self._common)
            suggest_rest(self.spec, trial)
        self._next += 1
        self._open[number] = trial
        self._known_notes[number] = dict(self._notes(number))
        return as_suggestion(self.spec, number, trial.params, self._known_notes[number])

    def _outlook(self) -> AbstractContextManager[None]:
        """Return how the sampler sees the trials; CMA-ES counts those that have ended."""
        return self._storage.looking_ahead() if self.spec.sampler.name == "tpe" else nullcontext()

    def _show(self, number: int, epoch: int, loss: float, *, asked: bool, over: bool) -> None:
        """Show the pruner an epoch, and keep its verdict, as a note if it keeps notes itself."""
        trial = self._open[number]
        trial.report(loss, epoch)
        self._judged[number] = epoch
        asked = asked and kind_of(number) == "suggested" and number not in self._doomed
        if asked and trial.should_prune() and not over:
            self._doomed[number] = epoch
            if self._keeps_notes:
                self._storage.set_trial_system_attr(self._trial_id(number), _STOP_AT, epoch)

    def _reopen(self, trial: FrozenTrial, *, over: bool = False) -> None:
        """Add an open trial, and show the pruner its epochs again.

        One that keeps notes judges those on which none has been kept, since nobody has judged them.
        Another one is asked about the last alone: what is known of other trials by now would let it
        condemn one in hindsight, which has done well since.
        """
        number = self._next
        self._study.add_trial(
            create_trial(
                state=TrialState.RUNNING,
                params=trial.params,
                distributions=trial.distributions,
                system_attrs=trial.system_attrs,
            )
        )
        self._next += 1
        self._open[number] = optuna.Trial(self._study, self._trial_id(number))
        self._known_notes[number] = trial.system_attrs
        if _STOP_AT in trial.system_attrs:
            self._doomed[number] = trial.system_attrs[_STOP_AT]
        last = max(trial.intermediate_values, default=0)
        for epoch, loss in sorted(trial.intermediate_values.items()):
            asked = self._keeps_notes or epoch == last
            self._show(number, epoch, loss, asked=asked, over=over)

    def _notes(self, number: int) -> Mapping[str, Any]:
        return self._storage.get_trial_system_attrs(self._trial_id(number))

    def _trial_id(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)


def read_trials(session: Session, study_id: int, spec: StudySpec) -> Sequence[Row[Any]]:
    """Read all trials of a study from Optuna's tables, ordered by number, for ``as_trials``.

    In one statement: Optuna's own storage takes seconds for ten thousand trials. Learning curves
    come along where somebody judges by them, and of pruned trials. What others have added to the
    study in Optuna's tables, as ``enqueue_trial`` does, is none of ours: no worker trains it.
    """
    curves = spec.pruner.name != "none"
    return session.execute(text(_TRIALS), {"study_id": study_id, "curves": curves}).all()


def as_trials(rows: Iterable[Row[Any]], spec: StudySpec) -> Sequence[FrozenTrial]:
    """Return what was read of trials as Optuna has them.

    Not within the transaction: it may take longer than the server lets one rest.
    """
    space = distributions(spec)
    return [_trial(row, space) for row in rows]


def _trial(row: Row[Any], space: Mapping[str, BaseDistribution]) -> FrozenTrial:
    state = TrialState[row.state]
    return create_trial(
        state=state,
        value=row.value if state.is_finished() else None,
        params={
            name: space[name].to_external_repr(value) for name, value in (row.params or {}).items()
        },
        distributions={name: space[name] for name in row.params or {}},
        # A pruner may have noted an infinite loss, which Python writes as no JSON of PostgreSQL's.
        system_attrs={key: json.loads(note) for key, note in (row.notes or {}).items()},
        # What is not a finite number comes as a word.
        intermediate_values={int(step): float(at) for step, at in (row.curve or {}).items()},
    )


_TRIALS = """
SELECT ours.trial_id, ours.number, ours.state AS our_state, t.state::text, v.value,
       (SELECT json_object_agg(param_name, param_value)
        FROM public.trial_params p WHERE p.trial_id = t.trial_id) AS params,
       (SELECT json_object_agg(key, value_json)
        FROM public.trial_system_attributes a WHERE a.trial_id = t.trial_id) AS notes,
       CASE WHEN :curves OR t.state = 'PRUNED' THEN (
            SELECT json_object_agg(step, CASE intermediate_value_type
                   WHEN 'FINITE' THEN intermediate_value WHEN 'NAN' THEN 'NaN'
                   WHEN 'INF_POS' THEN 'Infinity' ELSE '-Infinity' END::double precision)
            FROM public.trial_intermediate_values i WHERE i.trial_id = t.trial_id) END AS curve
FROM regtune.trials ours JOIN public.trials t USING (trial_id) LEFT JOIN LATERAL (
    SELECT CASE value_type WHEN 'FINITE' THEN value WHEN 'INF_POS' THEN 'Infinity'
           ELSE '-Infinity' END::double precision AS value
    FROM public.trial_values WHERE trial_id = t.trial_id) v ON true
WHERE ours.study_id = :study_id
ORDER BY ours.number
"""
