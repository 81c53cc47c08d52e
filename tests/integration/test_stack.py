"""One stack and its meetings, step by step, on a real database."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from sqlalchemy import Engine
from sqlalchemy.orm import Session
from structlog.testing import capture_logs

from regtune import studies
from regtune.database import transaction
from regtune.leasing import Lease
from regtune.settings import Settings
from regtune.spec import NO_SHAPE
from regtune.studies import ModelFacts, Study
from tests import builders
from tests.audit import audit
from tests.locking import locked, wait_for_waiters
from tests.outage import out_of_service
from tests.threads import working
from tests.waiting import wait_until
from worker.loop import Worker
from worker.shutdown import Interrupted
from worker.stack import Stack
from worker.training.epoch import Epochs
from worker.training.lanes import LaneEpoch

SHORT = {"training": {"max_epochs": 4, "batch_size": 256}, "pruner": "none"}

BuildStack = Callable[..., Stack]


@pytest.fixture
def build(engine: Engine, database_url: str, tmp_path: Path) -> Iterator[BuildStack]:
    """Builds stacks of a worker's that does nothing else."""
    stacks = []

    def build(study: Study, lanes: int = 4, leases: Sequence[Lease] = ()) -> Stack:
        builders.register(engine, "w", lanes)
        settings = Settings(data_dir=tmp_path, lanes=lanes, flush_seconds=0)
        worker = Worker(database_url, settings, torch.device("cpu"), "w")
        stack = worker._build_stack(study, NO_SHAPE, leases)
        assert stack is not None
        stacks.append(stack)
        return stack

    yield build
    for stack in stacks:
        stack.close()


def begun(engine: Engine, build: BuildStack, trials: int = 4, waiting: int = 0) -> Stack:
    """A stack in which so many trials have trained an epoch."""
    study = builders.create(engine, budget={"trials": trials + waiting}, **SHORT)
    builders.append(engine, study, trials)
    stack = build(study)
    wait_until(stack.meet)
    stack.train_epoch(lambda: None)
    wait_until(stack.meet)
    builders.append(engine, study, waiting)
    return stack


EPOCHS = "SELECT epochs FROM regtune.trials ORDER BY number"


def test_a_locked_study_keeps_no_epoch_from_being_recorded(
    engine: Engine, build: BuildStack
) -> None:
    """Whoever cancels it would wait for the worker's trials, and the worker for the study."""
    stack = begun(engine, build, trials=2, waiting=2)
    stack.train_epoch(lambda: None)
    with locked(engine, stack.study):
        assert not stack.meet()
        wait_for_waiters(engine)
        assert builders.column(engine, EPOCHS) == [2, 2, 0, 0]
    wait_until(stack.meet)
    assert builders.states(engine, stack.study) == ["running"] * 4


def test_what_is_leased_while_the_worker_leaves_is_given_back(
    engine: Engine, build: BuildStack
) -> None:
    study = builders.create(engine, budget={"trials": 3}, **SHORT)
    builders.append(engine, study, 3)
    stack = build(study)
    with ThreadPoolExecutor(1) as pool:
        with locked(engine, study):
            assert not stack.meet()
            wait_for_waiters(engine)
            leaving = pool.submit(stack.release)
            wait_until(stack._meetings._closing.is_set)
        leaving.result()
    assert builders.states(engine, study) == ["waiting"] * 3
    assert builders.column(engine, "SELECT lost_leases FROM regtune.trials") == [0] * 3
    assert audit(engine) == {}


def test_a_database_that_goes_away_as_a_study_has_been_built_costs_no_build(
    engine: Engine, build: BuildStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = builders.create(engine, budget={"trials": 1}, **SHORT)
    builders.append(engine, study, 1)
    describe, outages = studies.describe_model, iter([out_of_service(engine)])

    def describe_in_an_outage(session: Session, study_id: int, facts: ModelFacts) -> None:
        with next(outages, nullcontext()):
            describe(session, study_id, facts)

    monkeypatch.setattr(studies, "describe_model", describe_in_an_outage)
    stack = build(study, leases=builders.lease(engine, study))
    monkeypatch.undo()
    assert next(outages, None) is None
    with transaction(engine) as session:
        assert studies.by_id(session, study.study_id).model is not None
    wait_until(stack.meet)
    assert stack.training


def test_a_trial_that_is_lost_while_its_study_is_built_for_it_may_come_again(
    engine: Engine, build: BuildStack
) -> None:
    study = builders.create(engine, budget={"trials": 2}, **SHORT)
    builders.append(engine, study, 2)
    stack = build(study, leases=builders.lease(engine, study))
    builders.expire(engine, study)
    wait_until(stack.meet)
    assert builders.states(engine, study) == ["running"] * 2
    stack.train_epoch(lambda: None)
    wait_until(stack.meet)
    assert builders.column(engine, EPOCHS) == [1, 1]
    assert builders.column(engine, "SELECT attempt FROM regtune.trials ORDER BY number") == [2, 1]


@pytest.mark.parametrize("how", ["all", "some"])
def test_who_gives_trials_back_locks_the_study_first(
    engine: Engine, build: BuildStack, how: str
) -> None:
    """Whoever holds the study, to cancel it, waits for none of the trials."""
    stack = begun(engine, build)
    with capture_logs() as logs, ThreadPoolExecutor(1) as pool:
        with locked(engine, stack.study) as session:
            if how == "all":
                giving = pool.submit(stack.release)
            else:
                stack._take_fewer_lanes()
                giving = pool.submit(stack.meet)
            wait_for_waiters(engine)
            studies.cancel_open(session, stack.study.study_id, "cancelled", "test")
        giving.result()
    assert builders.states(engine, stack.study) == ["cancelled"] * 4
    assert [log["error"] for log in logs if log["event"] == "meeting_failed"] == []


def test_trials_for_which_there_are_no_slots_any_more_are_given_back(
    engine: Engine, build: BuildStack
) -> None:
    stack = begun(engine, build, trials=2, waiting=2)
    with locked(engine, stack.study):
        assert not stack.meet()
        wait_for_waiters(engine)
        stack._take_fewer_lanes()
    wait_until(stack.meet)
    wait_until(stack.meet)
    assert builders.states(engine, stack.study) == ["running"] + ["waiting"] * 3
    assert audit(engine) == {}


def test_a_stop_in_an_epoch_that_is_trained_apart_takes_all_lanes_back_to_its_beginning(
    engine: Engine, build: BuildStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A half that was through with it would be an epoch ahead of what is on record of it."""
    stack = begun(engine, build)
    train = stack._engine.train_epoch
    faults = iter([ValueError("who was it?"), None, Interrupted()])

    def train_or_raise(tick: Callable[[], None], *, trying: bool) -> list[LaneEpoch]:
        if (fault := next(faults)) is not None:
            raise fault
        return train(tick, trying=trying)

    monkeypatch.setattr(stack._engine, "train_epoch", train_or_raise)
    with pytest.raises(Interrupted):
        stack.train_epoch(lambda: None)
    left = stack._engine.checkpoint(stack._engine.lanes)
    assert [checkpoint.state["epoch"] for checkpoint in left] == [1] * 4


def test_a_trial_that_was_left_before_its_test_is_tested_and_not_trained(
    engine: Engine,
    build: BuildStack,
    database_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stack = begun(engine, build, trials=2)
    test, tests = Epochs.test, []

    def stop() -> None:
        raise Interrupted

    def note_and_test(self: Epochs, *arguments: Any) -> Any:
        tests.append(arguments)
        return test(self, *arguments)

    monkeypatch.setattr(Epochs, "test", note_and_test)
    stack.train_epoch(lambda: None)
    stack.train_epoch(lambda: None)
    with pytest.raises(Interrupted):
        stack.train_epoch(lambda: stop() if tests else None)
    stack.release()
    assert builders.states(engine, stack.study) == ["waiting"] * 2
    assert builders.column(engine, EPOCHS) == [4, 4]
    with working(database_url, Settings(data_dir=tmp_path, lanes=4, poll_seconds=0.1), "heir"):
        wait_until(lambda: builders.states(engine, stack.study) == ["complete"] * 2, 60)
    assert builders.column(engine, "SELECT max(epoch) FROM regtune.epochs") == [4]
    assert builders.column(engine, "SELECT count(*) FROM regtune.trials WHERE test_loss > 0") == [2]
    assert audit(engine) == {}


def test_a_long_test_of_a_trial_takes_steps(engine: Engine, build: BuildStack) -> None:
    """Else its worker would pass for one that hangs."""
    stack = begun(engine, build, trials=1)
    steps = []
    for _ in range(3):
        steps.append(0)

        def step() -> None:
            steps[-1] += 1

        stack.train_epoch(step)
    trained, again, tested = steps
    assert trained == again < tested
