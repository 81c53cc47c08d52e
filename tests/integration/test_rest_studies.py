import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import httpx
import pytest
import yaml
from sqlalchemy import Engine, text

from regtune import events, shares, studies, workers
from regtune.database import transaction
from regtune.spec import parse_spec
from regtune.studies import ModelFacts
from regtune.task import Offer
from service.scheduler import glances
from tests import builders

SPEC: dict[str, Any] = {
    "name": "study",
    "task": {"dataset": "digits", "model": "mlp"},
    "budget": {"trials": 5},
}


def post(client: httpx.Client, **changes: Any) -> httpx.Response:
    return client.post("/v1/studies", json={**SPEC, **changes})


def register(
    engine: Engine,
    name: str = "w",
    datasets: str = "digits",
    models: str = "mlp",
    tasks: str = "",
) -> None:
    offer = Offer(*(frozenset(names.split()) for names in (datasets, models, tasks)))
    with transaction(engine) as session:
        workers.register(session, name=name, host="h", pid=1, device="cpu", lanes=2, offer=offer)


def test_a_posted_study_comes_back_with_every_default_filled_in(client: httpx.Client) -> None:
    response = post(client)
    assert response.status_code == 201
    assert response.headers["location"] == "/v1/studies/study"
    study = response.json()
    assert study["state"] == "active"
    assert study["spec"]["training"]["learning_rate"] == 0.001
    assert study["spec"]["search"]["weight_decay"] == {
        "low": 1e-4,
        "high": 3.0,
        "log": True,
        "or_zero": True,
    }
    assert client.get("/v1/studies/study").json() == study


def test_yaml_says_the_same_as_json(client: httpx.Client) -> None:
    for media_type in ("application/yaml", "application/x-yaml", "text/yaml; charset=utf-8"):
        response = client.post(
            "/v1/studies", content=yaml.dump(SPEC), headers={"Content-Type": media_type}
        )
        assert response.is_success
    assert post(client).status_code == 200


def test_the_same_spec_again_is_200_and_another_one_409(client: httpx.Client) -> None:
    post(client)
    again = post(client)
    assert (again.status_code, again.json()["name"]) == (200, "study")
    other = post(client, priority=7)
    assert other.status_code == 409
    assert other.json()["type"] == "urn:regtune:problem:study-differs"


def test_of_many_who_post_a_study_at_once_one_has_made_it(client: httpx.Client) -> None:
    with ThreadPoolExecutor(16) as pool:
        statuses = list(pool.map(lambda _: post(client).status_code, range(16)))
    assert sorted(statuses) == [200] * 15 + [201]


def test_a_study_whose_commit_fails_was_never_created(client: httpx.Client, engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(
            text(
                "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS"
                " $$ BEGIN RAISE 'no commit today'; END $$"
            )
        )
        connection.execute(
            text(
                "CREATE CONSTRAINT TRIGGER at_commit AFTER INSERT ON regtune.studies"
                " DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION fail()"
            )
        )
    response = post(client)
    assert response.status_code == 500
    assert "no commit today" not in response.text
    assert client.get("/v1/studies/study").status_code == 404


def test_what_is_wrong_is_refused_by_the_name_of_its_field(client: httpx.Client) -> None:
    wrong: list[tuple[dict[str, Any], str, str]] = [
        ({"budget": {"trials": 0}}, "budget.trials", "greater than or equal to 1"),
        ({"search": {"dropout": {"low": 0.5, "high": 0.1}}}, "search.dropout", "low must be below"),
        ({"search": {"dropout": 1.0}}, "search.dropout", "must be in [0, 1)"),
        ({"name": "no/slash"}, "name", "must match"),
        ({"bugdet": {}}, "bugdet", "known: name, task"),
        ({"sampler": "magic"}, "sampler.name", "'tpe'"),
        ({"task": {"dataset": "no", "model": "mlp"}}, "task.dataset", "known: breast_cancer"),
        ({"task": {"dataset": "digits", "model": "no"}}, "task.model", "known: cnn, linear, mlp"),
    ]
    for changes, field, message in wrong:
        response = post(client, **changes)
        assert response.status_code == 422
        (error,) = response.json()["errors"]
        assert error["field"] == field
        assert message in error["message"]


def test_every_wrong_field_is_named_at_once(client: httpx.Client) -> None:
    response = post(client, task={"dataset": "no", "model": "none"})
    fields = [error["field"] for error in response.json()["errors"]]
    assert fields == ["task.dataset", "task.model"]


def test_a_task_that_only_a_worker_knows_is_accepted(client: httpx.Client, engine: Engine) -> None:
    task = {"dataset": "mine", "model": "mymodel", "depth": 3}
    assert post(client, task=task).status_code == 422
    register(engine, datasets="mine", models="mymodel")
    response = post(client, task=task)
    assert response.status_code == 201
    defaults = {"data": {}, "score": None, "class_weights": "none"}
    assert response.json()["spec"]["task"] == {**task, **defaults}
    assert response.json()["warning"] is None


def test_a_task_goes_by_its_name_to_a_worker_that_has_it(
    client: httpx.Client, engine: Engine
) -> None:
    register(engine, "other")
    response = post(client, task={"name": "waves", "width": 3})
    assert response.status_code == 422
    (error,) = response.json()["errors"]
    assert error == {"field": "task.name", "message": "there is no task 'waves'; known: none"}
    register(engine, "w", tasks="waves")
    response = post(client, task={"name": "waves", "width": 3})
    assert response.status_code == 201
    assert response.json()["warning"] is None
    shown = {worker["name"]: worker for worker in client.get("/v1/workers").json()["items"]}
    assert (shown["w"]["tasks"], shown["other"]["tasks"]) == (["waves"], [])
    study = builders.find(engine, "study")
    builders.append(engine, study, 1)
    with transaction(engine) as session:
        assert glances.of(session, study.study_id, 30, 2).wanted_lanes == 2
        assert shares.choose(session, "other") is None
        assert shares.choose(session, "w") == study.study_id
        workers.leave(session, "w", "h", 1)
    warning = client.get("/v1/studies/study").json()["warning"]
    assert "none of the 1 living workers offers the task 'waves'" in warning


def test_the_warning_tells_when_all_workers_have_refused(
    client: httpx.Client, engine: Engine
) -> None:
    post(client)
    study = builders.find(engine, "study")

    def refuse(worker: str, reason: str) -> str | None:
        with transaction(engine) as session:
            detail = {"reason": reason}
            events.record(session, study.study_id, "study_refused", worker, detail=detail)
        return warning()

    def warning() -> str | None:
        told: str | None = client.get("/v1/studies/study").json()["warning"]
        return told

    for name in ("a", "b"):
        register(engine, name)
    register(engine, "elsewhere", datasets="mnist")
    assert refuse("a", "its rows are others") is None
    assert refuse("b", "so are these") == (
        "all of the 2 living workers that could train it have refused it; the study waits for "
        "another, or for one to try again: once it is restarted, or after some minutes where it "
        "lacked something. b: so are these"
    )
    register(engine, "a")  # it was restarted, and tries again
    assert warning() is None


def test_who_leaves_says_so_of_itself_alone(client: httpx.Client, engine: Engine) -> None:
    register(engine, "w")  # by pid 1 of h, under a name that another process had before
    for host, pid, alive in (("h", 2, True), ("elsewhere", 1, True), ("h", 1, False)):
        with transaction(engine) as session:
            workers.leave(session, "w", host, pid)
        (worker,) = client.get("/v1/workers").json()["items"]
        assert worker["alive"] is alive


def test_a_study_that_was_accepted_once_stays_so_when_its_worker_is_gone(
    client: httpx.Client, engine: Engine
) -> None:
    task = {"dataset": "mine", "model": "mlp"}
    register(engine, datasets="mine")
    post(client, task=task)
    with transaction(engine) as session:
        workers.leave(session, "w", "h", 1)
    response = post(client, task=task)
    assert response.status_code == 200
    assert "no worker is alive" in response.json()["warning"]


def test_a_sampler_whose_packages_are_missing_says_so(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    for sampler, missing in (
        ("gp", "torch"),
        ("gp", "scipy"),
        ("qmc", "scipy"),
        ("cmaes", "cmaes"),
    ):
        installed = {"torch", "scipy", "cmaes"} - {missing}
        monkeypatch.setattr("service.admission.find_spec", {name: name for name in installed}.get)
        (error,) = post(client, sampler=sampler).json()["errors"]
        assert error["field"] == "sampler.name"
        assert f"needs {missing}" in error["message"]
        assert post(client, name=f"{sampler}-{missing}", sampler="tpe").status_code == 201


def test_a_sampler_that_would_take_too_long_is_refused_by_its_budget(client: httpx.Client) -> None:
    for budget in ({"trials": 1001}, {"seconds": 60}):
        (error,) = post(client, sampler="gp", budget=budget).json()["errors"]
        assert error["field"] == "budget.trials"
        assert "1000 or fewer" in error["message"]
    assert post(client, sampler="gp", budget={"trials": 999}).status_code == 201
    for trials, status in ((1000, 200), (1001, 422)):
        change = client.patch("/v1/studies/study", json={"budget": {"trials": trials}})
        assert change.status_code == status


@pytest.mark.parametrize(
    ("settings", "field", "says"),
    [
        ({"ignore": ["y"]}, "ignore", "'y' is the target"),
        ({"numeric": ["a"], "categorical": ["a"]}, "categorical", "'a' is named under numeric"),
        ({"delimiter": "§"}, "delimiter", "must be an ASCII character"),
        ({"delimiter": "\n"}, "delimiter", "no quotation mark or end of a line"),
    ],
)
def test_settings_of_a_table_that_contradict_each_other_are_refused(
    client: httpx.Client, engine: Engine, settings: dict[str, Any], field: str, says: str
) -> None:
    register(engine, datasets="table", models="linear")
    data = {"path": "t.csv", "target": "y", **settings}
    task = {"dataset": "table", "model": "linear", "data": data}
    (error,) = post(client, task=task).json()["errors"]
    assert error["field"] == f"task.data.{field}"
    assert says in error["message"]
    with transaction(engine) as session:  # as one that an earlier version has let in
        studies.create(session, parse_spec({**SPEC, "task": task}), "client")
    assert client.get("/v1/studies/study").status_code == 200


def test_the_warning_tells_who_is_missing(client: httpx.Client, engine: Engine) -> None:
    assert "no worker is alive" in post(client).json()["warning"]
    register(engine, "other", datasets="mnist")
    register(engine, "another", datasets="digits", models="")
    warning = client.get("/v1/studies/study").json()["warning"]
    assert "none of the 2 living workers offers the data set 'digits'" in warning
    register(engine)
    assert client.get("/v1/studies/study").json()["warning"] is None


def test_a_study_that_is_over_needs_no_worker(client: httpx.Client) -> None:
    post(client)
    assert client.post("/v1/studies/study/cancel").json()["warning"] is None


def test_a_study_tells_its_counts_progress_and_best_trials(
    client: httpx.Client, engine: Engine
) -> None:
    study = builders.create(engine, "study")
    builders.append(engine, study, 4)
    builders.complete(engine, builders.lease(engine, study), 0.5)
    builders.complete(engine, builders.lease(engine, study), 0.25)
    builders.lease(engine, study)
    seen = client.get("/v1/studies/study").json()
    assert seen["counts"] == {
        "waiting": 1,
        "running": 1,
        "complete": 2,
        "pruned": 0,
        "failed": 0,
        "cancelled": 0,
    }
    assert seen["progress"] == 2 / 5
    assert seen["eta_seconds"] > 0
    assert seen["best_validation_loss"] == 0.25
    assert (seen["best"]["number"], seen["best"]["validation_loss"]) == (1, 0.25)
    assert (seen["baseline"]["number"], seen["baseline"]["validation_loss"]) == (0, 0.5)


def test_a_study_tells_of_its_model_once_a_worker_has_built_it(
    client: httpx.Client, engine: Engine
) -> None:
    study = builders.create(engine, "study")
    assert client.get("/v1/studies/study").json()["model"] is None
    facts = ModelFacts(
        parameters=9_738,
        penalized=("layers.0.weight",),
        spared=("layers.0.bias", "layers.1.weight"),
        dropout_sites=("layers.3",),
        vectorized=False,
        steps_per_epoch=12,
        training_rows=1_149,
    )
    for told in (facts, replace(facts, steps_per_epoch=7)):
        with transaction(engine) as session:
            studies.describe_model(session, study.study_id, told)
    assert client.get("/v1/studies/study").json()["model"] == {
        "parameters": 9_738,
        "penalized": ["layers.0.weight"],
        "spared": ["layers.0.bias", "layers.1.weight"],
        "dropout_sites": ["layers.3"],
        "vectorized": False,
        "steps_per_epoch": 12,
        "training_rows": 1_149,
        "score": "accuracy",
        "data_hash": None,
    }


def test_a_study_with_folds_comes_back_so_that_it_can_be_posted_again(
    client: httpx.Client,
) -> None:
    changes = {"validation": {"folds": 5, "repeats": 2}, "training": {"optimizer": "sgd"}}
    spec = post(client, **changes).json()["spec"]
    assert spec["validation"] == {"folds": 5, "repeats": 2}
    assert spec["training"]["momentum"] == 0.9
    assert post(client, **spec).status_code == 200
    plain = post(client, name="plain").json()["spec"]
    assert "momentum" not in plain["training"]
    assert post(client, **plain).status_code == 200


def test_the_time_left_goes_by_the_latest_trials(client: httpx.Client, engine: Engine) -> None:
    study = builders.create(engine, "study", budget={"trials": 100})
    builders.append(engine, study, 50)
    builders.complete(engine, builders.lease(engine, study, 50))
    with engine.begin() as connection:
        # One a second up to now, but the first 10 took a day.
        connection.execute(
            text(
                "UPDATE regtune.trials SET started_at = now() - interval '1 day',"
                " finished_at = now() - make_interval(secs => 50 - number)"
            )
        )
    assert client.get("/v1/studies/study").json()["eta_seconds"] == pytest.approx(50, rel=0.2)


def test_the_time_left_is_unknown_before_anything_has_ended_and_in_a_pause(
    client: httpx.Client, engine: Engine
) -> None:
    study = builders.create(engine, "study")
    builders.append(engine, study, 2)
    assert client.get("/v1/studies/study").json()["eta_seconds"] is None
    builders.complete(engine, builders.lease(engine, study))
    assert client.get("/v1/studies/study").json()["eta_seconds"] > 0
    assert client.post("/v1/studies/study/pause").json()["eta_seconds"] is None


def test_a_budget_of_seconds_is_progress_too(client: httpx.Client, engine: Engine) -> None:
    study = builders.create(engine, "study", budget={"trials": 100, "seconds": 200.0})
    builders.append(engine, study, 1)
    builders.lease(engine, study)
    with engine.begin() as connection:
        connection.execute(
            text("UPDATE regtune.trials SET started_at = now() - interval '50 seconds'")
        )
    seen = client.get("/v1/studies/study").json()
    assert seen["progress"] == pytest.approx(0.25, abs=0.05)
    assert seen["eta_seconds"] == pytest.approx(150, abs=10)


def test_a_verb_may_be_said_twice(client: httpx.Client) -> None:
    for verb, state in (
        ("pause", "paused"),
        ("resume", "active"),
        ("stop", "stopped"),
        ("cancel", "cancelled"),
    ):
        post(client, name=verb)
        for _ in range(2):
            response = client.post(f"/v1/studies/{verb}/{verb}")
            assert (response.status_code, response.json()["state"]) == (200, state)


def test_what_comes_too_late_is_409(client: httpx.Client) -> None:
    post(client)
    client.post("/v1/studies/study/cancel")
    response = client.post("/v1/studies/study/pause")
    assert response.status_code == 409
    assert response.json()["type"] == "urn:regtune:problem:study-over"


def test_only_a_study_that_is_over_can_be_deleted(client: httpx.Client) -> None:
    post(client)
    assert client.delete("/v1/studies/study").status_code == 409
    client.post("/v1/studies/study/cancel")
    deleted = client.delete("/v1/studies/study")
    assert (deleted.status_code, deleted.content) == (204, b"")
    assert client.delete("/v1/studies/study").status_code == 204
    assert post(client).status_code == 201


CALLS: list[Callable[[httpx.Client, str], httpx.Response]] = [
    lambda client, name: client.get(f"/v1/studies/{name}"),
    lambda client, name: client.get(f"/v1/studies/{name}/trials"),
    lambda client, name: client.get(f"/v1/studies/{name}/trials/0"),
    lambda client, name: client.get(f"/v1/studies/{name}/best"),
    lambda client, name: client.get(f"/v1/studies/{name}/events"),
    lambda client, name: client.get(f"/v1/studies/{name}/history"),
    lambda client, name: client.post(f"/v1/studies/{name}/pause"),
    lambda client, name: client.delete(f"/v1/studies/{name}"),
]


def test_a_name_that_is_none_is_not_found(client: httpx.Client) -> None:
    for name in ("missing", "%00", "%ff", "a%20b", "a%0A", "x" * 3000, "%F0%9F%98%80"):
        for call in CALLS:
            response = call(client, name)
            assert response.status_code == 404, name
            assert response.headers["content-type"] == "application/problem+json"


def test_studies_are_listed_newest_first_page_by_page(client: httpx.Client) -> None:
    for number in range(5):
        post(client, name=f"study-{number}")
    seen: list[str] = []
    query: dict[str, Any] = {"limit": 2}
    while True:
        page = client.get("/v1/studies", params=query).json()
        assert len(page["items"]) <= 2
        seen += [study["name"] for study in page["items"]]
        if page["next"] is None:
            break
        query["cursor"] = page["next"]
    assert seen == [f"study-{number}" for number in (4, 3, 2, 1, 0)]


def test_a_study_posted_meanwhile_does_not_shift_the_pages(client: httpx.Client) -> None:
    for number in range(3):
        post(client, name=f"study-{number}")
    first = client.get("/v1/studies", params={"limit": 2}).json()
    post(client, name="late")
    second = client.get("/v1/studies", params={"cursor": first["next"]}).json()
    assert [study["name"] for study in second["items"]] == ["study-0"]


def test_studies_are_listed_by_state_with_how_they_stand(
    client: httpx.Client, engine: Engine
) -> None:
    study = builders.create(engine, "busy")
    builders.append(engine, study, 2)
    builders.complete(engine, builders.lease(engine, study), 0.125)
    post(client, name="over")
    client.post("/v1/studies/over/cancel")
    (active,) = client.get("/v1/studies", params={"state": "active"}).json()["items"]
    assert active["name"] == "busy"
    assert active["counts"]["complete"] == 1
    assert active["best_validation_loss"] == 0.125
    (cancelled,) = client.get("/v1/studies", params={"state": "cancelled"}).json()["items"]
    assert cancelled["reason"] == "cancelled by request"


def test_the_events_say_who_it_was(client: httpx.Client, engine: Engine) -> None:
    post(client)
    with engine.connect() as connection:
        actors = connection.execute(text("SELECT actor FROM regtune.events")).scalars().all()
    assert actors == ["client 127.0.0.1"]


def test_a_study_of_a_newer_version_keeps_no_other_from_being_listed(
    client: httpx.Client, engine: Engine
) -> None:
    for name in ("old", "new"):
        post(client, name=name)
    with engine.begin() as connection:
        newer = """UPDATE regtune.studies SET spec = spec || '{"newer": 1}' WHERE name = 'new'"""
        connection.execute(text(newer))
    assert [one["name"] for one in client.get("/v1/studies").json()["items"]] == ["new", "old"]
    for answer in (
        client.get("/v1/studies/new"),
        client.get("/v1/studies/new/best"),
        client.patch("/v1/studies/new", json={"budget": {"trials": 99}}),
    ):
        assert answer.status_code == 503, answer.text
        assert answer.json()["type"] == "urn:regtune:problem:study-unreadable"
        assert "another version of regtune has written this study: newer: " in answer.text


def test_workers_are_listed_with_what_they_offer(client: httpx.Client, engine: Engine) -> None:
    register(engine, "b", datasets="digits mnist")
    register(engine, "a")
    with transaction(engine) as session:
        workers.leave(session, "a", "h", 1)
    everyone = client.get("/v1/workers").json()["items"]
    assert [(worker["name"], worker["alive"]) for worker in everyone] == [("b", True), ("a", False)]
    assert everyone[0]["datasets"] == ["digits", "mnist"]
    (gone,) = client.get("/v1/workers", params={"alive": False}).json()["items"]
    assert gone["name"] == "a"


def test_a_worker_says_how_full_it_is_and_how_its_lanes_were_counted(
    client: httpx.Client, engine: Engine
) -> None:
    def beat(**changes: Any) -> dict[str, Any]:
        with transaction(engine) as session:
            workers.beat(session, "w", wanted_lanes=0, study_id=None, **changes)
        worker: dict[str, Any] = client.get("/v1/workers").json()["items"][0]
        return {key: worker[key] for key in ("lanes", "occupancy", "capacity")}

    register(engine)
    assert beat() == {"lanes": 2, "occupancy": None, "capacity": None}
    counted = {
        "lanes": 64,
        "reason": "more lanes train no more trial-epochs a second",
        "bytes_per_lane": 1_200_000,
        "trial_epochs_per_second": 812.5,
        "data": "streamed",
    }
    known = {"lanes": 64, "occupancy": 0.75, "capacity": counted}
    assert beat(**known) == known
    assert beat() == known
    assert beat(occupancy=0.0)["occupancy"] == 0
    told = {"lanes": 2, "reason": "REGTUNE_LANES says so"}
    unmeasured = {"bytes_per_lane": None, "trial_epochs_per_second": None, "data": None}
    assert beat(capacity=told)["capacity"] == told | unmeasured
    register(engine)
    assert beat() == {"lanes": 2, "occupancy": None, "capacity": None}


def test_every_answer_is_json_that_a_strict_reader_takes(
    client: httpx.Client, engine: Engine
) -> None:
    study = builders.create(engine, "study")
    builders.append(engine, study, 1)
    builders.complete(engine, builders.lease(engine, study), float("inf"))

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    for path in ("", "/study", "/study/trials", "/study/trials/0"):
        json.loads(client.get(f"/v1/studies{path}").text, parse_constant=refuse)


def test_a_study_waits_for_the_device_that_it_requires(
    client: httpx.Client, engine: Engine
) -> None:
    register(engine)
    wants = {"device": "cuda", "min_memory_gb": 16}
    study = post(client, requires=wants).json()
    assert study["spec"]["requires"] == wants
    assert study["warning"] == (
        "none of the 1 living workers that offer its task has a cuda device with at least 16 GB; "
        "the study waits for one that does"
    )
    builders.register(engine, "gpu", device_kind="cuda", memory_bytes=16 * 10**9)
    assert client.get("/v1/studies/study").json()["warning"] is None
    shown = {w["name"]: w for w in client.get("/v1/workers").json()["items"]}
    assert (shown["gpu"]["device_kind"], shown["gpu"]["memory_bytes"]) == ("cuda", 16 * 10**9)
    response = post(client, name="other", requires={"device": "gpu"})
    assert response.status_code == 422
    assert "'cuda'" in response.json()["errors"][0]["message"]
