"""The life of trials under any order of events, as a state machine beside a model of it.

Hypothesis draws sequences of what schedulers, workers, zombies and clients do; after each step the
database must hold what the model says, and every invariant that the audit asks for.
"""

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import count
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import Engine, text

from regtune import leasing, reporting, shares, studies
from regtune.database import transaction
from regtune.errors import BudgetSpent, StaleView, StudyActive, StudyOver
from regtune.leasing import Lease
from regtune.reporting import Completed, Epoch, Failed, Outcome, Pruned
from regtune.spec import parse_change
from regtune.studies import Study
from tests import builders
from tests.audit import audit

MAX_EPOCHS = 4
MAX_ATTEMPTS = 3
LEASE_SECONDS = 30.0
OPEN = ("waiting", "running")

_names = count()

some = st.integers(1, 4)


@dataclass
class Trial:
    """What the model knows of a trial."""

    state: str = "waiting"
    lease: Lease | None = None
    expires: datetime | None = None
    lost: int = 0
    attempts: int = 0
    stop: str | None = None
    epochs: dict[tuple[int, int], float] = field(default_factory=dict)
    """Validation losses by attempt and epoch."""

    def end(self, state: str) -> None:
        self.state, self.lease, self.expires, self.stop = state, None, None, None

    def last(self, attempt: int) -> int:
        return max((epoch for a, epoch in self.epochs if a == attempt), default=0)

    @property
    def furthest(self) -> int:
        return max((epoch for _, epoch in self.epochs), default=0)


class LifeOfTrials(RuleBasedStateMachine):
    """One study; two workers that lease from it, and write with whatever lease they ever had."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.engine = engine
        self.now = datetime.now(UTC)
        self.trials: list[Trial] = []
        self.leases: list[Lease] = []
        self.ended_rows: dict[int, Any] = {}
        self.losses = count(1)
        self.told = ["study_created"]
        self.state = "active"

    @initialize(
        trials=st.integers(1, 8), trial_epochs=st.none() | st.integers(2, 7), leased=st.booleans()
    )
    def create(self, trials: int, trial_epochs: int | None, leased: bool) -> None:
        epochs = None if trial_epochs is None else trial_epochs * MAX_EPOCHS
        self.budget = {"trials": trials, "trial_epochs": epochs}
        self.study: Study = builders.create(
            self.engine,
            f"study-{next(_names)}",
            training={"max_epochs": MAX_EPOCHS},
            budget={key: value for key, value in self.budget.items() if value},
        )
        self.append(3, behind=False)
        if leased:
            self.lease("a", 2)

    # What the scheduler does.

    @rule(number=some, behind=st.booleans())
    def append(self, number: int, behind: bool) -> None:
        expected = len(self.trials) - behind
        suggestions = [builders.suggestion(self.study, len(self.trials) + i) for i in range(number)]
        try:
            with transaction(self.engine) as session:
                new = leasing.append(session, self.study.study_id, suggestions, expected=expected)
        except StaleView:
            assert behind
            return
        assert not behind
        room = max(0, self._room()) if self.state == "active" else 0
        assert len(new) == min(number, room)
        self.trials += [Trial() for _ in new]

    @precondition(lambda self: self._in("running"))
    @rule()
    def expire(self) -> None:
        with transaction(self.engine) as session:
            leasing.expire(session, self.study.study_id, MAX_ATTEMPTS, now=self.now)
        for trial in self.trials:
            if trial.expires is not None and trial.expires < self.now:
                self._give_up(trial, lost=1)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def request_stop(self, data: st.DataObject) -> None:
        lease = self._any_lease(data)
        with transaction(self.engine) as session:
            verdicts = {lease.trial_id: (lease.attempt, "looks bad")}
            reporting.request_stop(session, verdicts)
        trial = self.trials[lease.number]
        if trial.state == "running" and trial.attempts == lease.attempt:
            trial.stop = "looks bad"

    @precondition(lambda self: self._in("running"))
    @rule()
    def settle(self) -> None:
        with transaction(self.engine) as session:
            shares.settle(session, now=self.now)

    # What workers do, and those that have lost their leases without knowing it.

    @precondition(lambda self: self._in("waiting"))
    @rule(worker=st.sampled_from("ab"), number=some)
    def lease(self, worker: str, number: int) -> None:
        with transaction(self.engine) as session:
            leases = leasing.lease(
                session, self.study.study_id, worker, number, LEASE_SECONDS, now=self.now
            )
        waiting = [i for i, trial in enumerate(self.trials) if trial.state == "waiting"]
        due = waiting[:number] if self.state == "active" else []
        assert [lease.number for lease in leases] == due
        for lease in leases:
            trial = self.trials[lease.number]
            trial.state, trial.lease, trial.stop = "running", lease, None
            trial.attempts += 1
            trial.expires = self.now + timedelta(seconds=LEASE_SECONDS)
            assert lease.attempt == trial.attempts
        self.leases += leases

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), number=st.integers(0, 3), again=st.booleans())
    def record(self, data: st.DataObject, number: int, again: bool) -> None:
        """Renew leases and report epochs, some of them perhaps for the second time."""
        leases = self._some_leases(data)
        epochs: dict[int, list[Epoch]] = {}
        for lease in leases:
            last = self.trials[lease.number].last(lease.attempt)
            first = max(1, last + 1 - again)
            epochs[lease.trial_id] = [
                builders.epoch(epoch, float(next(self.losses)))
                for epoch in range(first, min(first + number, MAX_EPOCHS + 1))
            ]
        with transaction(self.engine) as session:
            verdicts = reporting.flush(session, leases, epochs, LEASE_SECONDS, now=self.now)
        held = [lease for lease in leases if self._is_held(lease)]
        assert verdicts.held == {lease.trial_id for lease in held}
        stops = {lease.trial_id: self.trials[lease.number].stop for lease in held}
        assert verdicts.stop == {id_: reason for id_, reason in stops.items() if reason}
        for lease in held:
            trial = self.trials[lease.number]
            trial.expires = self.now + timedelta(seconds=LEASE_SECONDS)
            for epoch in epochs[lease.trial_id]:
                trial.epochs.setdefault((lease.attempt, epoch.epoch), epoch.validation_loss)

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), kind=st.sampled_from(["complete", "pruned", "failed"]))
    def finish(self, data: st.DataObject, kind: str) -> None:
        lease = self._any_lease(data)
        trial = self.trials[lease.number]
        outcome: Outcome = Pruned("looks bad")
        if kind == "failed":
            outcome = Failed("ValueError: no", "Traceback")
        elif kind == "complete":
            curve = {e: loss for (a, e), loss in trial.epochs.items() if a == lease.attempt}
            if not curve:
                return
            best = min(curve, key=lambda epoch: curve[epoch])
            outcome = Completed(curve[best], 0.9, best, 0.6, 0.8, "finished")
        with transaction(self.engine) as session:
            ended = reporting.finish(session, [(lease, outcome)], "a", now=self.now)
        assert ended == ({lease.trial_id} if self._is_held(lease) else set())
        if ended:
            trial.end(kind)

    @precondition(lambda self: self._in("running"))
    @rule(again=st.booleans())
    def lose_every_lease(self, again: bool) -> None:
        """All workers are silent for too long; perhaps others take over at once."""
        self.now += timedelta(seconds=LEASE_SECONDS + 1)
        self.expire()
        if again:
            self.lease("b", 4)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        leases = self._some_leases(data)
        with transaction(self.engine) as session:
            given_up = leasing.release(session, leases, "a", now=self.now)
        held = [lease for lease in leases if self._is_held(lease)]
        assert set(given_up) == {lease.trial_id for lease in held}
        for lease in held:
            self._give_up(self.trials[lease.number], lost=0)

    @precondition(lambda self: self._zombies())
    @rule(data=st.data())
    def write_as_a_zombie(self, data: st.DataObject) -> None:
        """Write in every way with the lease of an earlier attempt, while a later one runs."""
        lease = data.draw(st.sampled_from(self._zombies()))
        epochs = {lease.trial_id: [builders.epoch(self.trials[lease.number].furthest + 1, 0.5)]}
        with transaction(self.engine) as session:
            verdicts = reporting.flush(session, [lease], epochs, LEASE_SECONDS, now=self.now)
            assert verdicts.held == frozenset()
            ended = reporting.finish(session, [(lease, Pruned("late"))], "a", now=self.now)
            assert ended == frozenset()
            assert leasing.release(session, [lease], "a", now=self.now) == []

    @rule(seconds=st.sampled_from([1, 20, 31]))
    def time_passes(self, seconds: int) -> None:
        self.now += timedelta(seconds=seconds)

    # What clients do.

    @rule(verb=st.sampled_from(["pause", "resume"]))
    def halt(self, verb: studies.Verb) -> None:
        self._act(verb)

    @precondition(lambda self: len(self.leases) > 3)  # so that something has happened
    @rule(verb=st.sampled_from(["stop", "cancel"]))
    def end(self, verb: studies.Verb) -> None:
        self._act(verb)

    def _act(self, verb: studies.Verb) -> None:
        after, late = self._after(verb)
        try:
            with transaction(self.engine) as session:
                study = studies.act(session, self.study.name, verb, "client")
        except StudyOver:
            assert late
            return
        assert not late
        if study.state == self.state and after == self.state:
            return
        self.told.append(f"study_{verb}")
        if verb in ("stop", "cancel"):
            withdrawn = OPEN if verb == "cancel" else ("waiting",)
            for trial in self.trials:
                if trial.state in withdrawn:
                    trial.end("cancelled")
        self.state = after
        if after in ("stopped", "cancelled"):
            self.told.append("study_ended")
        assert study.state == after

    @rule(trials=st.integers(1, 10), trial_epochs=st.none() | st.integers(2, 10))
    def change(self, trials: int, trial_epochs: int | None) -> None:
        epochs = None if trial_epochs is None else trial_epochs * MAX_EPOCHS
        wanted = {"trials": trials, "trial_epochs": epochs}
        try:
            with transaction(self.engine) as session:
                studies.change(session, self.study.name, parse_change({"budget": wanted}), "client")
        except StudyOver:
            assert self.state not in ("active", "paused")
            return
        except BudgetSpent:
            too_few = trials < len(self.trials)
            assert too_few or (epochs is not None and epochs < self._promised())
            return
        if wanted != self.budget:
            self.told.append("study_changed")
        self.budget = wanted

    @precondition(lambda self: self.state == "stopping")
    @rule()
    def delete_too_early(self) -> None:
        with pytest.raises(StudyActive), transaction(self.engine) as session:
            studies.delete(session, self.study.name, "client")

    # What must hold after each step.

    @invariant()
    def holds_what_the_model_says(self) -> None:
        if not hasattr(self, "study"):
            return
        with transaction(self.engine) as session:
            study = studies.by_id(session, self.study.study_id)
            rows = session.execute(text(_TRIALS), {"id": self.study.study_id}).all()
            epochs = session.execute(text(_EPOCHS), {"id": self.study.study_id}).all()
            told = session.execute(text(_TOLD), {"id": self.study.study_id}).scalars().all()
        assert (study.state, study.appended) == (self.state, len(self.trials))
        assert study.budget_trials == self.budget["trials"]
        assert study.budget_trial_epochs == self.budget["trial_epochs"]
        assert told == self.told
        for row, trial in zip(rows, self.trials, strict=True):
            token = trial.lease.token if trial.lease else None
            assert (row.state, row.attempt, row.lost_leases, row.token, row.epochs) == (
                *(trial.state, trial.attempts, trial.lost, token, trial.furthest),
            )
            assert self.ended_rows.setdefault(row.number, row) == row or trial.state in OPEN
            assert row.stop_request == trial.stop
            if trial.state in OPEN:
                del self.ended_rows[row.number]
        modelled = {
            (number, *key): loss
            for number, trial in enumerate(self.trials)
            for key, loss in trial.epochs.items()
        }
        assert {(e.number, e.attempt, e.epoch): e.validation_loss for e in epochs} == modelled

    @invariant()
    def passes_the_audit(self) -> None:
        assert audit(self.engine) == {}

    def teardown(self) -> None:
        """Delete the study, which leaves nothing of it but its history."""
        if not hasattr(self, "study"):
            return
        with transaction(self.engine) as session:
            if studies.find(session, self.study.name).live:
                studies.act(session, self.study.name, "cancel", "test")
            studies.delete(session, self.study.name, "test")
            left = session.execute(
                text("SELECT (SELECT count(*) FROM public.trials), count(*) FROM regtune.epochs")
            ).one()
            assert tuple(left) == (0, 0)

    def _room(self) -> int:
        room = self.budget["trials"] - len(self.trials)
        if self.budget["trial_epochs"] is not None:
            room = min(room, (self.budget["trial_epochs"] - self._promised()) // MAX_EPOCHS)
        return room

    def _promised(self) -> int:
        return sum(MAX_EPOCHS if trial.state in OPEN else trial.furthest for trial in self.trials)

    def _is_held(self, lease: Lease) -> bool:
        return self.trials[lease.number].lease == lease

    def _zombies(self) -> list[Lease]:
        return [
            lease
            for lease in self.leases
            if self.trials[lease.number].state == "running" and not self._is_held(lease)
        ]

    def _in(self, *states: str) -> bool:
        return any(trial.state in states for trial in self.trials)

    def _any_lease(self, data: st.DataObject) -> Lease:
        return data.draw(st.sampled_from(self.leases))

    def _some_leases(self, data: st.DataObject) -> list[Lease]:
        """Some of all leases that ever were, one of a trial."""
        return data.draw(
            st.lists(
                st.sampled_from(self.leases),
                min_size=1,
                max_size=4,
                unique_by=lambda one: one.trial_id,
            )
        )

    def _give_up(self, trial: Trial, lost: int) -> None:
        trial.lost += lost
        state = "waiting"
        if self.state not in ("active", "paused"):
            state = "cancelled"
        elif lost and trial.lost >= MAX_ATTEMPTS:
            state = "failed"
        trial.end(state)

    def _after(self, verb: str) -> tuple[str, bool]:
        """Return the study's state after a verb, and whether that comes too late."""
        stopped = "stopping" if self._in("running") else "stopped"
        after = {"pause": "paused", "resume": "active", "stop": stopped, "cancel": "cancelled"}
        done = {
            "pause": ("paused",),
            "resume": ("active",),
            "stop": ("stopping", "stopped"),
            "cancel": ("cancelled",),
        }
        if self.state in done[verb]:
            return self.state, False
        late = self.state in ("stopped", "cancelled") or (
            self.state == "stopping" and verb in ("pause", "resume")
        )
        return after[verb], late


_TRIALS = "SELECT * FROM regtune.trials WHERE study_id = :id ORDER BY number"
_EPOCHS = """
SELECT t.number, e.attempt, e.epoch, e.validation_loss
FROM regtune.epochs e JOIN regtune.trials t USING (trial_id) WHERE t.study_id = :id
"""
_TOLD = """
SELECT kind FROM regtune.events WHERE study_id = :id AND number IS NULL ORDER BY event_id
"""


def run(engine: Engine, examples: int) -> None:
    run_state_machine_as_test(
        partial(LifeOfTrials, engine),
        settings=settings(
            max_examples=examples,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            # A failure is told as it was found: to shrink it takes minutes on a database.
            phases=(Phase.explicit, Phase.reuse, Phase.generate),
            print_blob=True,
        ),
    )


def test_any_order_of_events_keeps_every_invariant(engine: Engine) -> None:
    run(engine, 25)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_any_order_of_events_keeps_every_invariant_for_long(engine: Engine) -> None:
    run(engine, 1000)
