import threading

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from regtune import database, events
from regtune.database import transaction
from tests import builders


def kinds(engine: Engine, study_id: int, after: str = events.START) -> list[str]:
    with transaction(engine) as session:
        return [event.kind for event in events.read(session, study_id, after)]


def test_a_study_tells_its_story(engine: Engine) -> None:
    study = builders.create(engine)
    builders.append(engine, study, 1)
    builders.complete(engine, builders.lease(engine, study))
    assert kinds(engine, study.study_id) == [
        "study_created",
        "trial_appended",
        "trial_started",
        "trial_complete",
    ]


def test_reading_goes_on_from_a_cursor(engine: Engine) -> None:
    study = builders.create(engine)
    builders.append(engine, study, 3)
    with transaction(engine) as session:
        _, second, *rest = events.read(session, study.study_id, events.START)
        assert len(rest) == 2
        assert events.read(session, study.study_id, second.cursor) == rest
        assert events.read(session, study.study_id, rest[-1].cursor) == []


def test_an_event_that_commits_late_is_not_missed(engine: Engine) -> None:
    study = builders.create(engine)
    with Session(engine) as late:
        events.record(late, study.study_id, "late", "test")
        with transaction(engine) as session:
            events.record(session, study.study_id, "early", "test")
        seen = kinds(engine, study.study_id)
        with transaction(engine) as session:
            read = events.read(session, study.study_id, events.START)
        late.commit()
    rest = kinds(engine, study.study_id, read[-1].cursor)
    assert sorted(seen + rest) == ["early", "late", "study_created"]


@pytest.mark.parametrize("cursor", ["", "1", "a-b", "1-", "-1-2", "1--2", f"{2**63}-1"])
def test_what_is_no_cursor_is_refused(cursor: str) -> None:
    with pytest.raises(ValueError, match=r"invalid literal|not a cursor"):
        events.parse_cursor(cursor)


def test_a_listener_hears_of_a_study_once_its_change_is_committed(
    engine: Engine, database_url: str
) -> None:
    heard: list[set[int]] = []
    with database.Listener(database_url, database.NEWS) as listener:
        listener.wait(0)
        thread = threading.Thread(target=lambda: heard.append(listener.wait(30)))
        thread.start()
        study = builders.create(engine)
        thread.join()
    assert heard == [{study.study_id}]


def test_a_storm_wakes_a_listener_few_times(engine: Engine, database_url: str) -> None:
    with database.Listener(database_url, database.NEWS) as listener:
        listener.wait(0)
        stormed = {builders.create(engine, f"study-{i}").study_id for i in range(20)}
        heard = [listener.wait(30)]
        while set().union(*heard) != stormed:
            heard.append(listener.wait(30))
    assert len(heard) < 10


def test_a_listener_does_not_mind_what_others_say(engine: Engine, database_url: str) -> None:
    with database.Listener(database_url, database.NEWS) as listener:
        listener.wait(0)
        with engine.begin() as connection:
            connection.execute(text(f"NOTIFY {database.NEWS}, 'hello'"))
        study = builders.create(engine)
        heard = listener.wait(30) | listener.wait(1)
    assert heard == {study.study_id}


def test_a_listener_hears_again_after_its_connection_was_cut(
    engine: Engine, database_url: str
) -> None:
    with database.Listener(database_url, database.NEWS) as listener:
        listener.wait(0)
        with engine.begin() as connection:
            connection.execute(
                text(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE application_name = 'regtune-service-listen'"
                    " AND datname = current_database()"
                )
            )
        assert listener.wait(0.1) == set()
        listener.wait(0)
        study = builders.create(engine)
        assert listener.wait(30) == {study.study_id}
