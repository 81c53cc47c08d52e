from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from regtune import leasing, reporting, studies
from regtune.database import transaction
from regtune.errors import StaleView
from regtune.spec import NO_SHAPE, STRENGTHS
from regtune.studies import Study
from tests import builders
from tests.audit import audit
from tests.locking import wait_for_waiters

LATER = datetime.now(UTC) + timedelta(hours=1)


def test_the_budget_is_exact_however_many_are_suggested(engine: Engine) -> None:
    study = builders.create(engine, budget={"trials": 5})
    assert len(builders.append(engine, study, 3)) == 3
    assert len(builders.append(engine, study, 3)) == 2
    assert builders.append(engine, study, 3) == []
    assert builders.states(engine, study) == ["waiting"] * 5
    assert audit(engine) == {}


def test_the_database_itself_refuses_a_trial_over_the_budget(engine: Engine) -> None:
    study = builders.create(engine, budget={"trials": 1})
    with engine.connect() as connection, pytest.raises(IntegrityError, match="within_budget"):
        connection.execute(text("UPDATE regtune.studies SET appended = 2"))
    assert builders.append(engine, study, 2)[1:] == []


def test_of_two_schedulers_that_append_the_same_number_one_is_told_so(engine: Engine) -> None:
    study = builders.create(engine, budget={"trials": 50})

    def append(_: int) -> int:
        with transaction(engine) as session:
            suggestions = [builders.suggestion(study)] * 3
            return len(leasing.append(session, study.study_id, suggestions, expected=0))

    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(append, i) for i in range(8)]
    outcomes = [type(future.exception()) for future in futures]
    assert sorted(outcome.__name__ for outcome in outcomes) == ["NoneType"] + ["StaleView"] * 7
    assert audit(engine) == {}
    with pytest.raises(StaleView, match="trial 0"):
        append(0)


def test_no_trial_is_leased_twice_by_many_workers_at_once(engine: Engine) -> None:
    study = builders.create(engine, budget={"trials": 60})
    builders.append(engine, study, 60)
    with ThreadPoolExecutor(12) as pool:
        batches = list(pool.map(lambda i: builders.lease(engine, study, 7, f"w{i}"), range(12)))
    leased = [lease.number for batch in batches for lease in batch]
    assert sorted(leased) == sorted(set(leased))
    rest = builders.lease(engine, study, 60)
    assert sorted(leased + [lease.number for lease in rest]) == list(range(60))
    assert audit(engine) == {}


def test_a_lease_names_the_trial_and_the_values_to_train(engine: Engine) -> None:
    study = builders.create(engine, search={"dropout": [0.1, 0.3], "patience": 4})
    builders.append(engine, study, 3)
    leases = builders.lease(engine, study, 2)
    assert [lease.number for lease in leases] == [0, 1]
    assert leases[0].attempt == 1
    assert set(leases[0].params) == set(STRENGTHS)
    assert leases[0].params["patience"] == 4


def test_a_lost_lease_makes_the_same_trial_leasable_again(engine: Engine) -> None:
    study = builders.create(engine)
    builders.append(engine, study, 1)
    (lost,) = builders.lease(engine, study, worker="gone")
    with transaction(engine) as session:
        assert leasing.expire(session, study.study_id, max_attempts=3) == []
        assert leasing.expire(session, study.study_id, 3, now=LATER) == [lost.trial_id]
    (again,) = builders.lease(engine, study, worker="next")
    assert (again.number, again.attempt) == (0, 2)
    assert again.token != lost.token
    assert audit(engine) == {}


def test_a_trial_that_loses_too_many_leases_fails_and_says_why(engine: Engine) -> None:
    study = builders.create(engine)
    builders.append(engine, study, 1)
    for _ in range(3):
        assert builders.states(engine, study) == ["waiting"]
        builders.lease(engine, study)
        with transaction(engine) as session:
            leasing.expire(session, study.study_id, max_attempts=3, now=LATER)
    assert builders.states(engine, study) == ["failed"]
    with engine.connect() as connection:
        reason = connection.execute(text("SELECT reason FROM regtune.trials")).scalar()
    assert reason == "lost 3 leases; the last one: its lease ran out"
    assert audit(engine) == {}


def test_a_released_trial_waits_again_at_no_cost(engine: Engine) -> None:
    study = builders.create(engine)
    builders.append(engine, study, 2)
    for _ in range(5):
        leases = builders.lease(engine, study, 2)
        with transaction(engine) as session:
            assert len(leasing.release(session, leases, "w")) == 2
            assert leasing.release(session, leases, "w") == []
    with engine.connect() as connection:
        assert connection.execute(text("SELECT max(lost_leases) FROM regtune.trials")).scalar() == 0
    assert builders.states(engine, study) == ["waiting"] * 2


@pytest.mark.parametrize("verb", ["pause", "stop", "cancel"])
def test_nothing_is_leased_or_appended_in_a_study_that_does_not_go_on(
    engine: Engine, verb: studies.Verb
) -> None:
    study = builders.create(engine)
    builders.append(engine, study, 2)
    with transaction(engine) as session:
        studies.act(session, study.name, verb, "test")
    assert builders.lease(engine, study, 2) == []
    assert builders.append(engine, study, 1) == []


def test_a_trial_given_back_to_a_stopping_study_is_cancelled(engine: Engine) -> None:
    study = builders.create(engine)
    builders.append(engine, study, 2)
    released, lost = builders.lease(engine, study, 2)
    with transaction(engine) as session:
        studies.act(session, study.name, "stop", "test")
        leasing.release(session, [released], "w")
        assert leasing.expire(session, study.study_id, 3, now=LATER) == [lost.trial_id]
    assert builders.states(engine, study) == ["cancelled"] * 2


def test_who_holds_trials_does_not_wait_for_their_study(engine: Engine) -> None:
    """Whoever cancels it holds it, and waits for the trials: that would be a ring."""
    study = builders.create(engine)
    builders.append(engine, study, 2)
    (held,) = builders.lease(engine, study)
    builders.register(engine, lanes=2)

    def cancel() -> None:
        with transaction(engine) as session:
            studies.act(session, study.name, "cancel", "test")

    with ThreadPoolExecutor(1) as pool:
        with transaction(engine) as session:
            reporting.flush(session, [held], {}, 30)
            cancelled = pool.submit(cancel)
            wait_for_waiters(engine)
            taken = taken_in(session, study, 1, waits=False)
            assert (taken.leases, taken.busy) == ([], True)
        cancelled.result()
    assert builders.states(engine, study) == ["cancelled"] * 2


def test_stops_are_asked_for_in_the_order_of_the_trials(engine: Engine) -> None:
    """As a worker's report locks them, whatever order the verdicts come in."""
    study = builders.create(engine)
    builders.append(engine, study, 2)
    first, second = builders.lease(engine, study, 2)
    verdicts = {second.trial_id: (1, "bad"), first.trial_id: (1, "bad")}

    def judge() -> None:
        with transaction(engine) as session:
            reporting.request_stop(session, verdicts)

    with ThreadPoolExecutor(1) as pool:
        with transaction(engine) as session:
            reporting.flush(session, [first], {}, 30)
            judged = pool.submit(judge)
            wait_for_waiters(engine)
            assert reporting.flush(session, [second], {}, 30).held == {second.trial_id}
        judged.result()
    with transaction(engine) as session:
        assert set(reporting.flush(session, [first, second], {}, 30).stop) == set(verdicts)


def test_suspects_are_leased_apart(engine: Engine) -> None:
    study = builders.create(engine)
    builders.append(engine, study, 3)
    for _ in range(2):
        with transaction(engine) as session:
            leasing.lease(session, study.study_id, "w", 1, 30)
            leasing.expire(session, study.study_id, max_attempts=3, now=LATER)

    def numbers(**options: Any) -> list[int]:
        with transaction(engine) as session:
            leases = leasing.lease(session, study.study_id, "w", 9, 30, **options)
        assert all(lease.lost_leases == (2 if lease.number == 0 else 0) for lease in leases)
        return [lease.number for lease in leases]

    assert numbers(suspect_from=2) == [1, 2]
    assert numbers(suspect_from=2) == []
    assert numbers(suspect_from=2, alone=True) == [0]


def take(engine: Engine, study: Study, count: int) -> leasing.Taken:
    with transaction(engine) as session:
        return taken_in(session, study, count)


def taken_in(session: Session, study: Study, count: int, *, waits: bool = True) -> leasing.Taken:
    return leasing.take(
        session,
        study.study_id,
        "w",
        count,
        30,
        shape=NO_SHAPE,
        slots=4,
        suspect_from=2,
        alone=False,
        stay_seconds=0,
        waits=waits,
    )


def test_a_worker_takes_what_waits_and_hears_whether_more_is_to_come(engine: Engine) -> None:
    study = builders.create(engine, budget={"trials": 3})
    builders.register(engine)
    builders.append(engine, study, 2)
    first, second, third = (take(engine, study, 1) for _ in range(3))
    assert [lease.number for taken in (first, second) for lease in taken.leases] == [0, 1]
    assert (first.turn, second.turn, third.turn) == (study.study_id, study.study_id, None)
    assert third == leasing.Taken(None, [], more_to_come=True)  # the budget has one more
    builders.append(engine, study, 1)
    last = take(engine, study, 4)
    assert [lease.number for lease in last.leases] == [2]
    assert not last.more_to_come


def test_a_worker_takes_nothing_when_it_is_the_turn_of_another_study(engine: Engine) -> None:
    mine, other = (builders.create(engine, name) for name in ("mine", "other"))
    builders.register(engine)
    builders.append(engine, mine, 3)
    builders.append(engine, other, 1)
    with engine.begin() as connection:
        connection.execute(
            text("UPDATE regtune.shares SET virtual_seconds = 9 WHERE study_id = :study_id"),
            {"study_id": mine.study_id},
        )
    taken = take(engine, mine, 1)
    assert taken == leasing.Taken(other.study_id, [], more_to_come=True)
    assert builders.states(engine, mine) == ["waiting"] * 3


def test_nothing_is_taken_of_a_study_that_is_paused_or_gone(engine: Engine) -> None:
    study = builders.create(engine)
    builders.register(engine)
    builders.append(engine, study, 1)
    with transaction(engine) as session:
        studies.act(session, study.name, "pause", "test")
    assert take(engine, study, 1) == leasing.Taken(None, [], more_to_come=False)
    with transaction(engine) as session:
        studies.act(session, study.name, "cancel", "test")
        studies.delete(session, study.name, "test")
    assert take(engine, study, 1) == leasing.Taken(None, [], more_to_come=False)
