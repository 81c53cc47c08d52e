"""Who did what to a study, when: over REST, and when several do it at once."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine

from regtune import leasing, studies
from regtune.database import transaction
from regtune.errors import StudyActive, StudyOver
from regtune.studies import Verb
from tests import builders
from tests.audit import audit

HISTORY = "/v1/studies/study/history"
SPEC = {
    "name": "study",
    "task": {"dataset": "digits", "model": "mlp"},
    "budget": {"trials": 5},
}


def kinds(client: httpx.Client, **query: Any) -> list[str]:
    return [entry["kind"] for entry in client.get(HISTORY, params=query).json()["items"]]


def act(engine: Engine, verb: Verb, actor: str = "test") -> None:
    with transaction(engine) as session:
        studies.act(session, "study", verb, actor)


def delete(engine: Engine, actor: str = "test") -> None:
    with transaction(engine) as session:
        studies.delete(session, "study", actor)


def test_every_verb_is_told_once_with_who_and_when(client: httpx.Client) -> None:
    client.post("/v1/studies", json=SPEC)
    for verb in ("pause", "pause", "resume", "stop", "stop"):
        assert client.post(f"/v1/studies/study/{verb}").is_success
    entries = client.get(HISTORY).json()["items"]
    assert [entry["kind"] for entry in entries] == [
        *("study_created", "study_pause", "study_resume", "study_stop", "study_ended"),
    ]
    assert {entry["actor"] for entry in entries} == {"client 127.0.0.1"}
    assert [entry["at"] for entry in entries] == sorted(entry["at"] for entry in entries)
    assert entries[-1]["detail"] == {"state": "stopped", "why": "stopped by request"}


def test_what_happened_to_trials_is_told_if_it_is_asked_for(
    client: httpx.Client, engine: Engine
) -> None:
    study = builders.create(engine)
    builders.append(engine, study, 2)
    builders.complete(engine, builders.lease(engine, study, worker="gpu-7"))
    act(engine, "cancel", "somebody")
    assert kinds(client) == ["study_created", "study_cancel", "study_ended"]
    everything = client.get(HISTORY, params={"trials": True}).json()["items"]
    assert [(e["kind"], e["number"], e["actor"]) for e in everything] == [
        ("study_created", None, "test"),
        ("trial_appended", 0, "scheduler"),
        ("trial_appended", 1, "scheduler"),
        ("trial_started", 0, "gpu-7"),
        ("trial_complete", 0, "w"),
        ("study_cancel", None, "somebody"),
        ("trial_cancelled", 1, "somebody"),
        ("study_ended", None, "somebody"),
    ]


def test_who_gave_a_trial_back_is_told(client: httpx.Client, engine: Engine) -> None:
    study = builders.create(engine)
    builders.append(engine, study, 2)
    released, lost = builders.lease(engine, study, 2, worker="gpu-7")
    with transaction(engine) as session:
        leasing.release(session, [released], "gpu-7")
    assert builders.expire(engine, study) == [lost.trial_id]
    everything = client.get(HISTORY, params={"trials": True}).json()["items"]
    assert [
        (entry["number"], entry["actor"], entry["detail"]["reason"])
        for entry in everything
        if entry["kind"] == "trial_given_back"
    ] == [(0, "gpu-7", "released by gpu-7"), (1, "scheduler", "its lease ran out")]


@pytest.mark.parametrize("direction", ["asc", "desc"])
def test_the_history_comes_in_pages(client: httpx.Client, engine: Engine, direction: str) -> None:
    builders.create(engine)
    verbs: list[Verb] = ["pause", "resume"] * 3
    for verb in verbs:
        act(engine, verb)
    everything = kinds(client, direction=direction)
    assert len(everything) == 7
    seen: list[str] = []
    query: dict[str, Any] = {"limit": 3, "direction": direction}
    while True:
        page = client.get(HISTORY, params=query).json()
        assert len(page["items"]) <= 3
        seen += [entry["kind"] for entry in page["items"]]
        if page["next"] is None:
            break
        query["cursor"] = page["next"]
    assert seen == everything
    if direction == "desc":
        assert seen == ["study_resume", "study_pause"] * 3 + ["study_created"]


def test_a_cursor_of_another_list_is_refused(client: httpx.Client, engine: Engine) -> None:
    builders.create(engine)
    act(engine, "pause")
    cursor = client.get(HISTORY, params={"limit": 1}).json()["next"]
    for query in (
        {"cursor": cursor, "direction": "desc"},
        {"cursor": "MTc"},
        {"cursor": "\N{GRINNING FACE}"},
        {"cursor": ""},
    ):
        response = client.get(HISTORY, params=query)
        assert response.status_code == 422
        assert response.json()["errors"][0]["field"] == "cursor"


def test_the_history_of_a_study_outlives_it_and_a_new_one_goes_on_with_it(
    client: httpx.Client, engine: Engine
) -> None:
    study = builders.create(engine)
    builders.append(engine, study, 2)
    act(engine, "cancel")
    for _ in range(2):
        assert client.delete("/v1/studies/study").status_code == 204
    assert client.get("/v1/studies/study").status_code == 404
    told = ["study_created", "study_cancel", "study_ended", "study_deleted"]
    assert kinds(client) == told
    assert kinds(client, trials=True) == told
    builders.create(engine)
    assert kinds(client) == [*told, "study_created"]
    assert kinds(client, direction="desc", limit=1) == ["study_created"]


def at_once(*calls: Callable[[], object]) -> list[str]:
    """Make calls in threads; return the names of what they raised."""
    with ThreadPoolExecutor(len(calls)) as pool:
        errors = [future.exception() for future in [pool.submit(call) for call in calls]]
    unexpected = [e for e in errors if e and not isinstance(e, StudyOver | StudyActive)]
    assert not unexpected
    return [type(error).__name__ for error in errors if error]


def test_of_many_who_do_the_same_at_once_one_has_done_it(
    client: httpx.Client, engine: Engine
) -> None:
    builders.append(engine, builders.create(engine), 3)
    for verb in ("pause", "resume", "cancel"):
        assert at_once(*[lambda verb=verb: act(engine, verb)] * 8) == []
    assert at_once(*[lambda: delete(engine)] * 8) == []
    assert kinds(client) == [
        *("study_created", "study_pause", "study_resume", "study_cancel", "study_ended"),
        "study_deleted",
    ]


def test_verbs_at_once_come_one_after_the_other(client: httpx.Client, engine: Engine) -> None:
    """Whatever their order, the study ends as the last one that was not refused says."""
    verbs: list[Verb] = ["pause", "resume", "stop", "cancel"]
    for round_ in range(10):
        study = builders.create(engine)
        builders.append(engine, study, 4)
        leases = builders.lease(engine, study, 2)
        refused = at_once(
            *[lambda verb=verb: act(engine, verb) for verb in verbs],
            lambda leases=leases: builders.complete(engine, leases[:1]),
            lambda leases=leases: release(engine, leases[1:]),
            lambda study=study: builders.lease(engine, study, 4, "late"),
        )
        assert set(refused) <= {"StudyOver"}
        # A stop that comes when nothing runs any more ends the study; then cancel is refused.
        state = builders.study_state(engine, study)
        last = {"cancelled": "study_cancel", "stopped": "study_stop"}[state]
        assert audit(engine) == {}
        told = kinds(client)
        assert told[-2:] == [last, "study_ended"]
        assert told.count("study_deleted") == round_
        delete(engine)


def release(engine: Engine, leases: Any) -> None:
    with transaction(engine) as session:
        leasing.release(session, leases, "w")


def test_a_worker_that_finishes_while_its_study_is_cancelled_and_deleted(engine: Engine) -> None:
    for _ in range(10):
        study = builders.create(engine)
        builders.append(engine, study, 4)
        leases = builders.lease(engine, study, 4)

        def end_and_delete() -> None:
            act(engine, "cancel")
            delete(engine)

        at_once(
            end_and_delete,
            *[lambda one=one: builders.complete(engine, [one]) for one in leases],
        )
        assert audit(engine) == {}
