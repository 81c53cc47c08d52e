"""A real worker and a real scheduler, in threads, on a real database."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sqlalchemy import Engine, text

from regtune import workers
from regtune.database import transaction
from regtune.settings import Settings
from regtune.studies import Study
from service.scheduler.loop import Scheduler
from tests import builders
from tests.audit import audit
from tests.waiting import wait_until
from worker.loop import Worker
from worker.shutdown import Shutdown
from worker.training.epoch import Epochs

SHORT = {"training": {"max_epochs": 4, "batch_size": 256}, "budget": {"trials": 6}}


@pytest.fixture
def run(engine: Engine, database_url: str, tmp_path: Path) -> Callable[..., None]:
    """Run scheduler and worker until a study is over."""

    def until_over(study: Study, **changes: Any) -> None:
        settings = Settings(**{"data_dir": tmp_path, "poll_seconds": 0.1, **changes})
        shutdown = Shutdown()
        worker = Worker(database_url, settings, torch.device("cpu"), "w", shutdown)
        thread = threading.Thread(target=worker.run)
        scheduler = Scheduler(engine, database_url, settings)
        scheduler.start()
        thread.start()
        try:
            wait_until(lambda: builders.study_state(engine, study) != "active", 60)
        finally:
            shutdown.request()
            thread.join()
            scheduler.stop()

    return until_over


def trials(engine: Engine, study: Study) -> list[Any]:
    with engine.connect() as connection:
        query = "SELECT * FROM regtune.trials WHERE study_id = :id ORDER BY number"
        return list(connection.execute(text(query), {"id": study.study_id}))


def the_worker(engine: Engine) -> workers.Worker:
    with transaction(engine) as session:
        (worker,) = workers.everyone(session, 30)
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


def test_running_out_of_memory_halves_the_lanes_and_loses_no_trial(engine, run, monkeypatch):
    """The same study, with and without a device that holds two lanes at most."""
    ample = builders.create(engine, "ample", **SHORT)
    run(ample, lanes=4)
    train = Epochs.train

    def train_two_at_most(self, tensors, strengths, rates, places, tick):
        result = train(self, tensors, strengths, rates, places, tick)
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
    }
    assert audit(engine) == {}


def test_a_trial_that_does_not_fit_even_alone_fails_with_the_reason(engine, run, monkeypatch):
    def too_much(self, *arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Epochs, "train", too_much)
    study = builders.create(engine, **{**SHORT, "budget": {"trials": 2}})
    run(study, lanes=2)
    rows = trials(engine, study)
    assert [row.state for row in rows] == ["failed", "failed"]
    assert all(row.reason == "OutOfMemoryError: CUDA out of memory" for row in rows)
    assert audit(engine) == {}


def test_a_worker_says_how_many_lanes_it_has_found_and_how_full_they_were(engine, run, tmp_path):
    study = builders.create(engine, **SHORT)
    run(study)
    worker = the_worker(engine)
    assert worker.capacity is not None
    assert worker.lanes == worker.capacity["lanes"] >= 1
    assert worker.capacity["bytes_per_lane"] > 0
    assert 0 < worker.occupancy <= 1
    assert (tmp_path / "capacity.json").exists()
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
