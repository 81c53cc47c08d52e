"""Studies that search what makes shapes: which worker trains which, and to what end."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import optuna
import pytest
from sqlalchemy import Engine, event, text

from regtune import leasing, shapes, studies
from regtune.database import transaction
from regtune.leasing import Lease, Suggestion
from regtune.settings import Settings
from regtune.spec import read_shape
from regtune.studies import ModelFacts, Study
from service.scheduler.suggestion import as_suggestion, distributions
from tests import builders
from tests.audit import audit
from tests.threads import run_until_over
from worker.training.epoch import Epochs

A, B = '{"batch_size":64}', '{"batch_size":256}'
BATCHES = {"batch_size": [64, 256], "dropout": 0.1, "weight_decay": 0.0, "l1_lambda": 0.0}

SEARCH = {
    "optimizer": ["adamw", "sgd"],
    "batch_size": [64, 256],
    "model": {"hidden": [[32], [64]]},
}
"""Eight shapes."""


def suggestion(study: Study, batch_size: int) -> Suggestion:
    return as_suggestion(study.spec, 2, {"batch_size": batch_size, "patience": 7}, {})


def append(engine: Engine, study: Study, *batch_sizes: int) -> None:
    with transaction(engine) as session:
        appended = studies.by_id(session, study.study_id).appended
        made = [suggestion(study, batch_size) for batch_size in batch_sizes]
        leasing.append(session, study.study_id, made, expected=appended)


def choose(engine: Engine, study: Study, current: str | None = None, worker: str = "w") -> Any:
    with transaction(engine) as session:
        return shapes.choose(session, study.study_id, worker, current=current, suspect_from=2)


def lease(engine: Engine, study: Study, shape: str, count: int = 9) -> Sequence[Lease]:
    with transaction(engine) as session:
        return leasing.lease(session, study.study_id, "w", count, 30, shape=shape)


@pytest.fixture
def study(engine: Engine) -> Study:
    return builders.create(engine, search=BATCHES, budget={"trials": 20})


def test_a_lease_takes_trials_of_its_shape_alone(engine: Engine, study: Study) -> None:
    append(engine, study, 64, 256, 256, 64)
    assert [held.number for held in lease(engine, study, B)] == [1, 2]
    assert [held.number for held in lease(engine, study, A, 1)] == [0]
    assert [held.number for held in lease(engine, study, A)] == [3]
    assert lease(engine, study, A) == []


def test_the_shape_of_the_oldest_waiting_trial_is_next(engine: Engine, study: Study) -> None:
    assert choose(engine, study) is None
    append(engine, study, 64, 256, 256, 64)
    assert choose(engine, study) == A
    lease(engine, study, A, 1)
    assert choose(engine, study) == B


def test_a_worker_stays_with_a_shape_of_which_a_trial_waits(engine: Engine, study: Study) -> None:
    append(engine, study, 64, 256)
    assert choose(engine, study, current=B) == B
    lease(engine, study, B)
    assert choose(engine, study, current=B) == A


def test_workers_go_where_few_others_are(engine: Engine, study: Study) -> None:
    append(engine, study, 64, 64, 256, 64, 64)
    lease(engine, study, A, 2)
    assert choose(engine, study, worker="another") == B
    lease(engine, study, B)
    append(engine, study, 256)
    assert choose(engine, study, worker="another") == B  # one is trained of it, of the other two
    assert choose(engine, study, worker="w") == A  # its own trials do not count


def test_the_shape_of_a_trial_that_may_kill_its_worker_comes_last(engine, study) -> None:
    append(engine, study, 64, 256)
    with engine.begin() as connection:
        connection.execute(text("UPDATE regtune.trials SET lost_leases = 2 WHERE number = 0"))
    assert choose(engine, study, current=A) == B
    lease(engine, study, B)
    assert choose(engine, study) == A


def test_a_shape_is_described_by_the_first_worker_that_built_it(engine: Engine, study) -> None:
    facts = [ModelFacts(n, ["w"], [], [], True, 5, 9, data_hash="x") for n in range(3)]
    with transaction(engine) as session:
        shapes.describe(session, study.study_id, B, facts[0])
        shapes.describe(session, study.study_id, A, facts[1])
        shapes.describe(session, study.study_id, B, facts[2])
        assert shapes.known(session, study.study_id) == {B: facts[0], A: facts[1]}


def test_a_time_scale_is_that_of_the_trial_s_own_batch_size(engine: Engine) -> None:
    search = {"batch_size": [64, 256], "optimizer": ["adamw", "sgd"], "weight_decay": 0.5}
    study = builders.create(engine, search=search, budget={"trials": 20})
    facts = ModelFacts(1, ["w"], [], [], True, steps_per_epoch=16, training_rows=1000)
    with transaction(engine) as session:
        studies.describe_model(session, study.study_id, facts)
        study = studies.by_id(session, study.study_id)
    params = {"learning_rate": 0.001, "weight_decay": 0.5, "optimizer": "adamw"}
    for batch_size, steps in ((64, 16), (256, 4)):
        told = study.decay_timescale_epochs({**params, "batch_size": batch_size})
        assert told == pytest.approx(1 / (0.001 * 0.5 * steps))
    assert study.decay_timescale_epochs({**params, "batch_size": 64, "optimizer": "sgd"}) is None


def test_a_time_scale_is_that_of_the_decay_of_the_trial_s_own_optimizer(engine: Engine) -> None:
    facts = ModelFacts(1, ["w"], [], [], True, steps_per_epoch=16, training_rows=1000)
    params = {"learning_rate": 0.001, "weight_decay": 0.5, "optimizer": "sgd"}
    for training, expected in (({}, None), ({"decay": "decoupled"}, 1 / (0.001 * 0.5 * 16))):
        with transaction(engine) as session:
            study = builders.create(
                engine,
                f"s{len(training)}",
                search={"optimizer": ["adamw", "sgd"]},
                training=training,
            )
            studies.describe_model(session, study.study_id, facts)
            study = studies.by_id(session, study.study_id)
        assert study.decay_timescale_epochs(params) == expected
        told = study.decay_timescale_epochs({**params, "optimizer": "adamw"})
        assert told == pytest.approx(1 / (0.001 * 0.5 * 16))


@pytest.mark.parametrize("fault", ["model", "rows", "memory", "unheard of"])
def test_a_setting_of_a_task_of_one_s_own_is_searched(
    engine: Engine,
    database_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
) -> None:
    """Trials fail alone if their setting lets own code raise, spoils the data or is refused.

    Or if no worker has memory for it, a moment later neither.
    """
    monkeypatch.setattr("worker.refusals.FIRST_SECONDS", 0.2)
    study = builders.create(
        engine,
        task="broken",
        search={"model": {"fault": ["none", fault]}, "dropout": 0.0},
        training={"max_epochs": 2},
        sampler="random",
        pruner="none",
        budget={"trials": 8},
    )
    settings = Settings(
        data_dir=tmp_path,
        lanes=4,
        poll_seconds=0.1,
        tasks={"broken": "tests.plugins.broken:Broken"},
    )
    run_until_over(engine, database_url, settings, study)
    rows = trials(engine, study)
    assert audit(engine) == {}
    assert {(row.params["model.fault"], row.state) for row in rows} == {
        ("none", "complete"),
        (fault, "failed"),
    }


def test_a_study_of_one_shape_costs_no_statement_about_shapes(
    engine: Engine, database_url: str, tmp_path: Path
) -> None:
    study = builders.create(engine, training={"max_epochs": 2}, budget={"trials": 6})
    settings = Settings(data_dir=tmp_path, lanes=2, poll_seconds=0.1)
    asked = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        asked.append(statement)

    event.listen(Engine, "before_cursor_execute", note)
    try:
        run_until_over(engine, database_url, settings, study)
    finally:
        event.remove(Engine, "before_cursor_execute", note)
    assert any("t.shape = " in statement for statement in asked)  # leases
    assert not [s for s in asked if "GROUP BY shape" in s or "regtune.shapes" in s]


@pytest.mark.slow
def test_a_study_of_eight_shapes_is_trained_to_its_end(
    engine: Engine, database_url: str, tmp_path: Path, client: httpx.Client
) -> None:
    study = builders.create(
        engine,
        search=SEARCH,
        training={"max_epochs": 3},
        sampler="random",
        budget={"trials": 24},
    )
    settings = Settings(data_dir=tmp_path, lanes=4, poll_seconds=0.1)
    run_until_over(engine, database_url, settings, study)
    rows = trials(engine, study)
    assert audit(engine) == {}
    assert [row.number for row in rows] == list(range(24))
    assert {row.state for row in rows} <= {"complete", "pruned"}
    assert (
        study.spec.at(rows[0].shape).canonical()["training"] == study.spec.canonical()["training"]
    )
    for row in rows:
        assert read_shape(row.shape).items() <= row.params.items()
    assert_stacks_hold_one_shape(rows)

    shown = client.get("/v1/studies/study").json()
    built = {tuple(map(str, shape["params"].values())): shape["model"] for shape in shown["shapes"]}
    assert len(built) == len({row.shape for row in rows}) > 3
    for (_, hidden, _), model in built.items():
        width = int(hidden.strip("[]"))
        assert model["parameters"] == 64 * width + 2 * width + width * 10 + 10
    assert {model["steps_per_epoch"] for model in built.values()} == {5, 18}
    assert len({model["data_hash"] for model in built.values()}) == 1

    best = client.get("/v1/studies/study/best").json()
    names = ["optimizer", "batch_size", "model.hidden", "weight_decay"]
    assert best["searched"] == [*names, "dropout", "l1_lambda", "patience"]
    assert (
        best["baseline"]["params"].items()
        >= {
            "optimizer": "adamw",
            "batch_size": 64,
            "model.hidden": [32],
            "weight_decay": 0.0,
            "learning_rate": 0.001,
        }.items()
    )
    for row in rows:
        asked = client.get(f"/v1/studies/study/trials/{row.number}").json()
        assert asked["params"] == row.params
        assert set(asked["suggested"]) == set(best["searched"])
        assert row.params["learning_rate"] == {"adamw": 0.001, "sgd": 0.01}[row.params["optimizer"]]
        assert 0 <= row.params["weight_decay"] <= {"adamw": 3, "sgd": 0.01}[row.params["optimizer"]]
    read = optuna.load_study(study_name="study", storage=database_url)
    space = distributions(study.spec)
    for trial in read.get_trials():
        own = f"weight_decay[{trial.params['optimizer']}]"
        assert set(trial.params) == {*names[:3], own, "dropout", "l1_lambda", "patience"}
        assert trial.distributions == {name: space[name] for name in trial.params}
    client.delete("/v1/studies/study").raise_for_status()
    assert client.get("/v1/studies/study").status_code == 404


@pytest.mark.slow
def test_a_trial_comes_to_the_same_as_in_a_study_of_its_shape_alone(
    engine: Engine, database_url: str, tmp_path: Path
) -> None:
    common = {"training": {"max_epochs": 3}, "sampler": "random", "pruner": "none"}
    study = builders.create(engine, **common, search=SEARCH, budget={"trials": 8})
    settings = Settings(data_dir=tmp_path, lanes=4, poll_seconds=0.1)
    run_until_over(engine, database_url, settings, study)
    row = next(row for row in trials(engine, study) if row.params["optimizer"] == "sgd")
    own = {name: value for name, value in row.params.items() if name not in read_shape(row.shape)}
    alone = builders.create(
        engine,
        "alone",
        **common
        | {
            "training": {
                "max_epochs": 3,
                "optimizer": "sgd",
                "batch_size": row.params["batch_size"],
            }
        },
        task={"dataset": "digits", "model": "mlp", "hidden": row.params["model.hidden"]},
        search={**own, "patience": [own["patience"]]},
        budget={"trials": 1},
    )
    run_until_over(engine, database_url, settings, alone)
    (same,) = trials(engine, alone)
    assert same.value == pytest.approx(row.value, rel=1e-5)
    assert same.test_score == row.test_score


@pytest.mark.slow
def test_no_shape_starves_and_no_lane_is_thrown_away(
    engine: Engine, database_url: str, tmp_path: Path
) -> None:
    """The shape of one early trial is trained before that of many later ones is done with."""
    search = {**BATCHES, "batch_size": [256, 64], "patience": [7, 9]}
    study = builders.create(
        engine, search=search, training={"max_epochs": 4}, pruner="none", budget={"trials": 40}
    )
    append(engine, study, 256, 256, 64, *[256] * 37)
    settings = Settings(data_dir=tmp_path, lanes=2, stay_seconds=0.5, poll_seconds=0.1)
    run_until_over(engine, database_url, settings, study)
    rows = trials(engine, study)
    assert audit(engine) == {}
    assert all((row.state, row.attempt) == ("complete", 1) for row in rows)
    assert_stacks_hold_one_shape(rows)
    before = [row for row in rows if row.started_at < rows[2].started_at]
    assert len(before) < 38


def test_a_lone_trial_may_try_more_threads_unless_the_whole_study_is_ending(
    engine: Engine, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That a slot is free says nothing: a trial of another shape waits."""
    train, seen = Epochs.train, list[tuple[int, bool]]()

    def spy(self: Epochs, tensors: Any, *others: Any, trying: bool) -> Any:
        seen.append((len(tensors), trying))
        return train(self, tensors, *others, trying=trying)

    monkeypatch.setattr(Epochs, "train", spy)
    search = {**BATCHES, "batch_size": [256, 64], "patience": [7, 9]}
    study = builders.create(
        engine, search=search, training={"max_epochs": 3}, pruner="none", budget={"trials": 2}
    )
    append(engine, study, 256, 64)
    settings = Settings(data_dir=tmp_path, lanes=2, poll_seconds=0.1)
    run_until_over(engine, database_url, settings, study)
    assert seen == [(1, True)] * 3 + [(1, False)] * 3


def trials(engine: Engine, study: Study) -> Sequence[Any]:
    with engine.connect() as connection:
        query = "SELECT * FROM regtune.trials WHERE study_id = :id ORDER BY number"
        return connection.execute(text(query), {"id": study.study_id}).all()


def assert_stacks_hold_one_shape(rows: Sequence[Any]) -> None:
    """One worker has trained them: trials of two shapes are never in training at a time."""
    for row in rows:
        beside = [
            other.shape
            for other in rows
            if other.leased_at < row.finished_at and row.leased_at < other.finished_at
        ]
        assert set(beside) == {row.shape}
