from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import Engine, text

from regtune import leasing, studies
from regtune.database import transaction
from regtune.errors import NotFound, StudyActive, StudyDiffers, StudyOver
from regtune.leasing import Lease
from regtune.studies import Verb
from tests import builders
from tests.audit import audit


def act(engine: Engine, verb: Verb) -> str:
    with transaction(engine) as session:
        return studies.act(session, "study", verb, "test").state


def test_the_same_spec_again_is_the_same_study(engine: Engine) -> None:
    first = builders.create(engine)
    with transaction(engine) as session:
        again, is_new = studies.create(session, builders.spec(), "test")
    assert (again, is_new) == (first, False)


def test_another_spec_under_the_same_name_is_refused(engine: Engine) -> None:
    builders.create(engine)
    with pytest.raises(StudyDiffers, match="another spec"), transaction(engine) as session:
        studies.create(session, builders.spec(priority=7), "test")


def test_a_study_of_optunas_own_is_never_taken_over(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO public.studies (study_name) VALUES ('study')"))
    with pytest.raises(StudyDiffers, match="not regtune's"), transaction(engine) as session:
        studies.create(session, builders.spec(), "test")


def test_many_clients_creating_one_study_at_once_all_get_it(engine: Engine) -> None:
    def create(_: int) -> tuple[int, bool]:
        with transaction(engine) as session:
            study, is_new = studies.create(session, builders.spec(), "test")
            return study.study_id, is_new

    with ThreadPoolExecutor(10) as pool:
        outcomes = list(pool.map(create, range(10)))
    assert len({study_id for study_id, _ in outcomes}) == 1
    assert sum(is_new for _, is_new in outcomes) == 1


@pytest.mark.parametrize(
    ("verbs", "state"),
    [
        (["pause"], "paused"),
        (["pause", "pause"], "paused"),
        (["pause", "resume"], "active"),
        (["resume"], "active"),
        (["stop"], "stopping"),
        (["stop", "stop"], "stopping"),
        (["pause", "stop"], "stopping"),
        (["stop", "cancel"], "cancelled"),
        (["cancel", "cancel"], "cancelled"),
        (["pause", "cancel"], "cancelled"),
    ],
)
def test_verbs_may_be_repeated_and_follow_each_other(
    engine: Engine, verbs: list[Verb], state: str
) -> None:
    study = builders.create(engine)
    builders.append(engine, study, 2)
    builders.lease(engine, study)
    assert [act(engine, verb) for verb in verbs][-1] == state
    assert builders.study_state(engine, study) == state


@pytest.mark.parametrize(
    ("verbs", "late"),
    [
        (["stop"], "pause"),
        (["stop"], "resume"),
        (["cancel"], "pause"),
        (["cancel"], "resume"),
        (["cancel"], "stop"),
    ],
)
def test_what_comes_too_late_is_refused(engine: Engine, verbs: list[Verb], late: Verb) -> None:
    study = builders.create(engine)
    builders.append(engine, study, 1)
    builders.lease(engine, study)
    for verb in verbs:
        act(engine, verb)
    with pytest.raises(StudyOver, match=f"{late} comes too late"):
        act(engine, late)


def test_stop_lets_running_trials_finish_and_starts_no_more(engine: Engine) -> None:
    study = builders.create(engine)
    builders.append(engine, study, 3)
    running = builders.lease(engine, study)
    assert act(engine, "stop") == "stopping"
    assert builders.states(engine, study) == ["running", "cancelled", "cancelled"]
    assert builders.complete(engine, running) == {running[0].trial_id}


def test_stop_ends_a_study_that_runs_nothing_at_once(engine: Engine) -> None:
    study = builders.create(engine)
    builders.append(engine, study, 2)
    assert act(engine, "stop") == "stopped"
    assert act(engine, "stop") == "stopped"
    assert audit(engine) == {}


def test_cancel_takes_running_trials_from_their_workers_at_once(engine: Engine) -> None:
    study = builders.create(engine)
    builders.append(engine, study, 3)
    running = builders.lease(engine, study, 2)
    assert act(engine, "cancel") == "cancelled"
    assert builders.states(engine, study) == ["cancelled"] * 3
    assert builders.complete(engine, running) == frozenset()
    assert audit(engine) == {}


def test_only_a_study_that_is_over_can_be_deleted(engine: Engine) -> None:
    study = builders.create(engine)
    builders.append(engine, study, 2)
    builders.complete(engine, builders.lease(engine, study))
    for state in ("active", "paused"):
        with pytest.raises(StudyActive, match=state), transaction(engine) as session:
            studies.delete(session, "study", "test")
        if state == "active":
            act(engine, "pause")
    act(engine, "cancel")
    with transaction(engine) as session:
        studies.delete(session, "study", "test")
    with engine.connect() as connection:
        for schema, table in connection.execute(
            text(
                "SELECT schemaname, tablename FROM pg_tables WHERE schemaname IN"
                " ('public', 'regtune') AND tablename NOT LIKE '%version%'"
            )
        ).all():
            rows = connection.execute(text(f"SELECT count(*) FROM {schema}.{table}")).scalar()
            # Who did what to it stays: created, paused, cancelled, ended, deleted.
            left = 5 if table == "events" else 0
            assert rows == left, f"{schema}.{table}"
    with pytest.raises(NotFound), transaction(engine) as session:
        studies.find(session, "study")


def test_stopping_and_giving_back_at_once_leaves_no_trial_behind(engine: Engine) -> None:
    for i in range(10):
        study = builders.create(engine, f"study-{i}")
        builders.append(engine, study, 4)
        leases = builders.lease(engine, study, 4)

        def give_back(leases: Sequence[Lease] = leases) -> None:
            with transaction(engine) as session:
                leasing.release(session, leases, "w")

        def stop(name: str = study.name) -> None:
            with transaction(engine) as session:
                studies.act(session, name, "stop", "test")

        with ThreadPoolExecutor(2) as pool:
            for future in [pool.submit(give_back), pool.submit(stop)]:
                future.result()
        assert builders.states(engine, study) == ["cancelled"] * 4
