import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine, text
from structlog.testing import capture_logs

from regtune import events, studies
from regtune.client import server_sent_events
from regtune.database import transaction
from service import events as streaming
from service.newsroom import Watch
from tests import builders
from tests.outage import out_of_service
from tests.serving import app, serving
from tests.waiting import wait_until

EVENTS = "/v1/studies/study/events"


@pytest.fixture
def hushed_client(database_url: str) -> Iterator[httpx.Client]:
    """A client of a service whose streams do not look by themselves as long as a test takes."""
    with serving(app(database_url, poll_seconds=1000)) as client:
        yield client


class Lull:
    """Tells when a stream has nothing to tell and waits."""

    def __init__(self) -> None:
        self.begun = threading.Event()

    def comes(self) -> None:
        """Wait for the next one to begin."""
        assert self.begun.wait(10)
        self.begun.clear()


@pytest.fixture
def lull(monkeypatch: pytest.MonkeyPatch) -> Lull:
    """What tells when a stream waits."""
    lull = Lull()
    wait = Watch.wait

    async def noted(watch: Watch, seconds: float) -> None:
        lull.begun.set()
        await wait(watch, seconds)

    monkeypatch.setattr(Watch, "wait", noted)
    return lull


def read(client: httpx.Client, **options: Any) -> list[dict[str, Any]]:
    return list(stream(client, **options))


def stream(client: httpx.Client, **options: Any) -> Iterator[dict[str, Any]]:
    with client.stream("GET", EVENTS, **options) as response:
        if response.status_code == httpx.codes.NO_CONTENT:
            return
        assert response.headers["content-type"].startswith("text/event-stream")
        for event_id, data in server_sent_events(response.iter_lines()):
            yield {"id": event_id, **json.loads(data)}


def kinds(seen: list[dict[str, Any]]) -> list[str]:
    return [event["kind"] for event in seen]


def act(engine: Engine, verb: studies.Verb) -> None:
    with transaction(engine) as session:
        studies.act(session, "study", verb, "test")


@contextmanager
def older_transaction(engine: Engine) -> Iterator[None]:
    """A transaction that is open and has a number, so that readers wait for what it may write."""
    with engine.connect() as connection, connection.begin():
        connection.execute(text("SELECT pg_current_xact_id()"))
        yield


def test_a_study_that_is_over_tells_its_whole_story_and_the_stream_ends(
    client: httpx.Client, engine: Engine
) -> None:
    study = builders.create(engine)
    builders.append(engine, study, 2)
    builders.complete(engine, builders.lease(engine, study), 0.5)
    act(engine, "cancel")
    seen = read(client)
    assert kinds(seen) == [
        "study_created",
        "trial_appended",
        "trial_appended",
        "trial_started",
        "trial_complete",
        "study_cancel",
        "trial_cancelled",
        "study_ended",
    ]
    assert seen[4]["number"] == 0
    assert seen[4]["detail"]["value"] == 0.5
    assert seen[7]["detail"]["state"] == "cancelled"


def test_a_reader_who_comes_back_misses_nothing_and_sees_nothing_twice(
    client: httpx.Client, engine: Engine
) -> None:
    study = builders.create(engine)
    builders.append(engine, study, 3)
    act(engine, "cancel")
    story = read(client)
    for position, event in enumerate(story):
        rest = story[position + 1 :]
        assert read(client, headers={"Last-Event-ID": event["id"]}) == rest
        assert read(client, params={"after": event["id"]}) == rest
    last = {"after": story[-1]["id"]}
    assert client.get(EVENTS, params=last).status_code == httpx.codes.NO_CONTENT
    both = {"params": {"after": story[0]["id"]}, "headers": {"Last-Event-ID": story[2]["id"]}}
    assert read(client, **both) == story[3:]


def test_what_happens_is_told_as_it_happens(
    hushed_client: httpx.Client, engine: Engine, lull: Lull
) -> None:
    study = builders.create(engine)
    builders.append(engine, study, 1)
    told = stream(hushed_client)
    assert kinds([next(told), next(told)]) == ["study_created", "trial_appended"]
    lull.comes()
    builders.complete(engine, builders.lease(engine, study))
    assert kinds([next(told), next(told)]) == ["trial_started", "trial_complete"]
    lull.comes()
    act(engine, "stop")
    assert kinds(list(told)) == ["study_stop", "study_ended"]


def test_an_event_that_an_older_transaction_holds_back_is_told_once_that_is_over(
    hushed_client: httpx.Client, engine: Engine, lull: Lull
) -> None:
    builders.create(engine)
    told = stream(hushed_client)
    assert next(told)["kind"] == "study_created"
    lull.comes()
    with older_transaction(engine):
        act(engine, "cancel")
    assert kinds(list(told)) == ["study_cancel", "study_ended"]


def test_streams_listen_to_nothing(client: httpx.Client, engine: Engine) -> None:
    study = builders.create(engine)
    with ExitStack() as stack:
        responses = [
            stack.enter_context(client.stream("GET", EVENTS, timeout=30)) for _ in range(12)
        ]
        lines = [response.iter_lines() for response in responses]
        for line in lines:
            assert next(line).startswith("id:")
        assert listeners(engine) == 0
        act(engine, "cancel")
        assert all(any("study_ended" in text for text in line) for line in lines)
    assert studies_known(engine) == [study.name]


def listeners(engine: Engine) -> int:
    with engine.connect() as connection:
        count: int = connection.execute(
            text(
                "SELECT count(*) FROM pg_stat_activity"
                " WHERE application_name = 'regtune-service-listen'"
                " AND datname = current_database()"
            )
        ).scalar_one()
        return count


def studies_known(engine: Engine) -> list[str]:
    with transaction(engine) as session:
        return [study.name for study in studies.page(session, state=None, before=None, limit=9)]


def test_a_stream_holds_no_database_connection_while_it_waits(
    database_url: str, engine: Engine
) -> None:
    builders.create(engine)
    with serving(app(database_url, pool_size=1)) as client, ExitStack() as stack:
        for _ in range(5):
            lines = stack.enter_context(client.stream("GET", EVENTS)).iter_lines()
            assert next(lines).startswith("id:")
        assert client.get("/v1/studies/study").is_success
        act(engine, "cancel")


def test_a_reader_who_leaves_is_noticed(database_url: str, engine: Engine) -> None:
    builders.create(engine)
    served = app(database_url)
    watches = served.state.context.newsroom._watches
    with serving(served) as client:
        with client.stream("GET", EVENTS) as response:
            lines = response.iter_lines()
            next(lines)
            assert len(watches) == 1
        wait_until(lambda: not watches)


def test_the_stream_of_a_study_that_is_deleted_ends(client: httpx.Client, engine: Engine) -> None:
    study = builders.create(engine)
    told = stream(client)
    assert next(told)["kind"] == "study_created"
    with older_transaction(engine):
        act(engine, "cancel")
        with transaction(engine) as session:
            studies.delete(session, study.name, "test")
    assert kinds(list(told)) == ["study_cancel", "study_ended", "study_deleted"]


def test_a_stream_that_loses_the_database_ends_and_can_be_taken_up_again(
    client: httpx.Client, engine: Engine, lull: Lull
) -> None:
    builders.create(engine)
    told = stream(client)
    last = next(told)
    lull.comes()
    with capture_logs() as logs:
        with out_of_service(engine):
            assert list(told) == []
        act(engine, "cancel")
        rest = read(client, headers={"Last-Event-ID": last["id"]})
    assert kinds(rest) == ["study_cancel", "study_ended"]
    assert [entry["event"] for entry in logs] == ["stream_lost_database"]


def test_pings_keep_a_silent_stream_alive(
    client: httpx.Client, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "PING_SECONDS", 0.05)
    builders.create(engine)
    with client.stream("GET", EVENTS, timeout=5) as response:
        assert any(line.startswith(": ping") for line in response.iter_lines())


def test_a_cursor_that_is_none_is_refused(client: httpx.Client, engine: Engine) -> None:
    builders.create(engine)
    for cursor in ("", "x", "1", "1-", "-1-1", "1-99999999999999999999", "9" * 50):
        for options in ({"params": {"after": cursor}}, {"headers": {"Last-Event-ID": cursor}}):
            response = client.get(EVENTS, **options)
            assert response.status_code == 422, cursor
            assert response.json()["errors"][0]["field"] == "after"


def test_the_beginning_has_a_cursor(client: httpx.Client, engine: Engine) -> None:
    builders.create(engine)
    act(engine, "cancel")
    assert read(client, params={"after": events.START}) == read(client)


def test_more_events_than_one_read_takes_all_arrive(client: httpx.Client, engine: Engine) -> None:
    study = builders.create(engine)
    with engine.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO regtune.events (study_id, number, kind, actor)"
                " SELECT :id, n, 'trial_appended', 'test' FROM generate_series(0, 2499) AS n"
            ),
            {"id": study.study_id},
        )
    act(engine, "cancel")
    seen = [event["number"] for event in read(client) if event["kind"] == "trial_appended"]
    assert seen == list(range(2500))
