"""Whole studies: real worker processes, a real scheduler, real training on real digits."""

import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import optuna
import pytest
from sqlalchemy import Engine, text

from regtune import workers
from regtune.database import transaction
from regtune.studies import Study
from tests import builders
from tests.audit import audit
from tests.plugins.faulty import FATAL_DECAY
from tests.system.conftest import LEASE_SECONDS
from tests.waiting import wait_until
from tests.working import worker_process

SECONDS = 120
SHORT = {"max_epochs": 6, "batch_size": 256}


def is_over(engine: Engine, study: builders.Study) -> bool:
    return builders.study_state(engine, study) != "active"


@pytest.mark.usefixtures("scheduler")
@pytest.mark.slow
def test_forty_trials_on_three_workers_are_forty_and_none_is_trained_twice(
    engine: Engine, database_url: str
) -> None:
    study = builders.create(engine, budget={"trials": 40}, training=SHORT)
    with ExitStack() as stack:
        for name in ("a", "b", "c"):
            stack.enter_context(worker_process(database_url, name, lanes=4))
        wait_until(lambda: is_over(engine, study), SECONDS)
    assert builders.study_state(engine, study) == "completed"
    assert builders.column(engine, "SELECT number FROM regtune.trials ORDER BY 1") == list(
        range(40)
    )
    assert builders.column(engine, "SELECT DISTINCT attempt FROM regtune.trials") == [1]
    assert audit(engine) == {}
    read = optuna.load_study(study_name="study", storage=database_url)
    assert read.best_value < 2.3
    assert read.best_trial.user_attrs["test_score"] > 0.5


@pytest.mark.slow
@pytest.mark.usefixtures("scheduler")
def test_trials_of_a_killed_worker_are_trained_again_under_the_same_numbers(
    engine: Engine, database_url: str
) -> None:
    study = builders.create(
        engine, budget={"trials": 12}, training={"max_epochs": 30}, pruner="none"
    )
    leases = str(LEASE_SECONDS)
    with worker_process(database_url, "doomed", lanes=4, REGTUNE_LEASE_SECONDS=leases) as doomed:
        wait_until(lambda: builders.column(engine, "SELECT 1 FROM regtune.epochs LIMIT 1"), SECONDS)
        doomed.send_signal(signal.SIGKILL)
        doomed.wait()
        lost = builders.column(engine, "SELECT number FROM regtune.trials WHERE state = 'running'")
        assert lost
        with worker_process(database_url, "heir", lanes=6, REGTUNE_LEASE_SECONDS=leases):
            wait_until(lambda: is_over(engine, study), SECONDS)
            again = "SELECT number FROM regtune.trials WHERE lost_leases = 1 ORDER BY 1"
            assert set(lost) <= set(builders.column(engine, again))
    assert builders.study_state(engine, study) == "completed"
    assert set(builders.states(engine, study)) == {"complete"}
    assert audit(engine) == {}


@pytest.mark.slow
@pytest.mark.usefixtures("scheduler")
def test_a_polite_stop_gives_the_trials_back_at_once(engine: Engine, database_url: str) -> None:
    study = builders.create(engine, budget={"trials": 8}, training={"max_epochs": 5000})
    trained = "SELECT DISTINCT worker FROM regtune.trials WHERE epochs > 0"
    with (
        worker_process(database_url, "told") as told,
        worker_process(database_url, "interrupted") as interrupted,
    ):
        wait_until(lambda: len(builders.column(engine, trained)) == 2, SECONDS)
        for worker, number in ((told, signal.SIGTERM), (interrupted, signal.SIGINT)):
            worker.send_signal(number)
        assert [worker.wait(10) for worker in (told, interrupted)] == [0, 0]
    assert builders.states(engine, study).count("running") == 0
    assert builders.column(engine, "SELECT max(lost_leases) FROM regtune.trials") == [0]
    with transaction(engine) as session:
        assert [worker.alive for worker in workers.everyone(session, 60)] == [False] * 2
    assert audit(engine) == {}


@pytest.mark.usefixtures("scheduler")
@pytest.mark.slow
def test_a_zombie_is_refused_lane_by_lane_and_goes_on_with_other_trials(
    engine: Engine, database_url: str
) -> None:
    study = builders.create(
        engine, budget={"trials": 8}, training={"max_epochs": 100}, pruner="none"
    )
    leases = str(LEASE_SECONDS)
    with worker_process(database_url, "zombie", lanes=4, REGTUNE_LEASE_SECONDS=leases) as zombie:
        wait_until(lambda: builders.column(engine, "SELECT 1 FROM regtune.epochs LIMIT 1"), SECONDS)
        zombie.send_signal(signal.SIGSTOP)
        lost = "SELECT 1 FROM regtune.trials WHERE lost_leases > 0"
        wait_until(lambda: len(builders.column(engine, lost)) == 4, SECONDS)
        with worker_process(database_url, "heir", lanes=4, REGTUNE_LEASE_SECONDS=leases):
            heirs = "SELECT 1 FROM regtune.trials WHERE worker = 'heir' AND state = 'running'"
            wait_until(lambda: len(builders.column(engine, heirs)) >= 4, SECONDS)
            zombie.send_signal(signal.SIGCONT)
            wait_until(lambda: is_over(engine, study), SECONDS)
    assert set(builders.states(engine, study)) == {"complete"}
    assert audit(engine) == {}


@pytest.mark.usefixtures("scheduler")
@pytest.mark.slow
def test_an_interrupted_trial_goes_on_elsewhere_as_if_nothing_had_happened(
    engine: Engine, database_url: str, tmp_path: Path
) -> None:
    """The two reference points, trained in one go, and told to stop in the midst."""
    # Long enough to be told in the midst of it; Adam would make much of how a recorded step rounds.
    training = {"max_epochs": 150, "optimizer": "sgd"}
    changes = {"training": training, "budget": {"trials": 2}, "pruner": "none"}
    environment = {"REGTUNE_CHECKPOINTS": f"file://{tmp_path}", "REGTUNE_CHECKPOINT_SECONDS": "1e9"}
    whole = builders.create(engine, "whole", **changes)
    with worker_process(database_url, "steady", **environment):
        wait_until(lambda: is_over(engine, whole), SECONDS)
    cut = builders.create(engine, "cut", **changes)
    trained = (
        "SELECT epoch FROM regtune.epochs JOIN regtune.trials USING (trial_id)"
        f" WHERE study_id = {cut.study_id} AND epoch > 5"
    )
    with worker_process(database_url, "spot", **environment) as spot:
        wait_until(lambda: builders.column(engine, trained), SECONDS)
        spot.terminate()
        assert spot.wait(10) == 0
    assert builders.states(engine, cut) == ["waiting"] * 2
    with worker_process(database_url, "heir", **environment):
        wait_until(lambda: is_over(engine, cut), SECONDS)
    for number in range(2):
        expected, curve = (curves(engine, study, number) for study in (whole, cut))
        assert [row.epoch for row in curve] == [row.epoch for row in expected]
        assert {row.attempt for row in curve} == {2}
        losses = [row.validation_loss for row in curve]
        assert losses == pytest.approx([row.validation_loss for row in expected], rel=1e-3)
    assert (
        len(builders.column(engine, "SELECT 1 FROM regtune.events WHERE kind = 'trial_resumed'"))
        == 2
    )
    assert list(tmp_path.rglob("*.safetensors")) == []
    assert audit(engine) == {}


@pytest.mark.usefixtures("scheduler")
@pytest.mark.slow
def test_a_stop_in_a_slow_epoch_keeps_all_whole_epochs_and_takes_less_than_ten_seconds(
    engine: Engine, database_url: str, tmp_path: Path
) -> None:
    study = builders.create(
        engine,
        task={"dataset": "digits", "model": "faulty", "fault": "slow"},
        search={"weight_decay": [FATAL_DECAY], "dropout": 0.0, "l1_lambda": 0.0, "patience": 20},
        sampler="random",
        pruner="none",
        training={"max_epochs": 8, "batch_size": 32},
        budget={"trials": 2},
    )
    plugins = str(Path(__file__).parent.parent / "plugins")
    environment = {
        "PYTHONPATH": os.pathsep.join([*sys.path, plugins]),
        "REGTUNE_DATA_DIR": str(tmp_path),
        "REGTUNE_CHECKPOINT_SECONDS": "1e9",
    }
    with worker_process(database_url, "spot", **environment) as spot:
        # In its third epoch or so, from where on an epoch takes more than a minute.
        wait_until((tmp_path / "slow").exists, SECONDS)
        spot.terminate()
        assert spot.wait(10) == 0
    assert builders.states(engine, study) == ["waiting"] * 2
    assert builders.column(engine, "SELECT max(lost_leases) FROM regtune.trials") == [0]
    whole = builders.column(engine, "SELECT epochs FROM regtune.trials ORDER BY number")
    assert all(1 <= epochs < 8 for epochs in whole)
    with worker_process(database_url, "heir", **environment):
        wait_until(lambda: is_over(engine, study), SECONDS)
    resumed = (
        "SELECT (detail ->> 'epoch')::int FROM regtune.events"
        " WHERE kind = 'trial_resumed' ORDER BY number"
    )
    assert builders.column(engine, resumed) == whole
    assert set(builders.states(engine, study)) == {"complete"}
    assert audit(engine) == {}


def curves(engine: Engine, study: Study, number: int) -> list[Any]:
    """All epochs on record of a trial, whatever their attempt."""
    query = text(
        "SELECT e.* FROM regtune.epochs e JOIN regtune.trials USING (trial_id)"
        " WHERE study_id = :study_id AND number = :number ORDER BY epoch"
    )
    with engine.connect() as connection:
        return list(connection.execute(query, {"study_id": study.study_id, "number": number}))


def test_a_worker_without_its_database_says_so_in_one_line() -> None:
    process = subprocess.run(
        [*(sys.executable, "-m", "worker"), "--device", "cpu"],
        env={**os.environ, "REGTUNE_DATABASE_URL": "postgresql://nobody@127.0.0.1:1/nothing"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 3
    assert process.stderr.startswith("regtune worker: the database cannot be reached")
    assert "Traceback" not in process.stderr
