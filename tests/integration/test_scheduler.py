"""The scheduler against a real database, with a stand-in for training that costs nothing."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from math import inf
from typing import Any

import optuna
import psycopg
import pytest
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session
from structlog.testing import capture_logs

from regtune import database, leasing, reporting, shares, studies, workers
from regtune.database import transaction
from regtune.errors import BudgetSpent, StaleView
from regtune.leasing import Lease
from regtune.reporting import Epoch, Failed, Outcome, Pruned
from regtune.settings import Settings
from regtune.spec import STRENGTHS, parse_change
from regtune.studies import Study
from service.scheduler import glances
from service.scheduler.conductor import MOST_AT_ONCE, Conductor
from service.scheduler.loop import Scheduler
from tests import builders
from tests.audit import audit
from tests.hearing import heard_on
from tests.waiting import wait_until

DEADLINE_SECONDS = 60
SETTINGS = Settings(poll_seconds=0.2, lease_seconds=60, max_consecutive_failures=4)
NO_POLL = SETTINGS.model_copy(update={"poll_seconds": 3600})
"""What happens is noticed at a glance, or not at all."""

Trainer = Callable[[Lease], tuple[list[float], Outcome | None]]
"""From a lease to the validation losses of its epochs and, unless it completes, its outcome."""


def bowl(lease: Lease) -> tuple[list[float], None]:
    """Loss that is best at a dropout of 0.3 and falls with the epochs."""
    floor = (lease.params["dropout"] - 0.3) ** 2
    return [floor + 1 / epoch for epoch in range(1, 6)], None


@contextmanager
def scheduler(
    engine: Engine, url: str, settings: Settings = SETTINGS, replicas: int = 1
) -> Iterator[None]:
    running = [Scheduler(engine, url, settings) for _ in range(replicas)]
    for replica in running:
        replica.start()
    try:
        yield
    finally:
        for replica in running:
            replica.stop()


class HandWorker:
    """Leases and finishes trials in a thread; it trains nothing."""

    def __init__(self, engine: Engine, name: str, lanes: int, train: Trainer = bowl) -> None:
        self.engine, self.name, self.lanes, self.train = engine, name, lanes, train
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self._run)

    def __enter__(self) -> "HandWorker":
        builders.register(self.engine, self.name, self.lanes)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self.thread.join()

    def _run(self) -> None:
        while not self.stopping.is_set():
            with transaction(self.engine) as session:
                study_id = shares.choose(session, self.name)
                leases = (
                    leasing.lease(session, study_id, self.name, self.lanes, 30) if study_id else []
                )
                workers.beat(session, self.name, wanted_lanes=self.lanes, study_id=study_id)
            for lease in leases:
                self._train(lease)
            self.stopping.wait(0.01)

    def _train(self, lease: Lease) -> None:
        losses, outcome = self.train(lease)
        for number, loss in enumerate(losses, start=1):
            with transaction(self.engine) as session:
                epochs = {lease.trial_id: [Epoch(number, loss, loss, 0.5, 0, 0, 0.01)]}
                verdicts = reporting.flush(session, [lease], epochs, 30)
            if lease.trial_id in verdicts.stop:
                outcome = Pruned(verdicts.stop[lease.trial_id])
                break
        best = min(losses)
        ending = outcome or builders.completed(best, losses.index(best) + 1)
        with transaction(self.engine) as session:
            reporting.finish(session, [(lease, ending)], self.name)


def over(engine: Engine, study: Study) -> Callable[[], bool]:
    return lambda: builders.study_state(engine, study) not in ("active", "paused", "stopping")


def rows(engine: Engine, query: str) -> list[tuple[Any, ...]]:
    with engine.connect() as connection:
        return [tuple(row) for row in connection.execute(text(query))]


def test_what_a_notebook_enqueues_in_optunas_tables_keeps_no_leader_from_the_study(
    engine: Engine, database_url: str
) -> None:
    """It is nobody's to train; who leads next reads the study anew, and goes on."""
    study = builders.create(engine, budget={"trials": 6})
    storage = optuna.storages.RDBStorage(database_url)
    with HandWorker(engine, "w", 1) as worker:
        with scheduler(engine, database_url):
            wait_until(lambda: "complete" in builders.states(engine, study), DEADLINE_SECONDS)
        optuna.load_study(study_name="study", storage=storage).enqueue_trial({"dropout": 0.5})
        worker.lanes = 2
        with scheduler(engine, database_url):
            wait_until(lambda: builders.study_state(engine, study) == "completed", DEADLINE_SECONDS)
    assert builders.states(engine, study) == ["complete"] * 6


def test_a_study_of_forty_trials_with_three_workers_trains_exactly_forty(
    engine: Engine, database_url: str
) -> None:
    study = builders.create(engine, budget={"trials": 40})
    with (
        scheduler(engine, database_url, NO_POLL),
        HandWorker(engine, "a", 4),
        HandWorker(engine, "b", 3),
        HandWorker(engine, "c", 1),
    ):
        wait_until(over(engine, study), DEADLINE_SECONDS)
    assert builders.study_state(engine, study) == "completed"
    assert builders.states(engine, study) == ["complete"] * 40
    assert rows(engine, "SELECT DISTINCT attempt FROM regtune.trials") == [(1,)]
    assert audit(engine) == {}


def test_three_replicas_and_many_workers_keep_the_budget(engine: Engine, database_url: str) -> None:
    names = [f"study-{i}" for i in range(4)]
    made = [builders.create(engine, name, budget={"trials": 25}) for name in names]
    with (
        scheduler(engine, database_url, replicas=3),
        HandWorker(engine, "a", 5),
        HandWorker(engine, "b", 5),
    ):
        for study in made:
            wait_until(over(engine, study), DEADLINE_SECONDS)
    for study in made:
        assert builders.states(engine, study) == ["complete"] * 25
    assert audit(engine) == {}


def test_another_replica_takes_over_and_goes_on_where_the_first_stopped(
    engine: Engine, database_url: str
) -> None:
    study = builders.create(engine, budget={"trials": 30})
    with HandWorker(engine, "a", 2):
        with scheduler(engine, database_url):
            wait_until(lambda: "complete" in builders.states(engine, study), DEADLINE_SECONDS)
        with scheduler(engine, database_url):
            wait_until(over(engine, study), DEADLINE_SECONDS)
    assert builders.states(engine, study) == ["complete"] * 30
    assert audit(engine) == {}


def test_reference_points_come_first_and_are_marked(engine: Engine, database_url: str) -> None:
    study = builders.create(engine, budget={"trials": 4})
    with scheduler(engine, database_url), HandWorker(engine, "a", 4):
        wait_until(over(engine, study), DEADLINE_SECONDS)
    kinds = rows(engine, "SELECT kind, params FROM regtune.trials ORDER BY number")
    assert [kind for kind, _ in kinds] == ["baseline", "default", "suggested", "suggested"]
    off = dict.fromkeys(STRENGTHS, 0.0) | {"patience": 25, "learning_rate": 0.001}
    assert kinds[0][1] == off
    assert kinds[1][1] == off | {"weight_decay": 0.01, "dropout": 0.2, "patience": 10}


def test_no_more_trials_wait_than_workers_want_lanes(engine: Engine, database_url: str) -> None:
    study = builders.create(engine, budget={"trials": 50})
    builders.register(engine, "idle", 6)
    builders.register(engine, "without the task", 60, datasets=["mnist"])
    conductor = Conductor(engine, SETTINGS, study.study_id)
    for _ in range(3):
        conductor.round()
    assert builders.states(engine, study) == ["waiting"] * 6


@pytest.mark.parametrize(
    ("lasted", "waiting", "most", "least"), [("0 s", MOST_AT_ONCE, 10, 1), ("1 hour", 40, 100, 40)]
)
def test_of_trials_that_last_a_moment_each_worker_that_is_called_trains_several(
    engine: Engine,
    database_url: str,
    lasted: str,
    waiting: int,
    most: int,
    least: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("service.scheduler.conductor.SUGGESTION_SECONDS", 60)  # all in one round
    study = builders.create(engine, budget={"trials": 100})
    for number in range(40):
        builders.register(engine, f"w{number}")
    conductor = Conductor(engine, SETTINGS, study.study_id)

    def suggest() -> None:
        conductor.round()
        conductor.round()  # no more than that

    suggest()
    builders.complete(engine, builders.lease(engine, study, 40))
    with engine.begin() as connection:
        begun = f"leased_at = finished_at - interval '{lasted}'"
        connection.execute(text(f"UPDATE regtune.trials SET {begun} WHERE state = 'complete'"))
    url = database.normalized(database_url).set(drivername="postgresql")
    with psycopg.connect(url.render_as_string(hide_password=False), autocommit=True) as listening:
        for number in range(40):
            listening.execute(f"LISTEN {database.work_for(f'w{number}')}")
        suggest()
        called = len(list(listening.notifies(timeout=0)))
    assert least <= called <= most
    assert builders.states(engine, study).count("waiting") == waiting


@pytest.mark.parametrize(
    ("pruner", "running", "wanted", "waiting"),
    [("extrapolation", 8, 1, 2), ("extrapolation", 4, 1, 1), ("extrapolation", 8, 5, 5),
     ("extrapolation", 8, 0, 0), ("none", 8, 1, 1)],
)  # fmt: skip
def test_where_a_pruner_may_stop_several_trials_at_once_a_spare_one_waits(
    engine: Engine, pruner: str, running: int, wanted: int, waiting: int
) -> None:
    study = builders.create(engine, pruner=pruner, budget={"trials": 50})
    builders.register(engine, "w", running)
    conductor = Conductor(engine, SETTINGS, study.study_id)
    conductor.round()
    assert len(builders.lease(engine, study, running)) == running
    with transaction(engine) as session:
        workers.beat(session, "w", wanted_lanes=wanted, study_id=study.study_id)
    for _ in range(3):
        conductor.round()
    assert builders.states(engine, study) == ["running"] * running + ["waiting"] * waiting


@pytest.mark.parametrize(("trials", "paused"), [(2, False), (50, True)])
def test_wishes_that_cannot_be_fulfilled_call_for_no_round(
    engine: Engine, trials: int, paused: bool
) -> None:
    study = builders.create(engine, budget={"trials": trials})
    builders.register(engine, "idle", 2)
    conductor = Conductor(engine, SETTINGS, study.study_id)
    conductor.round()
    with transaction(engine) as session:
        if paused:
            studies.act(session, study.name, "pause", "test")
        workers.beat(session, "idle", wanted_lanes=6, study_id=None)
    conductor.round()
    with transaction(engine) as session:
        glance = glances.of(session, study.study_id, SETTINGS.lease_seconds, 2)
    assert (glance.waiting, glance.wanted_lanes) == (2, 6)
    assert not conductor.has_ends_or_wants(glance)


def test_a_suspect_that_waits_keeps_no_lane_empty(engine: Engine) -> None:
    """It trains alone, after all others; they are suggested meanwhile."""
    study = builders.create(engine)
    builders.append(engine, study, 1)
    for _ in range(SETTINGS.suspect_from):
        builders.lease(engine, study)
        builders.expire(engine, study, SETTINGS.max_attempts)
    builders.register(engine, "busy", 2)
    Conductor(engine, SETTINGS, study.study_id).round()
    assert builders.states(engine, study) == ["waiting"] * 3


def suspects(engine: Engine, study: Study, count: int) -> None:
    """Let the next trials lose all leases but one."""
    for _ in range(count):
        builders.append(engine, study, 1)
        for _ in range(SETTINGS.suspect_from):
            lease_one(engine, study, alone=False)
            builders.expire(engine, study, SETTINGS.max_attempts)


FAIL_SOON = SETTINGS.model_copy(update={"max_consecutive_failures": 3})


@pytest.mark.parametrize("trained", [0, 1])
def test_a_study_that_kills_every_worker_gets_no_more_trials_until_its_suspects_have_failed(
    engine: Engine, trained: int
) -> None:
    """Else each would be followed by another one, to the end of the budget."""
    study = builders.create(engine, budget={"trials": 100})
    builders.append(engine, study, trained)
    builders.complete(engine, builders.lease(engine, study, trained))
    suspects(engine, study, FAIL_SOON.max_consecutive_failures)
    builders.register(engine, "busy", 1)
    conductor = Conductor(engine, FAIL_SOON, study.study_id)
    while builders.study_state(engine, study) == "active":
        conductor.round()
        assert "waiting" in builders.states(engine, study)
        lease_one(engine, study, alone=True)
        builders.expire(engine, study, SETTINGS.max_attempts)
        conductor.round()
    states = builders.states(engine, study)
    assert states.count("failed") == FAIL_SOON.max_consecutive_failures
    assert len(states) <= trained + FAIL_SOON.max_consecutive_failures + 2


def lease_one(engine: Engine, study: Study, *, alone: bool) -> Sequence[Lease]:
    """Lease a trial as a worker does that is ``alone`` with it, or is not."""
    with transaction(engine) as session:
        return leasing.lease(
            session, study.study_id, "w", 1, 30, suspect_from=SETTINGS.suspect_from, alone=alone
        )


def test_failures_that_nobody_led_through_end_a_study_as_well(engine: Engine) -> None:
    study = builders.create(engine, budget={"trials": 100})
    builders.append(engine, study, 2 + FAIL_SOON.max_consecutive_failures)
    builders.complete(engine, builders.lease(engine, study))
    builders.lease(engine, study)  # and goes on
    with transaction(engine) as session:
        leases = leasing.lease(session, study.study_id, "w", 99, 30)
        failed = Failed("ZeroDivisionError", "Traceback")
        reporting.finish(session, [(lease, failed) for lease in leases], "w")
    Conductor(engine, FAIL_SOON, study.study_id).round()
    assert builders.study_state(engine, study) == "failed"


def test_cancelled_trials_are_no_failures(engine: Engine) -> None:
    """As when a budget of seconds ends and is then raised."""
    study = builders.create(engine, budget={"trials": 100})
    builders.append(engine, study, FAIL_SOON.max_consecutive_failures)
    with transaction(engine) as session:
        studies.withdraw_waiting(session, study.study_id, "the time is up", "scheduler")
    builders.register(engine, "busy", 1)
    Conductor(engine, FAIL_SOON, study.study_id).round()
    assert "waiting" in builders.states(engine, study)


def test_a_few_fatal_trials_that_had_to_wait_for_all_others_end_no_study(engine: Engine) -> None:
    study = builders.create(engine, budget={"trials": 8})
    for _ in range(4):
        suspects(engine, study, 1)
        builders.append(engine, study, 1)
        builders.complete(engine, lease_one(engine, study, alone=False))
    conductor = Conductor(engine, FAIL_SOON, study.study_id)
    for _ in range(4):
        lease_one(engine, study, alone=True)
        builders.expire(engine, study, SETTINGS.max_attempts)
        conductor.round()
    assert builders.states(engine, study) == ["failed", "complete"] * 4
    assert builders.study_state(engine, study) == "completed"


AT_ONCE = SETTINGS.model_copy(update={"poll_seconds": 0.0})


@pytest.fixture
def called(engine: Engine, database_url: str) -> Iterator[Callable[[], set[int]]]:
    """Says of which studies all workers have heard since it was last asked."""
    with heard_on(engine, database_url, database.WORK) as so_far:
        yield so_far


def rounds(engine: Engine, study: Study, settings: Settings, count: int = 3) -> None:
    conductor = Conductor(engine, settings, study.study_id)
    for _ in range(count):
        conductor.round()


def test_a_trial_that_those_who_were_called_left_over_calls_everybody(
    engine: Engine, called: Callable[[], set[int]]
) -> None:
    study = builders.create(engine, budget={"trials": 1})
    builders.register(engine, "dead", 1)
    called()
    rounds(engine, study, AT_ONCE, 2)
    assert builders.states(engine, study) == ["waiting"]
    assert called() == set()  # but the one worker
    rounds(engine, study, NO_POLL)
    assert called() == set()
    rounds(engine, study, AT_ONCE)
    assert called() == {study.study_id}


def test_a_trial_that_waits_for_an_empty_lane_calls_nobody(
    engine: Engine, called: Callable[[], set[int]]
) -> None:
    """With a pruner, a worker whose lanes are full wants a lane nevertheless."""
    study = builders.create(engine, budget={"trials": 2})
    builders.append(engine, study, 2)
    builders.register(engine, "full", 1)
    builders.lease(engine, study, 1, "full")
    called()
    rounds(engine, study, AT_ONCE)
    assert called() == set()


def test_a_study_that_cannot_be_read_is_left_to_other_replicas_and_stops_no_other(
    engine: Engine, database_url: str
) -> None:
    """As one of a newer version."""
    unknown = builders.create(engine, "unknown", budget={"trials": 3})
    with engine.begin() as connection:
        newer = """UPDATE regtune.studies SET spec = spec || '{"newer": 1}'"""
        connection.execute(text(newer))
    with capture_logs() as logs, scheduler(engine, database_url), HandWorker(engine, "a", 2):
        wait_until(lambda: [e for e in logs if e["event"] == "study_unread"], DEADLINE_SECONDS)
        study = builders.create(engine, budget={"trials": 3})
        wait_until(over(engine, study), DEADLINE_SECONDS)
        assert builders.study_state(engine, study) == "completed"
        with engine.begin() as connection:
            connection.execute(text("UPDATE regtune.studies SET spec = spec - 'newer'"))
        with scheduler(engine, database_url):  # it can read it, and leads it beside the other one
            wait_until(over(engine, unknown), DEADLINE_SECONDS / 2)
    assert builders.study_state(engine, unknown) == "completed"


def test_a_pruner_may_have_noted_an_infinite_loss(engine: Engine, database_url: str) -> None:
    """Successive halving keeps one of each rung; who leads next reads it back."""
    study = builders.create(
        engine,
        training={"max_epochs": 9},
        pruner={"name": "asha", "first_epoch": 1},
        budget={"trials": 30},
    )

    def train(lease: Lease) -> tuple[list[float], Outcome | None]:
        return [inf, inf], Pruned("diverged")

    with HandWorker(engine, "a", 1, train):
        with scheduler(engine, database_url):
            wait_until(lambda: "pruned" in builders.states(engine, study), DEADLINE_SECONDS)
            wait_until(
                lambda: builders.column(
                    engine, "SELECT 1 FROM trial_system_attributes WHERE value_json = 'Infinity'"
                ),
                DEADLINE_SECONDS,
            )
        with scheduler(engine, database_url):
            wait_until(over(engine, study), DEADLINE_SECONDS)
    assert builders.states(engine, study) == ["pruned"] * 30


def test_what_nobody_has_foreseen_does_not_end_the_scheduler(
    engine: Engine, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = builders.create(engine, budget={"trials": 3})
    settle, faults = shares.settle, [RuntimeError("out of the blue")]

    def settle_or_raise(session: Session) -> None:
        if faults:
            raise faults.pop()
        settle(session)

    monkeypatch.setattr(shares, "settle", settle_or_raise)
    with scheduler(engine, database_url), HandWorker(engine, "a", 2):
        wait_until(over(engine, study), DEADLINE_SECONDS)
    assert not faults
    assert builders.study_state(engine, study) == "completed"


def run_one_by_one(engine: Engine, url: str, study: Study, rebuild: bool) -> list[Any]:
    """Conduct a study by hand, one trial at a time; return the parameters in order."""
    builders.register(engine, "one", 1)
    conductor = Conductor(engine, SETTINGS, study.study_id)
    for _ in range(study.budget_trials):
        if rebuild:
            conductor = Conductor(engine, SETTINGS, study.study_id)
        conductor.round()
        (lease,) = builders.lease(engine, study)
        losses, _ = bowl(lease)
        builders.complete(engine, [lease], losses[-1])
    conductor.round()
    assert builders.study_state(engine, study) == "completed"
    query = f"SELECT params FROM regtune.trials WHERE study_id = {study.study_id} ORDER BY number"
    return [params for (params,) in rows(engine, query)]


@pytest.mark.parametrize("sampler", ["tpe", "random", "qmc", "cmaes"])
def test_suggestions_depend_on_the_seed_and_on_results_not_on_the_replica(
    engine: Engine, database_url: str, sampler: str
) -> None:
    changes: dict[str, Any] = {"budget": {"trials": 12}}
    seeded = {"sampler": {"name": sampler, "seed": 3}}
    other = {"sampler": {"name": sampler, "seed": 4}}
    steady = run_one_by_one(
        engine, database_url, builders.create(engine, "a", **changes, **seeded), rebuild=False
    )
    rebuilt = run_one_by_one(
        engine, database_url, builders.create(engine, "b", **changes, **seeded), rebuild=True
    )
    reseeded = run_one_by_one(
        engine, database_url, builders.create(engine, "c", **changes, **other), rebuild=False
    )
    assert steady == rebuilt
    assert steady[2:] != reseeded[2:]
    assert len({str(params) for params in steady}) == 12


def test_the_grid_is_searched_whole_and_nothing_twice(engine: Engine, database_url: str) -> None:
    search = {
        "weight_decay": [0.0, 0.1],
        "dropout": [0.0, 0.2, 0.4],
        "l1_lambda": 0,
        "patience": {"low": 2, "high": 3},
    }
    study = builders.create(engine, search=search, sampler="grid", budget={"trials": 14})
    params = run_one_by_one(engine, database_url, study, rebuild=True)
    assert len({str(point) for point in params[2:]}) == 12


def test_gp_suggests_where_torch_is_installed(engine: Engine, database_url: str) -> None:
    study = builders.create(engine, sampler="gp", budget={"trials": 5})
    assert len(run_one_by_one(engine, database_url, study, rebuild=False)) == 5


@pytest.mark.parametrize(
    ("pruner", "settings"),
    [
        ("extrapolation", {}),
        ("median", {"startup_trials": 3}),
        ("asha", {}),
        ("hyperband", {}),
    ],
)
def test_a_pruner_stops_bad_trials_but_never_a_reference_point(
    engine: Engine, database_url: str, pruner: str, settings: dict[str, int]
) -> None:
    study = builders.create(
        engine,
        budget={"trials": 20},
        training={"max_epochs": 9},
        pruner={"name": pruner, "first_epoch": 2, **settings},
    )

    def slow(lease: Lease) -> tuple[list[float], None]:
        base = 10.0 * (1 if lease.number < 2 else lease.number)
        wait_until(lambda: lease.number < 2 or has_ended(engine, 0), DEADLINE_SECONDS)
        return [base + 1 / epoch for epoch in range(1, 200)], None

    with scheduler(engine, database_url), HandWorker(engine, "a", 2, slow):
        wait_until(over(engine, study), DEADLINE_SECONDS)
    reasons = rows(engine, "SELECT number, state, reason FROM regtune.trials ORDER BY number")
    pruned = [number for number, state, _ in reasons if state == "pruned"]
    assert pruned
    assert not {0, 1} & set(pruned)
    assert all(
        reason.startswith(f"pruned by {pruner} at epoch")
        for _, s, reason in reasons
        if s == "pruned"
    )
    assert audit(engine) == {}


def test_a_verdict_comes_back_with_the_flush_after_the_epoch_that_earned_it(
    engine: Engine, database_url: str
) -> None:
    study = builders.create(
        engine, budget={"trials": 4}, training={"max_epochs": 20}, pruner={"first_epoch": 5}
    )
    builders.register(engine, lanes=4)
    with scheduler(engine, database_url, NO_POLL):
        wait_until(lambda: len(builders.states(engine, study)) == 4, DEADLINE_SECONDS)
        leases = {lease.number: lease for lease in builders.lease(engine, study, 4)}
        losses = {leases[2].trial_id: 0.1, leases[3].trial_id: 1.0}

        def flush(number: int) -> Mapping[int, str]:
            epochs = {id_: [builders.epoch(number, loss)] for id_, loss in losses.items()}
            with transaction(engine) as session:
                return reporting.flush(session, [*leases.values()], epochs, 30).stop

        for number in range(1, 6):
            assert not flush(number)
        query = "SELECT stop_request FROM regtune.trials WHERE number = 3"
        wait_until(lambda: rows(engine, query) != [(None,)], DEADLINE_SECONDS)
        assert flush(6) == {leases[3].trial_id: "pruned by extrapolation at epoch 5"}


def has_ended(engine: Engine, number: int) -> bool:
    query = f"SELECT finished_at IS NOT NULL FROM regtune.trials WHERE number = {number}"
    return rows(engine, query) == [(True,)]


def test_a_study_whose_every_trial_fails_is_stopped_and_says_why(
    engine: Engine, database_url: str
) -> None:
    def crash(_: Lease) -> tuple[list[float], Outcome]:
        return [1.0], Failed("ValueError: no such column", "Traceback …")

    study = builders.create(engine, budget={"trials": 100})
    with scheduler(engine, database_url), HandWorker(engine, "a", 2, crash):
        wait_until(over(engine, study), DEADLINE_SECONDS)
    with transaction(engine) as session:
        ended = studies.by_id(session, study.study_id)
    assert ended.state == "failed"
    assert ended.reason is not None
    assert "4 trials failed in a row" in ended.reason
    assert "no such column" in ended.reason
    assert builders.states(engine, study).count("failed") < 20
    assert audit(engine) == {}


def test_a_small_study_whose_every_trial_fails_has_failed(
    engine: Engine, database_url: str
) -> None:
    def crash(_: Lease) -> tuple[list[float], Outcome]:
        return [1.0], Failed("ValueError: no such column", "Traceback …")

    study = builders.create(engine, budget={"trials": 2})
    with scheduler(engine, database_url), HandWorker(engine, "a", 2, crash):
        wait_until(over(engine, study), DEADLINE_SECONDS)
    with transaction(engine) as session:
        ended = studies.by_id(session, study.study_id)
    assert (ended.state, ended.reason) == (
        "failed",
        "every trial failed; the last one: ValueError: no such column",
    )


def test_diverged_trials_teach_the_sampler_and_do_not_fail_the_study(
    engine: Engine, database_url: str
) -> None:
    def diverge(lease: Lease) -> tuple[list[float], Outcome | None]:
        if lease.params["dropout"] > 0.3:
            return [1.0, float("nan")], Pruned("diverged")
        return bowl(lease)

    study = builders.create(engine, budget={"trials": 30})
    with scheduler(engine, database_url), HandWorker(engine, "a", 1, diverge):
        wait_until(over(engine, study), DEADLINE_SECONDS)
    assert builders.study_state(engine, study) == "completed"
    assert set(builders.states(engine, study)) == {"complete", "pruned"}
    assert audit(engine) == {}


def test_the_budgets_seconds_end_a_study(engine: Engine, database_url: str) -> None:
    study = builders.create(engine, budget={"seconds": 0.5})
    with scheduler(engine, database_url), HandWorker(engine, "a", 1):
        wait_until(over(engine, study), DEADLINE_SECONDS)
    with transaction(engine) as session:
        ended = studies.by_id(session, study.study_id)
    assert (ended.state, ended.reason) == ("completed", "the budget of 0.5 seconds is used up")
    assert 0 < ended.appended < 1000
    assert audit(engine) == {}


def test_a_stopped_study_ends_when_its_last_trial_has(engine: Engine, database_url: str) -> None:
    study = builders.create(engine)
    builders.append(engine, study, 3)
    running = builders.lease(engine, study)
    with transaction(engine) as session:
        studies.act(session, study.name, "stop", "test")
    with scheduler(engine, database_url):
        builders.complete(engine, running)
        wait_until(over(engine, study), DEADLINE_SECONDS)
    assert builders.study_state(engine, study) == "stopped"
    assert builders.states(engine, study) == ["complete", "cancelled", "cancelled"]
    assert audit(engine) == {}


def test_a_lost_worker_is_replaced_under_the_same_numbers(
    engine: Engine, database_url: str
) -> None:
    study = builders.create(engine, budget={"trials": 6})
    builders.append(engine, study, 2)
    with transaction(engine) as session:
        leasing.lease(session, study.study_id, "gone", 2, 2)
    with scheduler(engine, database_url, NO_POLL), HandWorker(engine, "a", 2):
        wait_until(over(engine, study), DEADLINE_SECONDS)
    attempts = rows(engine, "SELECT attempt, lost_leases FROM regtune.trials ORDER BY number")
    assert attempts == [(2, 1)] * 2 + [(1, 0)] * 4
    assert audit(engine) == {}


def test_the_scheduler_rides_out_a_cut_connection(engine: Engine, database_url: str) -> None:
    study = builders.create(engine, budget={"trials": 40})
    own = database.connect(database_url)
    with scheduler(own, database_url), HandWorker(engine, "a", 2):
        wait_until(lambda: "complete" in builders.states(engine, study), DEADLINE_SECONDS)
        with engine.begin() as connection:
            connection.execute(
                text(
                    "SELECT pg_terminate_backend(pid) FROM pg_locks"
                    " WHERE locktype = 'advisory' AND database ="
                    " (SELECT oid FROM pg_database WHERE datname = current_database())"
                )
            )
        wait_until(over(engine, study), DEADLINE_SECONDS)
    own.dispose()
    assert builders.states(engine, study) == ["complete"] * 40
    assert audit(engine) == {}


def test_a_study_that_the_sampler_cannot_handle_fails_alone(
    engine: Engine, database_url: str
) -> None:
    good = builders.create(engine, "good", budget={"trials": 5})
    bad = builders.create(engine, "bad", budget={"trials": 5})
    builders.append(engine, bad, 1)
    builders.complete(engine, builders.lease(engine, bad))
    with engine.begin() as connection:
        connection.execute(text("DELETE FROM public.trial_values"))  # complete, and yet without one
    with scheduler(engine, database_url), HandWorker(engine, "a", 2):
        wait_until(over(engine, good), DEADLINE_SECONDS)
        wait_until(over(engine, bad), DEADLINE_SECONDS)
    assert builders.study_state(engine, good) == "completed"
    assert builders.study_state(engine, bad) == "failed"


def test_two_conductors_of_one_study_never_append_the_same_number(
    engine: Engine, database_url: str
) -> None:
    study = builders.create(engine, budget={"trials": 30})
    with HandWorker(engine, "a", 3):
        rivals = [Conductor(engine, SETTINGS, study.study_id) for _ in range(2)]

        def conduct(index: int) -> int:
            stale = 0
            while not over(engine, study)():
                try:
                    rivals[index].round()
                except StaleView:
                    stale += 1
                    rivals[index] = Conductor(engine, SETTINGS, study.study_id)
            return stale

        with ThreadPoolExecutor(2) as pool:
            assert sum(pool.map(conduct, range(2))) > 0
    assert builders.states(engine, study) == ["complete"] * 30
    assert audit(engine) == {}


def test_the_budget_of_trial_epochs_is_never_exceeded_and_used_up(
    engine: Engine, database_url: str
) -> None:
    """Trials that stop early make room for more; one that might not fit is not begun."""
    study = builders.create(
        engine, training={"max_epochs": 10}, budget={"trial_epochs": 200}, search={"patience": 2}
    )

    def stops_early(lease: Lease) -> tuple[list[float], None]:
        return [1 / epoch for epoch in range(1, 3 + 3 * lease.number % 8)], None

    with (
        scheduler(engine, database_url),
        HandWorker(engine, "a", 5, stops_early),
        HandWorker(engine, "b", 3, stops_early),
    ):
        wait_until(over(engine, study), DEADLINE_SECONDS)
    assert builders.study_state(engine, study) == "completed"
    ((epochs, trials),) = rows(engine, "SELECT sum(epochs), count(*) FROM regtune.trials")
    assert 190 < epochs <= 200
    assert trials > 20
    ((reason,),) = rows(engine, "SELECT reason FROM regtune.studies")
    assert reason.startswith("of the budget of 200 trial-epochs less is left than the 10")
    assert audit(engine) == {}


def test_a_live_study_gets_more_trials_and_fewer(engine: Engine, database_url: str) -> None:
    more = builders.create(engine, "more", budget={"trials": 5})
    fewer = builders.create(engine, "fewer", budget={"trials": 100_000})
    change_budget(engine, "more", trials=30)
    with scheduler(engine, database_url), HandWorker(engine, "a", 5):
        wait_until(lambda: len(builders.states(engine, fewer)) > 20, DEADLINE_SECONDS)
        while True:
            try:
                change_budget(engine, "fewer", trials=len(builders.states(engine, fewer)))
                break
            except BudgetSpent:  # another one was appended meanwhile
                continue
        wait_until(over(engine, fewer), DEADLINE_SECONDS)
        wait_until(over(engine, more), DEADLINE_SECONDS)
    assert builders.states(engine, more) == ["complete"] * 30
    assert 20 < len(builders.states(engine, fewer)) < 100_000
    assert {builders.study_state(engine, study) for study in (more, fewer)} == {"completed"}
    assert audit(engine) == {}


def change_budget(engine: Engine, name: str, **budget: Any) -> None:
    with transaction(engine) as session:
        studies.change(session, name, parse_change({"budget": budget}), "test")
