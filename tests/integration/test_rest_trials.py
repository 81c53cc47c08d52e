import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine

from regtune import leasing, reporting, studies
from regtune.database import transaction
from regtune.leasing import Lease
from regtune.reporting import Completed, Failed, Outcome, Pruned
from regtune.studies import ModelFacts, Study
from tests import builders

TRIALS = "/v1/studies/study/trials"


def finish(engine: Engine, lease: Lease, outcome: Outcome, *losses: float) -> None:
    """Record an epoch for each loss and end a trial."""
    epochs = [builders.epoch(number, loss) for number, loss in enumerate(losses, 1)]
    with transaction(engine) as session:
        reporting.flush(session, [lease], {lease.trial_id: epochs}, 30)
        assert reporting.finish(session, [(lease, outcome)], "w")


def complete_with(engine: Engine, study: Study, *losses: float) -> None:
    """Complete a trial with each of these validation losses, in the order of their numbers."""
    for loss in losses:
        (lease,) = builders.lease(engine, study)
        finish(engine, lease, builders.completed(loss), loss)


def pages(client: httpx.Client, **query: Any) -> Iterator[list[dict[str, Any]]]:
    while True:
        page = client.get(TRIALS, params=query).json()
        yield page["items"]
        if page["next"] is None:
            return
        query["cursor"] = page["next"]


def numbers(client: httpx.Client, **query: Any) -> list[int]:
    return [trial["number"] for page in pages(client, **query) for trial in page]


@pytest.fixture
def study(engine: Engine) -> Study:
    """A study of 12 trials; numbers 0 to 7 have these losses, two run and two wait."""
    study = builders.create(engine, budget={"trials": 20})
    builders.append(engine, study, 12)
    complete_with(engine, study, 0.5, 0.25, 0.5, float("inf"), 0.125, 0.5, 0.75, 0.5)
    builders.lease(engine, study, 2)
    return study


def test_trials_come_in_order_page_by_page_and_without_a_value_last(
    client: httpx.Client, study: Study
) -> None:
    orders: list[tuple[dict[str, str], list[int]]] = [
        ({}, list(range(12))),
        ({"direction": "desc"}, list(range(11, -1, -1))),
        ({"order_by": "value"}, [4, 1, 0, 2, 5, 7, 6, 3, 8, 9, 10, 11]),
        ({"order_by": "value", "direction": "desc"}, [3, 6, 0, 2, 5, 7, 1, 4, 8, 9, 10, 11]),
        ({"order_by": "value", "state": "complete"}, [4, 1, 0, 2, 5, 7, 6, 3]),
        ({"state": "running", "direction": "desc"}, [9, 8]),
    ]
    for (order, expected), limit in itertools.product(orders, (1, 2, 3, 5, 100)):
        assert numbers(client, limit=limit, **order) == expected
        assert all(len(page) <= limit for page in pages(client, limit=limit, **order))


def test_a_trial_that_ends_meanwhile_neither_repeats_nor_hides_another(
    client: httpx.Client, engine: Engine, study: Study
) -> None:
    by_value = pages(client, order_by="value", limit=4)
    seen = [trial["number"] for trial in next(by_value)]
    complete_with(engine, study, 0.01)
    seen += [trial["number"] for page in by_value for trial in page]
    # The trial that came to the front was on a page that was read already, and is left out.
    assert seen == [4, 1, 0, 2, 5, 7, 6, 3, 8, 9, 11]


def test_a_cursor_belongs_to_its_list(client: httpx.Client, study: Study) -> None:
    cursor = client.get(TRIALS, params={"limit": 1}).json()["next"]
    assert client.get(TRIALS, params={"cursor": cursor}).is_success
    for query in ({"order_by": "value"}, {"direction": "desc"}):
        response = client.get(TRIALS, params={"cursor": cursor, **query})
        assert response.status_code == 422
        assert response.json()["errors"][0]["field"] == "cursor"


def test_a_trial_shows_what_is_used_and_what_was_suggested(
    client: httpx.Client, engine: Engine
) -> None:
    search = {"weight_decay": [0.0, 0.5], "dropout": 0.3}
    study = builders.create(engine, search=search)
    suggested = {"weight_decay": 0.5, "l1_lambda": 2e-5, "patience": 7}
    suggestion = builders.as_suggestion(study.spec, 0, suggested, {})
    with transaction(engine) as session:
        leasing.append(session, study.study_id, [suggestion], expected=0)
    trial = client.get(f"{TRIALS}/0").json()
    assert trial["suggested"] == suggested
    assert trial["params"] == {
        "weight_decay": 0.5,
        "dropout": 0.3,
        "l1_lambda": 0.0,
        "patience": 7,
        "learning_rate": 0.001,
        "label_smoothing": 0.0,
        "input_noise": 0.0,
        "weight_noise": 0.0,
        "max_norm": 0.0,
        "max_gradient_norm": 0.0,
        "input_dropout": 0.0,
        "augment_strength": 0.0,
        "mixup": 0.0,
    }
    assert isinstance(trial["params"]["patience"], int)
    assert (trial["kind"], trial["state"], trial["attempts"]) == ("baseline", "waiting", 0)
    assert trial["epochs"] == []


def test_a_complete_trial_shows_its_epochs_and_figures(
    client: httpx.Client, engine: Engine
) -> None:
    study = builders.create(engine)
    builders.append(engine, study, 1)
    (lease,) = builders.lease(engine, study, worker="gpu-7")
    finish(engine, lease, Completed(0.25, 0.9, 2, 0.375, 0.8, "no improvement"), 1.0, 0.25, 0.5)
    trial = client.get(f"{TRIALS}/0").json()
    assert [epoch["validation_loss"] for epoch in trial["epochs"]] == [1.0, 0.25, 0.5]
    assert trial["epochs"][1] == {
        "epoch": 2,
        "train_loss": 0.5,
        "validation_loss": 0.25,
        "validation_score": 0.5,
        "penalty": 0.1,
        "sparsity": 0.0,
        "seconds": 0.01,
    }
    assert (trial["validation_loss"], trial["epoch"], trial["test_loss"]) == (0.25, 2, 0.375)
    assert (trial["reason"], trial["worker"], trial["attempt"]) == ("no improvement", "gpu-7", 1)
    assert trial["created_at"] <= trial["started_at"] <= trial["finished_at"]


def test_the_spread_over_members_is_shown_where_there_are_several(
    client: httpx.Client, engine: Engine
) -> None:
    study = builders.create(engine, validation={"folds": 5})
    builders.append(engine, study, 2)
    (several, one) = builders.lease(engine, study, 2)
    finish(engine, several, replace(builders.completed(0.25), validation_loss_spread=0.125), 0.25)
    finish(engine, one, builders.completed(0.5), 0.5)
    for path, value in (
        ("trials/0", 0.125),
        ("trials/1", None),
        ("best", 0.125),
    ):
        shown = client.get(f"/v1/studies/study/{path}").json()
        assert shown["validation_loss_spread"] == value, path
    listed = client.get(TRIALS).json()["items"]
    assert [trial["validation_loss_spread"] for trial in listed] == [0.125, None]


FACTS = ModelFacts(
    parameters=9_738,
    penalized=["layers.0.weight", "layers.4.weight"],
    spared=["layers.0.bias"],
    dropout_sites=["layers.3"],
    vectorized=True,
    steps_per_epoch=50,
    training_rows=1_149,
)


def timescales(client: httpx.Client, study: Study) -> list[float | None]:
    """What the API says of a study's first two trials, wherever it tells of them."""
    listed = client.get(f"/v1/studies/{study.name}/trials").json()["items"]
    by_number = [trial["decay_timescale_epochs"] for trial in listed]
    shown = client.get(f"/v1/studies/{study.name}").json()
    best = client.get(f"/v1/studies/{study.name}/best").json()
    for told in (shown["best"], shown["baseline"], best, best["baseline"]):
        assert told["decay_timescale_epochs"] == by_number[told["number"]]
    for number, expected in enumerate(by_number):
        trial = client.get(f"/v1/studies/{study.name}/trials/{number}").json()
        assert trial["decay_timescale_epochs"] == expected
    return by_number


def describe(engine: Engine, study: Study) -> None:
    with transaction(engine) as session:
        studies.describe_model(session, study.study_id, FACTS)


def test_the_time_scale_of_the_decay_is_told_once_a_worker_knows_the_steps(
    client: httpx.Client, engine: Engine
) -> None:
    search = {"weight_decay": [0.0, 0.5], "learning_rate": [0.004, 0.002]}
    study = builders.create(engine, search=search)
    points = [
        {"weight_decay": 0.0, "learning_rate": 0.002},
        {"weight_decay": 0.5, "learning_rate": 0.004},
    ]
    others = {"dropout": 0.0, "l1_lambda": 0.01, "patience": 7}
    suggestions = [
        builders.as_suggestion(study.spec, number, point | others, {})
        for number, point in enumerate(points)
    ]
    with transaction(engine) as session:
        leasing.append(session, study.study_id, suggestions, expected=0)
    complete_with(engine, study, 0.5, 0.25)
    assert timescales(client, study) == [None, None]
    describe(engine, study)
    # 1 / (0.004 · 0.5 · 50 steps)
    assert timescales(client, study) == [None, pytest.approx(10.0)]


def test_coupled_decay_has_no_such_time_scale(client: httpx.Client, engine: Engine) -> None:
    study = builders.create(engine, training={"optimizer": "adam"})
    builders.append(engine, study, 2)
    complete_with(engine, study, 0.5, 0.25)
    describe(engine, study)
    assert timescales(client, study) == [None, None]


def test_a_decay_too_small_for_a_number_has_no_time_scale(
    client: httpx.Client, engine: Engine
) -> None:
    study = builders.create(engine, search={"weight_decay": 5e-324})
    builders.append(engine, study, 1)
    describe(engine, study)
    assert client.get(f"{TRIALS}/0").json()["decay_timescale_epochs"] is None


def test_the_best_trial_comes_with_what_was_searched(client: httpx.Client, engine: Engine) -> None:
    study = builders.create(engine, search={"dropout": 0.5, "weight_noise": [0.0, 0.1]})
    builders.append(engine, study, 1)
    complete_with(engine, study, 0.5)
    searched = client.get("/v1/studies/study/best").json()["searched"]
    assert searched == ["weight_decay", "l1_lambda", "patience", "weight_noise"]


def test_a_diverged_epoch_is_null(client: httpx.Client, engine: Engine) -> None:
    study = builders.create(engine)
    builders.append(engine, study, 1)
    (lease,) = builders.lease(engine, study)
    finish(engine, lease, Pruned("diverged"), 1.0, float("nan"))
    trial = client.get(f"{TRIALS}/0").json()
    assert (trial["state"], trial["reason"]) == ("pruned", "diverged")
    assert [epoch["validation_loss"] for epoch in trial["epochs"]] == [1.0, None]


def test_a_failed_trial_shows_the_traceback(client: httpx.Client, engine: Engine) -> None:
    study = builders.create(engine)
    builders.append(engine, study, 1)
    (lease,) = builders.lease(engine, study)
    finish(engine, lease, Failed("ValueError: no", "Traceback …\nValueError: no"))
    trial = client.get(f"{TRIALS}/0").json()
    assert (trial["state"], trial["error"]) == ("failed", "Traceback …\nValueError: no")


def test_each_attempt_has_its_own_epochs(client: httpx.Client, engine: Engine) -> None:
    study = builders.create(engine)
    builders.append(engine, study, 1)
    (first,) = builders.lease(engine, study)
    with transaction(engine) as session:
        reporting.flush(session, [first], {first.trial_id: [builders.epoch(1, 9.0)]}, 30)
        leasing.release(session, [first], "w")
    (second,) = builders.lease(engine, study)
    finish(engine, second, builders.completed(0.5), 0.5)

    def losses(**query: int) -> list[float]:
        trial = client.get(f"{TRIALS}/0", params=query).json()
        return [epoch["validation_loss"] for epoch in trial["epochs"]]

    assert losses() == losses(attempt=2) == [0.5]
    assert losses(attempt=1) == [9.0]
    assert client.get(f"{TRIALS}/0", params={"attempt": 3}).status_code == 404


def test_a_trial_that_is_none(client: httpx.Client, study: Study) -> None:
    assert client.get(f"{TRIALS}/99").status_code == 404
    for number in ("-1", "x", "1e3", "%00", str(2**31)):
        assert client.get(f"{TRIALS}/{number}").status_code == 422, number


def test_the_best_trial_is_found_by_validation_loss_alone(
    client: httpx.Client, engine: Engine
) -> None:
    study = builders.create(engine)
    builders.append(engine, study, 5)
    # loss on validation, score on test
    for loss, test_score in [(0.5, 0.99), (0.25, 0.5), (0.125, 0.4), (0.125, 0.9)]:
        (lease,) = builders.lease(engine, study)
        finish(engine, lease, Completed(loss, 0.9, 1, 0.6, test_score, "finished"), loss)
    (lease,) = builders.lease(engine, study)
    finish(engine, lease, Pruned("looks bad"), 0.01)
    best = client.get("/v1/studies/study/best").json()
    assert (best["study"], best["number"], best["kind"]) == ("study", 2, "suggested")
    assert (best["validation_loss"], best["test_score"], best["epoch"]) == (0.125, 0.4, 1)
    baseline = best["baseline"]
    assert (baseline["number"], baseline["kind"], baseline["test_score"]) == (0, "baseline", 0.99)
    shown = client.get("/v1/studies/study").json()
    assert shown["best"] == {
        key: value
        for key, value in best.items()
        if key not in ("study", "searched", "score", "baseline", "default")
    }
    assert shown["baseline"] == baseline
    default = best["default"]
    assert (default["number"], default["kind"], default["test_score"]) == (1, "default", 0.5)
    assert shown["default"] == default


def test_there_is_no_best_trial_before_one_is_complete(
    client: httpx.Client, engine: Engine
) -> None:
    study = builders.create(engine)
    builders.append(engine, study, 3)
    (diverged, _) = builders.lease(engine, study, 2)
    finish(engine, diverged, builders.completed(float("inf")), float("inf"))
    response = client.get("/v1/studies/study/best")
    assert response.status_code == 404
    assert response.json()["type"] == "urn:regtune:problem:no-best-yet"
    assert "1 running, 1 waiting" in response.json()["detail"]


def test_the_baseline_is_missing_until_it_is_complete(client: httpx.Client, engine: Engine) -> None:
    study = builders.create(engine)
    builders.append(engine, study, 2)
    (baseline, default) = builders.lease(engine, study, 2)
    finish(engine, default, builders.completed(0.5), 0.5)
    best = client.get("/v1/studies/study/best").json()
    assert (best["baseline"], best["default"]["number"]) == (None, 1)
    finish(engine, baseline, builders.completed(0.75), 0.75)
    assert client.get("/v1/studies/study/best").json()["baseline"]["number"] == 0


def test_trials_of_a_deleted_study_are_gone(client: httpx.Client, engine: Engine) -> None:
    study = builders.create(engine)
    builders.append(engine, study, 1)
    with transaction(engine) as session:
        studies.act(session, "study", "cancel", "test")
    assert client.delete("/v1/studies/study").status_code == 204
    assert client.get(TRIALS).status_code == 404
