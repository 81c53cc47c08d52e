"""PATCH of a live study: budget and priority, and what stands in the way."""

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine

from regtune import leasing, reporting, studies
from regtune.database import transaction
from regtune.errors import BudgetSpent, StaleView
from regtune.spec import parse_change
from tests import builders
from tests.audit import audit

SPEC: dict[str, Any] = {"name": "study", **builders.BASE}


def patch(client: httpx.Client, **changes: Any) -> httpx.Response:
    return client.patch("/v1/studies/study", json=changes)


def test_budget_and_priority_are_changed_beside_the_spec(client: httpx.Client) -> None:
    client.post("/v1/studies", json=SPEC)
    response = patch(client, budget={"trials": 8, "seconds": 60, "trial_epochs": 900}, priority=3)
    assert response.status_code == 200
    study = response.json()
    live = ("budget_trials", "budget_seconds", "budget_trial_epochs", "priority")
    assert [study[key] for key in live] == [8, 60, 900, 3]
    assert study["spec"]["budget"] == {"trials": 5, "seconds": None, "trial_epochs": None}
    assert study["spec"]["priority"] == 1
    study = patch(client, budget={"seconds": None}).json()
    assert [study[key] for key in live] == [8, None, 900, 3]
    assert client.post("/v1/studies", json=SPEC).status_code == 200, "what was posted is the same"


def test_a_change_is_told_once_from_what_to_what(client: httpx.Client) -> None:
    client.post("/v1/studies", json=SPEC)
    for _ in range(2):
        assert patch(client, priority=3, budget={"trials": 8}).is_success
    _, told = client.get("/v1/studies/study/history").json()["items"]
    assert told["kind"] == "study_changed"
    assert told["detail"] == {"trials": {"from": 5, "to": 8}, "priority": {"from": 1, "to": 3}}


@pytest.mark.parametrize(
    ("body", "field", "message"),
    [
        ({}, "", "names nothing to change; known: budget.trials"),
        ({"budget": {}}, "", "names nothing to change"),
        ({"budget": {"trials": 0}}, "budget.trials", "greater than or equal to 1"),
        ({"budget": {"trials": None}}, "budget.trials", "integer"),
        ({"budget": {"epochs": 3}}, "budget.epochs", "known: trials, seconds, trial_epochs"),
        ({"budget": {"seconds": -1}}, "budget.seconds", "greater than 0"),
        ({"budget": {"trial_epochs": 99}}, "", "must be at least 100"),
        ({"priority": 1001}, "priority", "less than or equal to 1000"),
        ({"name": "other"}, "name", "unknown field; known: budget, priority"),
        ([], "", "must be a mapping"),
    ],
)
def test_what_cannot_be_changed_is_refused_by_name(
    client: httpx.Client, body: Any, field: str, message: str
) -> None:
    client.post("/v1/studies", json=SPEC)
    response = client.patch("/v1/studies/study", json=body)
    assert response.status_code == 422
    (error,) = response.json()["errors"]
    assert error["field"] == field
    assert message in error["message"]


def test_a_grid_gets_no_more_trials_than_it_has_points(client: httpx.Client) -> None:
    search = {"dropout": [0.1, 0.2, 0.3], "weight_decay": 0.1, "l1_lambda": 0.0, "patience": 5}
    spec = {**SPEC, "search": search, "sampler": "grid", "budget": {"trials": 4}}
    assert client.post("/v1/studies", json=spec).status_code == 201
    assert patch(client, budget={"trials": 5}).status_code == 200
    response = patch(client, budget={"trials": 6})
    assert response.status_code == 422
    assert "ask for at most 5 trials" in response.json()["errors"][0]["message"]


def test_yaml_and_a_merge_patch_say_the_same(client: httpx.Client) -> None:
    client.post("/v1/studies", json=SPEC)
    for media_type in ("application/yaml", "application/merge-patch+json", "application/json"):
        response = client.patch(
            "/v1/studies/study", content='{"priority": 2}', headers={"Content-Type": media_type}
        )
        assert response.json()["priority"] == 2
    assert client.patch("/v1/studies/study", content="priority=2").status_code == 415


def test_no_limit_goes_below_what_is_used_up_or_promised(
    client: httpx.Client, engine: Engine
) -> None:
    study = builders.create(engine, budget={"trials": 5, "seconds": 3600, "trial_epochs": 1000})
    builders.append(engine, study, 3)
    builders.complete(engine, builders.lease(engine, study))
    time.sleep(0.01)  # so that some time has passed since the first lease
    for budget, says in (
        ({"trials": 2}, "there are 3 trials already"),
        ({"seconds": 0.001}, "seconds have passed since the first lease"),
        ({"trial_epochs": 100}, "101 are used up"),  # one epoch trained, two open trials of 50
    ):
        response = patch(client, budget=budget)
        assert response.status_code == 409
        assert response.json()["type"] == "urn:regtune:problem:budget-spent"
        assert says in response.json()["detail"]
    assert patch(client, budget={"trials": 3, "trial_epochs": 101}).status_code == 200
    assert builders.append(engine, study, 1) == []
    assert audit(engine) == {}


@pytest.mark.parametrize("verb", ["stop", "cancel"])
def test_a_study_that_adds_no_more_trials_is_not_changed(
    client: httpx.Client, engine: Engine, verb: str
) -> None:
    study = builders.create(engine)
    builders.append(engine, study, 1)
    builders.lease(engine, study)
    client.post(f"/v1/studies/study/{verb}")
    response = patch(client, priority=2)
    assert response.status_code == 409
    assert "a change comes too late" in response.json()["detail"]
    assert patch(client, priority=1).status_code == 200, "it is 1 already"


def test_a_study_that_is_changed_while_trials_are_appended_stays_within_its_budget(
    engine: Engine,
) -> None:
    study = builders.create(engine, budget={"trials": 500})

    def append(_: int) -> None:
        with suppress(StaleView):
            builders.append(engine, study, 3)

    def change(limit: int) -> None:
        with suppress(BudgetSpent), transaction(engine) as session:
            change = parse_change({"budget": {"trials": limit}})
            studies.change(session, "study", change, "test")

    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(append, i) for i in range(60)]
        calls += [pool.submit(change, limit) for limit in range(20, 80)]
    assert {type(call.exception()) for call in calls} == {type(None)}
    with transaction(engine) as session:
        now = studies.by_id(session, study.study_id)
    assert 0 < now.appended <= now.budget_trials < 500
    assert audit(engine) == {}


def test_an_epoch_that_is_trained_again_counts_once(engine: Engine) -> None:
    study = builders.create(engine, budget={"trial_epochs": 101})
    builders.append(engine, study, 1)
    for loss in (3.0, 2.0):
        record_and_release(engine, builders.lease(engine, study), loss)
    builders.complete(engine, builders.lease(engine, study))
    with transaction(engine) as session:
        assert studies.room(session, studies.by_id(session, study.study_id)) == 2
    assert audit(engine) == {}


def record_and_release(engine: Engine, leases: Any, loss: float = 1.0) -> None:
    with transaction(engine) as session:
        reporting.flush(session, leases, {leases[0].trial_id: [builders.epoch(1, loss)]}, 30)
        leasing.release(session, leases, "w")
