"""A real worker and a real scheduler, in threads, on a real database."""

import itertools
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from PIL import Image
from sqlalchemy import Engine, text
from sqlalchemy.exc import OperationalError
from structlog.testing import capture_logs

from regtune import events, studies, workers
from regtune.database import transaction
from regtune.settings import Settings
from regtune.spec.preset import PresetName
from regtune.studies import ModelFacts, Study
from tests import builders
from tests.audit import audit
from tests.threads import run_until_over, working
from tests.waiting import wait_until
from worker.checkpoints import CheckpointStore
from worker.refusals import FIRST_SECONDS
from worker.tasks import decoding
from worker.training import capacity, residence
from worker.training.engine import Engine as TrainingEngine
from worker.training.epoch import Epochs

SHORT = {"training": {"max_epochs": 4, "batch_size": 256}, "budget": {"trials": 6}}


@pytest.fixture
def run(engine: Engine, database_url: str, tmp_path: Path) -> Callable[..., None]:
    """Run scheduler and worker until a study is over."""

    def until_over(study: Study, **changes: Any) -> None:
        settings = Settings(**{"data_dir": tmp_path, "poll_seconds": 0.1, **changes})
        run_until_over(engine, database_url, settings, study)

    return until_over


def trials(engine: Engine, study: Study) -> list[Any]:
    with engine.connect() as connection:
        query = "SELECT * FROM regtune.trials WHERE study_id = :id ORDER BY number"
        return list(connection.execute(text(query), {"id": study.study_id}))


def workers_of(engine: Engine) -> Sequence[workers.Worker]:
    with transaction(engine) as session:
        return workers.everyone(session, 30)


def the_worker(engine: Engine) -> workers.Worker:
    (worker,) = workers_of(engine)
    return worker


def test_a_data_set_that_cannot_be_read_fails_its_trials_with_the_reason(engine, run, tmp_path):
    no_folder = tmp_path / "file"
    no_folder.write_text("not a folder")
    study = builders.create(engine, task={"dataset": "mnist", "model": "mlp"}, budget={"trials": 2})
    run(study, data_dir=no_folder, lanes=2)
    assert builders.study_state(engine, study) == "failed"
    rows = trials(engine, study)
    assert [row.state for row in rows] == ["failed", "failed"]
    assert all(row.reason.startswith(("NotADirectoryError", "FileExistsError")) for row in rows)
    assert all("Traceback" in row.error and "mnist" in row.error for row in rows)
    assert audit(engine) == {}


BROKEN = {"broken": "tests.plugins.broken:Broken"}


@pytest.mark.parametrize(
    ("fault", "reason", "where"),
    [
        ("data", "FileNotFoundError: no recordings", "in data"),
        ("model", "ValueError: no such width", "in model"),
        ("loss", "ZeroDivisionError: nothing to divide by", "in loss"),
        # What PostgreSQL cannot keep.
        ("label", "ValueError: unknown label 'cat\ufffd\ufffd' in ?.csv", "in loss"),
    ],
)
def test_own_code_that_raises_fails_its_trials_with_reason_and_place(
    engine, run, fault, reason, where
):
    study = builders.create(engine, task={"name": "broken", "fault": fault}, budget={"trials": 2})
    run(study, lanes=2, tasks=BROKEN)
    assert builders.study_state(engine, study) == "failed"
    rows = trials(engine, study)
    assert [(row.state, row.reason) for row in rows] == [("failed", reason)] * 2
    assert all(where in row.error for row in rows)
    assert audit(engine) == {}


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        ({"fault": "rows"}, "1 of 90 training inputs are no numbers"),
        (
            {"fault": "storm"},
            "task.fault: should be 'data', 'model', 'loss', 'label', 'rows', 'memory'",
        ),
        ({}, "task.fault: is required"),
        ({"fault": "none", "class_weights": "balanced"}, "task.class_weights weigh the cross"),
    ],
)
def test_what_is_the_same_for_all_workers_ends_the_study_at_its_first_trial(
    engine, run, task, reason
):
    study = builders.create(engine, task={"name": "broken", **task}, budget={"trials": 50})
    run(study, lanes=2, tasks=BROKEN)
    assert builders.study_state(engine, study) == "failed"
    assert reason in describe(engine, study)["reason"]
    assert [row.state for row in trials(engine, study)].count("failed") == 1
    assert audit(engine) == {}


def test_a_study_may_be_streamed_and_says_so(engine, run):
    """The same study, with its rows on the device and not."""
    resident = builders.create(engine, "resident", **SHORT)
    run(resident, lanes=4)
    assert the_worker(engine).capacity["data"] == "resident"
    streamed = builders.create(engine, "streamed", **SHORT)
    run(streamed, lanes=4, data_on_device="never")
    assert the_worker(engine).capacity["data"] == "streamed"
    for ours, theirs in zip(trials(engine, streamed), trials(engine, resident), strict=True):
        assert ours.state == "complete"
        if ours.number < 2:  # the later ones depend on which trials had ended
            assert ours.value == pytest.approx(theirs.value, rel=1e-4)
    assert audit(engine) == {}


def test_an_idle_worker_finds_a_trial_that_nobody_has_called_it_for(
    engine: Engine, database_url: str, tmp_path: Path
) -> None:
    study = builders.create(engine, **SHORT)
    builders.append(engine, study, 2)
    builders.lease(engine, study, 1, "somebody else")
    # Nobody has to hear of this worker for longer than the test takes.
    settings = Settings(data_dir=tmp_path, poll_seconds=0.1, lanes=2, lease_seconds=3600)
    with working(database_url, settings):
        wait_until(lambda: builders.states(engine, study) == ["running", "complete"], 60)
        with engine.begin() as connection:
            connection.execute(text(_GIVE_BACK_UNHEARD))
        wait_until(lambda: builders.states(engine, study) == ["complete", "complete"], 60)


def test_an_idle_worker_is_heard_of_and_wants_all_its_lanes_filled(
    engine: Engine, database_url: str, tmp_path: Path
) -> None:
    """Before its first study, and while one that it has trained may still get trials."""
    settings = Settings(data_dir=tmp_path, poll_seconds=0.1, lanes=2, lease_seconds=1)
    with working(database_url, settings):
        wait_until(lambda: workers_of(engine), 60)
        hear_again_of_the_worker(engine)
        study = builders.create(engine, **SHORT)
        builders.append(engine, study, 1)
        wait_until(lambda: builders.states(engine, study) == ["complete"], 60)
        for _ in range(2):
            hear_again_of_the_worker(engine)
        worker = the_worker(engine)
        assert (worker.wanted_lanes, worker.study, worker.alive) == (2, "study", True)
        with transaction(engine) as session:
            studies.act(session, "study", "cancel", "test")
        wait_until(lambda: the_worker(engine).study is None, 60)


def test_an_idle_worker_that_was_forgotten_registers_again(
    engine: Engine, database_url: str, tmp_path: Path
) -> None:
    """Before its first study, and while one that it has trained may still get trials."""
    settings = Settings(data_dir=tmp_path, poll_seconds=0.1, lanes=2, lease_seconds=1)
    study = builders.create(engine, **SHORT)

    def forget_and_train(trials: int) -> None:
        wait_until(lambda: workers_of(engine), 60)
        with engine.begin() as connection:
            connection.execute(text("DELETE FROM regtune.workers"))
        wait_until(lambda: workers_of(engine), 60)
        builders.append(engine, study, 1)
        wait_until(lambda: builders.states(engine, study) == ["complete"] * trials, 60)

    with working(database_url, settings):
        forget_and_train(1)
        forget_and_train(2)


def test_a_worker_whose_report_is_refused_gives_its_trials_back_and_goes_on(
    engine: Engine, database_url: str, tmp_path: Path
) -> None:
    """As by a rule of the database's own: no lane is left lying until the worker restarts."""
    study = builders.create(engine, **{**SHORT, "training": {"max_epochs": 10_000}})
    builders.append(engine, study, 2)
    with working(database_url, two_lanes(tmp_path)):
        wait_until(lambda: trials(engine, study)[1].epochs > 0, 60)
        with capture_logs() as logs:
            with engine.begin() as connection:
                connection.execute(text(_REFUSE))
            wait_until(lambda: {"database_lost", "stack_closed"} <= {e["event"] for e in logs}, 60)
            with engine.begin() as connection:
                connection.execute(text("DROP TRIGGER refuse ON regtune.epochs"))
        assert builders.states(engine, study) == ["running"] * 2
        builders.expire(engine, study)
        wait_until(lambda: [row.attempt for row in trials(engine, study)] == [2, 2], 60)
        reached = [row.epochs for row in trials(engine, study)]
        wait_until(lambda: trials(engine, study)[1].epochs > reached[1], 60)
    assert builders.states(engine, study) == ["waiting"] * 2
    assert audit(engine) == {}


_REFUSE = """
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
    'BEGIN RAISE restrict_violation; END';
CREATE TRIGGER refuse BEFORE INSERT ON regtune.epochs EXECUTE FUNCTION refuse();
"""


def test_a_study_of_another_version_keeps_no_worker_from_the_others(
    engine: Engine, database_url: str, tmp_path: Path
) -> None:
    unknown, study = (builders.create(engine, name, **SHORT) for name in ("unknown", "study"))
    for one in (unknown, study):
        builders.append(engine, one, 2)
    with engine.begin() as connection:
        newer = (
            """UPDATE regtune.studies SET spec = spec || '{"newer": 1}' WHERE name = 'unknown'"""
        )
        connection.execute(text(newer))
    with working(database_url, two_lanes(tmp_path)):
        wait_until(lambda: builders.states(engine, study) == ["complete"] * 2, 60)
    assert builders.states(engine, unknown) == ["waiting"] * 2


def hear_again_of_the_worker(engine: Engine) -> None:
    before = the_worker(engine).heartbeat_at
    wait_until(lambda: the_worker(engine).heartbeat_at > before, 60)


_GIVE_BACK_UNHEARD = """
UPDATE regtune.trials SET state = 'waiting', token = NULL, lease_expires_at = NULL
WHERE state = 'running'
"""


def two_lanes(data_dir: Path) -> Settings:
    return Settings(data_dir=data_dir, poll_seconds=0.1, lanes=2)


def test_a_worker_without_room_leaves_a_study_to_others_and_says_why(
    engine, client, database_url, tmp_path, monkeypatch
):
    monkeypatch.setattr(residence, "free_bytes", lambda device: 30_000)
    study = builders.create(engine, **SHORT)
    builders.append(engine, study, 3)
    says = "batches of 256 rows 337.9 kB, but 30.0 kB are free; take a smaller training.batch_size"
    with working(database_url, two_lanes(tmp_path)):
        wait_until(lambda: refusals(engine, study), 60)
        warning = client.get("/v1/studies/study").json()["warning"]
        assert "or after some minutes where it lacked something. w: " in warning
        assert says in warning
        other = builders.create(
            engine, "other", **{**SHORT, "training": {"max_epochs": 2, "batch_size": 8}}
        )
        builders.append(engine, other, 1)
        wait_until(lambda: builders.states(engine, other) == ["complete"], 60)
    (entry,) = (
        entry
        for entry in client.get("/v1/studies/study/history").json()["items"]
        if entry["kind"] == "study_refused"
    )
    assert entry["actor"] == "w"
    assert says in entry["detail"]["reason"]
    assert entry["detail"]["tries_again_in_seconds"] == FIRST_SECONDS
    assert builders.study_state(engine, study) == "active"
    assert builders.states(engine, study) == ["waiting"] * 3
    assert audit(engine) == {}


def test_a_worker_that_lacked_room_for_a_while_tries_again(
    engine, client, database_url, tmp_path, monkeypatch
):
    monkeypatch.setattr("worker.refusals.FIRST_SECONDS", 0.5)
    study = builders.create(engine, **SHORT)
    builders.append(engine, study, 3)
    with monkeypatch.context() as patch, working(database_url, two_lanes(tmp_path)):
        patch.setattr(residence, "free_bytes", lambda device: 30_000)
        wait_until(lambda: len(refusals(engine, study)) == 2, 60)
        patch.undo()
        wait_until(lambda: builders.states(engine, study) == ["complete"] * 3, 60)
        assert client.get("/v1/studies/study").json()["warning"] is None
    seconds = [each.detail["tries_again_in_seconds"] for each in refusals(engine, study)]
    assert seconds == [0.5, 1.0]
    assert audit(engine) == {}


def test_a_worker_that_cannot_keep_decoded_images_leaves_the_study_to_others(
    engine, database_url, tmp_path, monkeypatch
):
    monkeypatch.setattr(decoding, "MAPPED_BYTES", 0)
    for number in range(20):
        path = tmp_path / "all" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    (tmp_path / decoding.FOLDER).write_text("no folder")
    data = {"path": "all", "size": 8}
    study = builders.create(
        engine, task={"dataset": "image_folder", "data": data, "model": "mlp"}, **SHORT
    )
    builders.append(engine, study, 2)
    with working(database_url, two_lanes(tmp_path)):
        wait_until(lambda: refusals(engine, study), 60)
    assert "decoded images cannot be kept in" in refusals(engine, study)[0].detail["reason"]
    assert builders.study_state(engine, study) == "active"
    assert builders.states(engine, study) == ["waiting"] * 2
    assert audit(engine) == {}


def test_running_out_of_memory_halves_the_lanes_and_loses_no_trial(engine, run, monkeypatch):
    """The same study, with and without a device that holds two lanes at most.

    On one core, so that lanes are not cut apart: Adam's first steps make much of other rounding.
    """
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    ample = builders.create(engine, "ample", **SHORT)
    run(ample, lanes=4)
    train = Epochs.train

    def train_two_at_most(self, tensors, *arguments, **options):
        result = train(self, tensors, *arguments, **options)
        if len(tensors) > 2:  # in the middle of an epoch, with the lanes in disorder
            for weights in tensors.parameters.values():
                weights.fill_(7)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return result

    monkeypatch.setattr(Epochs, "train", train_two_at_most)
    tight = builders.create(engine, "tight", **SHORT)
    run(tight, lanes=4)
    for ours, theirs in zip(trials(engine, tight), trials(engine, ample), strict=True):
        assert (ours.state, ours.lost_leases) == ("complete", 0)
        if ours.number < 2:  # the later ones depend on which trials had ended
            assert ours.value == pytest.approx(theirs.value, rel=1e-4)
    assert the_worker(engine).lanes == 2
    assert the_worker(engine).capacity == {
        "lanes": 2,
        "reason": "4 lanes ran out of memory",
        "bytes_per_lane": None,
        "trial_epochs_per_second": None,
        "data": "resident",
    }
    assert audit(engine) == {}


@pytest.mark.parametrize(("part", "method"), [(Epochs, "train"), (TrainingEngine, "join")])
def test_a_trial_that_does_not_fit_even_alone_fails_with_the_reason(
    engine, run, monkeypatch, part, method
):
    def too_much(self, *arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(part, method, too_much)
    study = builders.create(engine, **{**SHORT, "budget": {"trials": 2}})
    run(study, lanes=2)
    rows = trials(engine, study)
    assert [row.state for row in rows] == ["failed", "failed"]
    assert all(row.reason == "OutOfMemoryError: CUDA out of memory" for row in rows)
    assert audit(engine) == {}


def runs_out_of_memory(method: Callable[..., Any], calls: Collection[int]) -> Callable[..., Any]:
    """Return a method that runs out of memory in some of its calls, counted from 1."""
    count = itertools.count(1)

    def wrapped(self: object, *arguments: Any, **options: Any) -> Any:
        if next(count) in calls:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return method(self, *arguments, **options)

    return wrapped


def test_a_trained_trial_for_whose_test_there_is_no_memory_is_tested_with_fewer_lanes(
    engine, run, monkeypatch
):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    ample = builders.create(engine, "ample", **SHORT)
    run(ample, lanes=2)
    # Both trials together, then the first by itself; the second is tested at once.
    monkeypatch.setattr(Epochs, "test", runs_out_of_memory(Epochs.test, {1, 2}))
    tight = builders.create(engine, "tight", **SHORT)
    run(tight, lanes=2)
    rows = trials(engine, tight)
    assert [(row.state, row.lost_leases) for row in rows] == [("complete", 0)] * 6
    for ours, theirs in zip(rows[:2], trials(engine, ample)[:2], strict=True):
        assert (ours.value, ours.test_loss) == pytest.approx((theirs.value, theirs.test_loss), 1e-4)
    assert the_worker(engine).lanes == 1
    assert audit(engine) == {}


@pytest.mark.parametrize(
    ("part", "method", "calls"),
    [
        (Epochs, "train", {2, 3}),  # the second epoch, and its second try
        (Epochs, "test", {1}),
        (TrainingEngine, "join", {2}),
    ],
)
def test_a_trial_that_had_room_until_others_took_the_memory_is_trained_later(
    engine, database_url, tmp_path, monkeypatch, part, method, calls
):
    monkeypatch.setattr("worker.refusals.FIRST_SECONDS", 0.5)
    monkeypatch.setattr(part, method, runs_out_of_memory(getattr(part, method), calls))
    study = builders.create(engine, **SHORT)
    builders.append(engine, study, 2)
    settings = Settings(data_dir=tmp_path, poll_seconds=0.1, lanes=1)
    with working(database_url, settings):
        wait_until(lambda: builders.states(engine, study) == ["complete"] * 2, 60)
    (refusal,) = refusals(engine, study)
    assert refusal.detail["lacks"] == "room"
    assert refusal.detail["tries_again_in_seconds"] == 0.5
    assert [row.lost_leases for row in trials(engine, study)] == [0, 0]
    assert audit(engine) == {}


@pytest.mark.parametrize(
    ("lanes", "train", "checkpoint"),
    [
        (2, {2}, {1}),  # of those that are given back, as lanes are halved
        (1, {2, 3}, {2}),  # as the worker lets go of the study
    ],
)
def test_trials_for_whose_checkpoints_there_is_no_memory_are_given_back_all_the_same(
    engine, database_url, tmp_path, monkeypatch, lanes, train, checkpoint
):
    monkeypatch.setattr("worker.refusals.FIRST_SECONDS", 0.5)
    monkeypatch.setattr(Epochs, "train", runs_out_of_memory(Epochs.train, train))
    failing = runs_out_of_memory(TrainingEngine.checkpoint, checkpoint)
    monkeypatch.setattr(TrainingEngine, "checkpoint", failing)
    study = builders.create(engine, **SHORT)
    builders.append(engine, study, 4)
    settings = Settings(data_dir=tmp_path, poll_seconds=0.1, lanes=lanes)
    with working(database_url, settings):
        wait_until(lambda: builders.states(engine, study) == ["complete"] * 4, 60)
    assert len(refusals(engine, study)) == 1
    assert [row.lost_leases for row in trials(engine, study)] == [0] * 4
    assert audit(engine) == {}


def test_a_trial_whose_checkpoint_there_is_no_memory_to_read_goes_on_from_it_later(
    engine, database_url, tmp_path, monkeypatch
):
    """Rather than from its first epoch; and the worker lives."""
    monkeypatch.setattr("worker.refusals.FIRST_SECONDS", 0.5)
    study = builders.create(engine, **SHORT | {"training": {"max_epochs": 40, "batch_size": 8}})
    builders.append(engine, study, 1)
    settings = Settings(data_dir=tmp_path, poll_seconds=0.1, lanes=1)
    with working(database_url, settings):
        wait_until(lambda: builders.column(engine, "SELECT 1 FROM regtune.epochs"), 60)
    failing = runs_out_of_memory(CheckpointStore.newest, {1})
    monkeypatch.setattr(CheckpointStore, "newest", failing)
    (left,) = trials(engine, study)
    assert left.state == "waiting"
    with capture_logs() as logs, working(database_url, settings):
        wait_until(lambda: builders.states(engine, study) == ["complete"], 60)
    (refusal,) = refusals(engine, study)
    assert refusal.detail["lacks"] == "room"
    resumed = [log for log in logs if log["event"] == "resumed"]
    assert [(log["trials"], log["anew"]) for log in resumed] == [(1, 0)]
    assert audit(engine) == {}


def test_a_study_for_which_memory_is_short_again_and_again_is_tried_ever_more_seldom(
    engine, database_url, tmp_path, monkeypatch
):
    """As long as no epoch of it has been trained; then what it lacked was there."""
    monkeypatch.setattr("worker.refusals.FIRST_SECONDS", 0.2)
    # The first epoch of three tries, each time with no memory for a copy before the second try.
    monkeypatch.setattr(Epochs, "train", runs_out_of_memory(Epochs.train, {1, 2, 3}))
    failing = runs_out_of_memory(TrainingEngine.checkpoint, {1, 2, 3})
    monkeypatch.setattr(TrainingEngine, "checkpoint", failing)
    study = builders.create(engine, **SHORT)
    builders.append(engine, study, 1)
    with working(database_url, Settings(data_dir=tmp_path, poll_seconds=0.1, lanes=1)):
        wait_until(lambda: builders.states(engine, study) == ["complete"], 60)
    waits = [refusal.detail["tries_again_in_seconds"] for refusal in refusals(engine, study)]
    assert sorted(waits) == [0.2, 0.4, 0.8]
    assert audit(engine) == {}


def test_a_checkpoint_in_time_for_which_there_is_no_memory_is_done_without(
    engine, database_url, tmp_path, monkeypatch
):
    """The trials stand where they stood: to give them back would be to train them again."""

    def too_much(self: TrainingEngine, keys: Sequence[int]) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(TrainingEngine, "checkpoint", too_much)
    study = builders.create(engine, **SHORT)
    builders.append(engine, study, 4)
    settings = Settings(data_dir=tmp_path, poll_seconds=0.1, lanes=2, checkpoint_seconds=0.001)
    with capture_logs() as logs, working(database_url, settings):
        wait_until(lambda: builders.states(engine, study) == ["complete"] * 4, 60)
    assert "out_of_memory" in {log["event"] for log in logs}
    assert refusals(engine, study) == []
    assert [(row.attempt, row.lost_leases) for row in trials(engine, study)] == [(1, 0)] * 4
    assert audit(engine) == {}


def test_a_worker_says_how_many_lanes_it_has_found_and_how_full_they_were(engine, run, tmp_path):
    """Of more trials than lanes: once nothing waits, empty ones say nothing."""
    trials = 2 * capacity.provisional(torch.device("cpu"))
    study = builders.create(engine, **SHORT | {"budget": {"trials": trials}})
    run(study)
    worker = the_worker(engine)
    assert worker.capacity is not None
    assert worker.lanes == worker.capacity["lanes"] >= 1
    assert worker.capacity["bytes_per_lane"] > 0
    assert 0 < worker.occupancy <= 1
    assert (tmp_path / "capacity.json").exists()
    assert audit(engine) == {}


@pytest.mark.slow
def test_lanes_are_kept_full_until_the_queue_is_empty(engine, run):
    """With trials that end after anything from a few epochs to 40."""
    lanes, count = 8, 64
    study = builders.create(
        engine,
        budget={"trials": count},
        training={"max_epochs": 40, "batch_size": 256, "min_delta": 0.02},
        search={"patience": {"low": 1, "high": 40}},
        sampler="random",
        pruner="none",
    )
    run(study, lanes=lanes)
    rows = trials(engine, study)
    began = min(row.started_at for row in rows)
    empty = max(row.started_at for row in rows)  # when the last one had found a lane
    held = sum((min(row.finished_at, empty) - row.started_at).total_seconds() for row in rows)
    assert held >= 0.9 * lanes * (empty - began).total_seconds()
    assert the_worker(engine).occupancy >= 0.9
    lengths = [row.epochs for row in rows]
    assert min(lengths) < 20 < 35 < max(lengths)
    assert audit(engine) == {}


def test_the_study_tells_what_its_model_is(engine, run):
    study = builders.create(engine, **SHORT)
    run(study, lanes=4)
    with engine.connect() as connection:
        facts = connection.execute(text("SELECT model FROM regtune.studies")).scalar_one()
    assert facts["penalized"] == ["1.weight", "5.weight"]
    assert facts["spared"] == ["2.weight", "2.bias", "5.bias"]
    assert facts["dropout_sites"] == ["4"]
    assert facts["parameters"] == 64 * 128 + 2 * 128 + 128 * 10 + 10
    assert facts["vectorized"] is True
    assert (facts["steps_per_epoch"], facts["training_rows"]) == (5, 1149)


def test_folds_and_repeats_reach_the_answer_with_their_spread(engine, run):
    study = builders.create(engine, **SHORT, validation={"folds": 2, "repeats": 2})
    run(study, lanes=8)
    rows = trials(engine, study)
    assert [row.state for row in rows] == ["complete"] * 6
    assert all(0 < row.value_spread < row.value for row in rows)
    assert the_worker(engine).lanes == 2  # trials, of four lanes each
    assert audit(engine) == {}


def describe(engine: Engine, study: Study) -> dict[str, Any]:
    with engine.connect() as connection:
        query = "SELECT reason, model FROM regtune.studies WHERE study_id = :id"
        return dict(connection.execute(text(query), {"id": study.study_id}).one()._mapping)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "there is no file 't.csv'"),
        ("", "cannot be read: Empty CSV file"),
        ("a,y\n1,2,3\n", "Expected 2 columns, got 3"),
        ("a,y\n1,u\n2,u\n", "has one class alone"),
        ("a,y\n1,0.5\n2,\n", "is missing in 1 of 2 rows"),
    ],
)
def test_data_that_cannot_be_trained_on_end_the_study_at_its_first_trial(
    engine, run, tmp_path, content, says
):
    if content is not None:
        (tmp_path / "t.csv").write_text(content)
    study = builders.create(
        engine,
        task={"dataset": "table", "data": {"path": "t.csv", "target": "y"}, "model": "mlp"},
        budget={"trials": 50},
    )
    run(study, lanes=2)
    assert builders.study_state(engine, study) == "failed"
    assert says in describe(engine, study)["reason"]
    rows = trials(engine, study)
    assert [row.state for row in rows].count("failed") == 1
    assert {row.state for row in rows} <= {"failed", "cancelled"}
    (failed,) = [row for row in rows if row.state == "failed"]
    assert failed.reason.startswith(("InvalidData: ", "DataMissing: "))
    assert says in failed.reason
    assert audit(engine) == {}


def test_a_table_is_trained_on_and_scored_as_the_study_asks(engine, run, tmp_path):
    lines = [f"{i % 10},{'uvw'[i % 3]},{'yes' if i % 10 > 7 else 'no'}" for i in range(200)]
    (tmp_path / "t.csv").write_text("\n".join(["a,b,y", *lines]))
    study = builders.create(
        engine,
        task={
            "dataset": "table",
            "data": {"path": "t.csv", "target": "y"},
            "model": "mlp",
            "score": "balanced_accuracy",
            "class_weights": "balanced",
        },
        training={"max_epochs": 8, "batch_size": 16, "learning_rate": 0.01},
        validation={"folds": 2},
        pruner="none",
        budget={"trials": 4},
    )
    run(study, lanes=8)
    facts = describe(engine, study)["model"]
    assert facts["score"] == "balanced_accuracy"
    assert facts["data_hash"].startswith("sha256:")
    rows = trials(engine, study)
    assert [row.state for row in rows] == ["complete"] * 4
    assert rows[0].test_score > 0.8
    assert audit(engine) == {}


@pytest.mark.slow
def test_every_technique_can_be_searched_at_once(engine, run):
    search = {
        "max_norm": {"low": 1.0, "high": 4.0, "log": True, "or_zero": True},
        "max_gradient_norm": [0.0, 1.0],
        "input_dropout": {"low": 0.0, "high": 0.3},
        "mixup": {"low": 0.0, "high": 1.0},
        "label_smoothing": 0.1,
        "input_noise": [0.0, 0.1],
        "weight_noise": 0.01,
    }
    training = {
        **SHORT["training"],
        "optimizer": "sgd",
        "decay": "decoupled",
        "augment": ["shift", "flip", "rotation", "erasing"],
        "averaging": "swa",
        "averaging_start": 0.5,
    }
    study = builders.create(
        engine, **SHORT | {"training": training}, search=search, sampler="random", pruner="none"
    )
    run(study, lanes=4)
    rows = trials(engine, study)
    assert [row.state for row in rows] == ["complete"] * 6
    off = {"max_norm", "max_gradient_norm", "input_dropout", "mixup", "augment_strength"}
    assert {name: rows[0].params[name] for name in off} == dict.fromkeys(off, 0)
    assert all(any(row.params[name] for row in rows) for name in off)
    assert audit(engine) == {}


def test_a_regression_is_trained_to_explain_its_target(engine, run):
    study = builders.create(
        engine,
        task={"dataset": "diabetes", "model": "mlp", "hidden": [16], "norm": "none"},
        training={"max_epochs": 20, "batch_size": 16, "learning_rate": 0.003},
        pruner="none",
        budget={"trials": 3},
    )
    run(study, lanes=4)
    assert describe(engine, study)["model"]["score"] == "r2"
    rows = trials(engine, study)
    assert [row.state for row in rows] == ["complete"] * 3
    assert 0.2 < rows[0].test_score < 0.7
    assert audit(engine) == {}


def test_a_worker_whose_data_differ_refuses_the_study_and_says_so(engine, database_url, tmp_path):
    lines = [f"{i % 10},{'yes' if i % 10 > 4 else 'no'}" for i in range(100)]
    (tmp_path / "t.csv").write_text("\n".join(["a,y", *lines]))
    study = builders.create(
        engine,
        task={"dataset": "table", "data": {"path": "t.csv", "target": "y"}, "model": "mlp"},
        **SHORT,
    )
    with transaction(engine) as session:
        facts = ModelFacts(1, [], [], [], True, 1, 1, data_hash="sha256:of-other-rows")
        studies.describe_model(session, study.study_id, facts)
    builders.append(engine, study, 3)
    with working(database_url, two_lanes(tmp_path)):
        wait_until(lambda: refusals(engine, study), 60)
        other = builders.create(engine, "other", **SHORT)
        builders.append(engine, other, 2)
        wait_until(lambda: builders.states(engine, other) == ["complete"] * 2, 60)
    (refusal,) = refusals(engine, study)
    assert refusal.actor == "w"
    assert "sha256:of-other-rows" in refusal.detail["reason"]
    assert builders.states(engine, study) == ["waiting"] * 3
    assert audit(engine) == {}


TABLE = {"dataset": "table", "data": {"path": "t.csv", "target": "y"}, "model": "mlp"}


def write_table(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    lines = [f"{i % 10},{'yes' if i % 10 > 4 else 'no'}" for i in range(100)]
    (folder / "t.csv").write_text("\n".join(["a,y", *lines]))


def test_what_one_worker_lacks_costs_no_trial_where_another_has_it(engine, database_url, tmp_path):
    write_table(tmp_path / "whole")
    builders.register(engine, "whole", datasets=["table"])  # and it is busy yet
    study = builders.create(engine, task=TABLE, **SHORT)
    builders.append(engine, study, 6)
    with working(database_url, two_lanes(tmp_path / "lacking"), "lacking"):
        wait_until(lambda: refusals(engine, study), 60)
        with working(database_url, two_lanes(tmp_path / "whole"), "whole"):
            wait_until(lambda: builders.states(engine, study) == ["complete"] * 6, 60)
    assert builders.study_state(engine, study) == "active"
    (refusal,) = refusals(engine, study)
    assert (refusal.actor, refusal.detail["reason"]) == ("lacking", "there is no file 't.csv'")
    assert audit(engine) == {}


def test_what_others_have_built_is_left_to_them_whatever_goes_wrong(engine, database_url, tmp_path):
    study = builders.create(engine, task={"name": "broken", "fault": "model"}, **SHORT)
    with transaction(engine) as session:
        studies.describe_model(session, study.study_id, ModelFacts(1, [], [], [], True, 1, 1))
    builders.append(engine, study, 2)
    settings = two_lanes(tmp_path).model_copy(update={"tasks": BROKEN})
    with working(database_url, settings):
        wait_until(lambda: refusals(engine, study), 60)
        other = builders.create(engine, "other", **SHORT)
        builders.append(engine, other, 1)
        wait_until(lambda: builders.states(engine, other) == ["complete"], 60)
    (refusal,) = refusals(engine, study)
    assert refusal.detail["reason"] == "ValueError: no such width"
    assert refusal.detail["tries_again_in_seconds"] == FIRST_SECONDS
    assert builders.states(engine, study) == ["waiting"] * 2
    assert audit(engine) == {}


def test_who_has_no_room_yet_may_still_have_what_another_worker_lacks(
    engine, database_url, tmp_path
):
    builders.register(engine, "full", datasets=["table"])
    study = builders.create(engine, task=TABLE, **SHORT)
    with transaction(engine) as session:
        lack = {"reason": "no room", "lacks": "room"}
        events.record(session, study.study_id, "study_refused", "full", detail=lack)
    builders.append(engine, study, 2)
    with working(database_url, two_lanes(tmp_path), "lacking"):
        wait_until(lambda: len(refusals(engine, study)) == 2, 60)
    assert builders.study_state(engine, study) == "active"
    assert builders.states(engine, study) == ["waiting"] * 2


def test_a_database_of_the_tasks_own_is_not_taken_for_ours(engine, run, monkeypatch):
    def lost(*_: object, **__: object) -> None:
        raise OperationalError("SELECT rows", None, Exception("their server is gone"))

    monkeypatch.setattr(TrainingEngine, "__init__", lost)
    study = builders.create(engine, **{**SHORT, "budget": {"trials": 2}})
    run(study, lanes=2)
    rows = trials(engine, study)
    assert [(row.state, row.lost_leases) for row in rows] == [("failed", 0)] * 2
    assert all("their server is gone" in row.reason for row in rows)
    assert audit(engine) == {}


def test_what_cannot_be_rehearsed_has_not_been_built(engine, run, monkeypatch):
    def out_of_range(*_: object) -> None:
        raise IndexError("index 7 is out of range")

    monkeypatch.setattr(TrainingEngine, "rehearse", out_of_range)
    study = builders.create(engine, **{**SHORT, "budget": {"trials": 2}})
    run(study)
    assert builders.study_state(engine, study) == "failed"
    assert {row.reason for row in trials(engine, study)} == {"IndexError: index 7 is out of range"}
    assert refusals(engine, study) == []


def test_what_all_workers_lack_ends_the_study_with_the_reason(engine, database_url, tmp_path):
    with (
        working(database_url, two_lanes(tmp_path), "a"),
        working(database_url, two_lanes(tmp_path), "b"),
    ):
        wait_until(lambda: len(workers_of(engine)) == 2, 30)
        study = builders.create(engine, task=TABLE, **SHORT)
        builders.append(engine, study, 6)
        wait_until(lambda: builders.study_state(engine, study) == "failed", 60)
    assert "there is no file 't.csv'" in describe(engine, study)["reason"]
    assert len(refusals(engine, study)) == 1
    assert sorted(builders.states(engine, study)) == ["cancelled"] * 5 + ["failed"]
    assert audit(engine) == {}


def refusals(engine: Engine, study: Study) -> list[Any]:
    with engine.connect() as connection:
        query = "SELECT * FROM regtune.events WHERE kind = 'study_refused' AND study_id = :id"
        return list(connection.execute(text(query), {"id": study.study_id}))


@pytest.mark.parametrize("preset", get_args(PresetName))
def test_a_study_by_a_preset_is_trained_to_its_end(engine, run, preset):
    study = builders.create(engine, preset=preset, **{**SHORT, "training": {"max_epochs": 2}})
    run(study, lanes=4)
    rows = trials(engine, study)
    assert [row.state for row in rows[:2]] == ["complete"] * 2
    assert len(rows) == 6
    searched = study.spec.search.searched()
    assert all(len({row.params[name] for row in rows}) > 1 for name in searched)
    assert audit(engine) == {}
