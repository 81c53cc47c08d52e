"""Connections of a pool, and whom a notification is meant for."""

import socket
from select import select

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import DBAPIError

from regtune import database, workers
from regtune.database import transaction
from service.scheduler.leadership import Leadership
from tests import builders
from tests.waiting import wait_until

LAST = 77


def of_worker(url: str, name: str) -> database.Listener:
    """What a worker of this name listens with."""
    return database.Listener(url, database.WORK, database.work_for(name), program="worker")


def notify(engine: Engine, payload: str, channel: str = database.WORK) -> None:
    with engine.begin() as connection:
        connection.execute(text(f"NOTIFY {channel}, '{payload}'"))


def all_that_comes(listener: database.Listener, engine: Engine) -> set[int]:
    """What a listener hears of all that was sent until now."""
    notify(engine, str(LAST))
    heard: set[int] = set()
    while LAST not in heard:
        heard |= listener.wait(30)
    return heard - {LAST}


def test_a_connection_that_was_cut_is_replaced_unseen(database_url: str, engine: Engine) -> None:
    tried = database.connect(database_url, program="tried")
    with tried.connect() as connection:
        connection.execute(text("SELECT 1"))
    with engine.connect() as connection:
        connection.execute(
            text(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE application_name = 'regtune-tried' AND datname = current_database()"
            )
        )
    with tried.connect() as connection:
        assert connection.execute(text("SELECT 1")).scalar() == 1
    tried.dispose()


@pytest.mark.parametrize(("turns", "woken"), [(1, 3), (2, 2), (16, 1)])
def test_new_trials_wake_those_who_want_some_and_no_others(
    database_url: str, engine: Engine, turns: int, woken: int
) -> None:
    """One that is needed, and two more, or as many as get through so many; nobody trains."""
    study = builders.create(engine, budget={"trials": 50})
    for i in range(20):
        builders.register(engine, f"w{i}")
    heard = 0
    for i in range(20):
        with of_worker(database_url, f"w{i}") as listener:
            listener.wait(0)
            builders.append(engine, study, 1, turns)
            heard += study.study_id in all_that_comes(listener, engine)
    assert heard == woken


def test_whoever_has_built_the_study_is_called_before_others(
    database_url: str, engine: Engine
) -> None:
    """They would have to build it first, though they were heard of later."""
    study = builders.create(engine, budget={"trials": 50})
    for name, study_id in (("here", study.study_id), ("other", None)):
        builders.register(engine, name)
        with transaction(engine) as session:
            workers.beat(session, name, wanted_lanes=1, study_id=study_id)
    heard = {}
    for name in ("here", "other"):
        with of_worker(database_url, name) as listener:
            listener.wait(0)
            builders.append(engine, study, 1, turns=16)
            heard[name] = study.study_id in all_that_comes(listener, engine)
    assert heard == {"here": True, "other": False}


@pytest.mark.parametrize(("datasets", "silent"), [(["digits"], "1 hour"), (["mnist"], "0 s")])
def test_neither_the_dead_nor_those_who_cannot_train_them_are_woken_instead(
    database_url: str, engine: Engine, datasets: list[str], silent: str
) -> None:
    study = builders.create(engine)
    builders.append(engine, study, 1)
    builders.register(engine, "useless", lanes=64, datasets=datasets)
    builders.register(engine, "busy")
    builders.lease(engine, study, worker="busy")
    with engine.begin() as connection:
        late = f"heartbeat_at = now() - interval '{silent}' WHERE name = 'useless'"
        connection.execute(text(f"UPDATE regtune.workers SET {late}"))
    with of_worker(database_url, "busy") as listener:
        listener.wait(0)
        builders.append(engine, study, 1)
        assert study.study_id in all_that_comes(listener, engine)


def test_new_trials_that_nobody_wants_wake_everybody(database_url: str, engine: Engine) -> None:
    study = builders.create(engine)
    builders.register(engine, "useless", datasets=["mnist"])
    with of_worker(database_url, "silent") as listener:
        listener.wait(0)
        builders.append(engine, study, 1)
        assert all_that_comes(listener, engine) == {study.study_id}


def test_a_notification_for_another_worker_goes_unheard(database_url: str, engine: Engine) -> None:
    with of_worker(database_url, "me") as listener:
        listener.wait(0)
        notify(engine, "1", database.work_for("you"))
        notify(engine, "2", database.work_for("me"))
        notify(engine, "3")
        assert all_that_comes(listener, engine) == {2, 3}


def test_who_is_frozen_in_a_transaction_loses_its_locks(
    database_url: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a worker that was stopped in the middle of a report: a scheduler would wait for it."""
    monkeypatch.setitem(database._SERVER_PATIENCE, "idle_in_transaction_session_timeout", "300ms")
    builders.create(engine)
    frozen = database.connect(database_url)
    locking = text("SELECT FROM regtune.studies FOR UPDATE")
    with frozen.connect() as connection:
        connection.execute(locking)
        with engine.begin() as other:
            other.execute(locking)
        with pytest.raises(DBAPIError) as raised:
            connection.execute(text("SELECT 1"))
    frozen.dispose()
    assert database.is_outage(raised.value)


def test_who_is_frozen_between_transactions_leads_no_study_any_more(
    database_url: str, engine: Engine
) -> None:
    ids = [builders.create(engine).study_id]
    frozen = Leadership(database.connect(database_url), silent_seconds=1)
    other = Leadership(database.connect(database_url))
    frozen.claim(ids)
    assert frozen.led == set(ids)

    def taken_over() -> bool:
        other.claim(ids)
        return other.led == set(ids)

    wait_until(taken_over)
    with pytest.raises(DBAPIError) as raised:
        frozen.claim(ids)
    assert database.is_outage(raised.value)
    assert frozen.led == set()
    other.give_up()


def test_who_only_drains_does_not_reconnect() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        port = server.getsockname()[1]
        database.Listener(f"postgresql://anyone@127.0.0.1:{port}/none", database.WORK).drain()
        with pytest.raises(BlockingIOError):
            server.accept()


def test_what_was_drained_is_not_heard_again(database_url: str, engine: Engine) -> None:
    with database.Listener(database_url, database.WORK) as listener:
        listener.wait(0)
        notify(engine, "1")
        assert select([listener._connection], [], [], 30)[0]  # the server sends it in its own time
        listener.drain()
        notify(engine, "2")
        assert listener.wait(30) == {2}
