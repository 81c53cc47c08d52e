"""What a user's model may do to its worker, and what becomes of its neighbours."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, text

from regtune.settings import Settings
from service.scheduler.loop import Scheduler
from tests import builders
from tests.audit import audit
from tests.plugins.faulty import FATAL_DECAY
from tests.waiting import wait_until
from worker.shutdown import GRACE_SECONDS

SECONDS = 240
LEASE_SECONDS = 6.0
MAX_ATTEMPTS = 2
RUN = """
import sys
from regtune import programs
sys.exit(programs.run_workers([["--device", "cpu", "--name", "a", "--lanes", "4"]]))
"""


@pytest.fixture(autouse=True)
def scheduler(engine: Engine, database_url: str) -> Iterator[None]:
    settings = Settings(lease_seconds=LEASE_SECONDS, max_attempts=MAX_ATTEMPTS, poll_seconds=0.2)
    scheduler = Scheduler(engine, database_url, settings)
    scheduler.start()
    yield
    scheduler.stop()


@contextmanager
def supervised_worker(
    url: str, data: Path, lease_seconds: float = LEASE_SECONDS
) -> Iterator[subprocess.Popen[bytes]]:
    """``regtune worker --gpus all``, on the CPU."""
    process = subprocess.Popen(
        [sys.executable, "-c", RUN],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(
                [*sys.path, str(Path(__file__).parent.parent / "plugins")]
            ),
            "REGTUNE_DATABASE_URL": url,
            "REGTUNE_DATA_DIR": str(data),
            "REGTUNE_LEASE_SECONDS": str(lease_seconds),
            "REGTUNE_MAX_ATTEMPTS": str(MAX_ATTEMPTS),
            "REGTUNE_HUNG_SECONDS": str(2 * lease_seconds),
            "REGTUNE_BUILD_SECONDS": str(2 * LEASE_SECONDS),
            "OMP_NUM_THREADS": "1",
        },
        start_new_session=True,
    )
    try:
        yield process
        process.send_signal(signal.SIGTERM)
        process.wait(30)  # with whatever code: it may hang, or be starting again
    finally:
        process.kill()
        process.wait()


def faulty(engine: Engine, fault: str, trials: int = 4) -> builders.Study:
    """Four trials; the decay is fatal in some of them."""
    return builders.create(
        engine,
        fault,
        task={"dataset": "digits", "model": "faulty", "fault": fault},
        search={
            "weight_decay": [0.0, FATAL_DECAY],
            "dropout": 0.0,
            "l1_lambda": 0.0,
            "patience": 20,
        },
        sampler="grid",
        pruner="none",
        training={"max_epochs": 6},
        budget={"trials": trials},
    )


def outcomes(engine: Engine, study: builders.Study) -> list[Any]:
    query = text(
        "SELECT *, (params ->> 'weight_decay')::float = :fatal AS fatal"
        " FROM regtune.trials WHERE study_id = :id ORDER BY number"
    )
    with engine.connect() as connection:
        return list(connection.execute(query, {"id": study.study_id, "fatal": FATAL_DECAY}))


@pytest.mark.parametrize(
    "ends",
    [
        {
            "raises": ("failed", "ZeroDivisionError: no weights are left"),
            "nan": ("pruned", "diverged"),
            "memory": ("failed", "OutOfMemoryError: CUDA out of memory"),
        },
        *(
            pytest.param(
                {fault: ("failed", "lost 2 leases; the last one: its lease ran out")},
                marks=pytest.mark.slow,
            )
            for fault in ("kills", "hangs")
        ),
    ],
    ids="-".join,
)
def test_a_fault_ends_its_own_trial_with_the_reason_and_no_other(
    engine: Engine, database_url: str, tmp_path: Path, ends: dict[str, tuple[str, str]]
) -> None:
    studies = {fault: faulty(engine, fault) for fault in ends}
    with supervised_worker(database_url, tmp_path):
        for study in studies.values():
            wait_until(lambda one=study: builders.study_state(engine, one) != "active", SECONDS)
    for fault, study in studies.items():
        rows = outcomes(engine, study)
        assert {row.fatal for row in rows} == {True, False}
        for row in rows:
            expected = ends[fault] if row.fatal else ("complete", "finished")
            assert (row.state, row.reason) == expected, fault
    assert audit(engine) == {}


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["kills-its-builder", "never-ends"])
def test_what_cannot_be_built_costs_the_trial_its_leases_and_the_worker_goes_on(
    engine: Engine, database_url: str, tmp_path: Path, fault: str
) -> None:
    study, other = faulty(engine, fault, trials=1), faulty(engine, "raises", trials=1)
    with supervised_worker(database_url, tmp_path):
        for one in (study, other):
            wait_until(lambda one=one: builders.study_state(engine, one) != "active", SECONDS)
    (row,) = outcomes(engine, study)
    assert (row.state, row.reason) == ("failed", "lost 2 leases; the last one: its lease ran out")
    assert builders.states(engine, other) == ["complete"]
    assert audit(engine) == {}


@pytest.mark.slow
def test_who_is_told_to_stop_while_it_builds_gives_back_at_once_and_does_not_wait_for_the_build(
    engine: Engine, database_url: str, tmp_path: Path
) -> None:
    study = faulty(engine, "never-ends", trials=1)
    with supervised_worker(database_url, tmp_path) as process:
        wait_until(lambda: builders.states(engine, study) == ["running"], SECONDS)
        process.send_signal(signal.SIGTERM)
        told = time.monotonic()
        process.wait(30)
        seconds = time.monotonic() - told
    assert builders.states(engine, study) == ["waiting"]
    with engine.connect() as connection:
        assert (
            connection.scalar(text("SELECT count(*) FROM regtune.workers WHERE stopped_at IS NULL"))
            == 0
        )
    assert seconds < GRACE_SECONDS


@pytest.mark.slow
def test_who_is_told_to_stop_in_a_step_that_does_not_end_gives_back_in_time(
    engine: Engine, database_url: str, tmp_path: Path
) -> None:
    study = faulty(engine, "hangs")
    with supervised_worker(database_url, tmp_path, lease_seconds=30) as process:
        wait_until((tmp_path / "hung").exists, SECONDS)
        process.send_signal(signal.SIGTERM)
        told = time.monotonic()
        process.wait(30)
        seconds = time.monotonic() - told
    assert seconds < GRACE_SECONDS + 1
    assert "running" not in builders.states(engine, study)
    with engine.connect() as connection:
        query = "SELECT max(lost_leases) FROM regtune.trials"
        assert connection.scalar(text(query)) == 0
