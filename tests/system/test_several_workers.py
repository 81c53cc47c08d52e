"""``regtune worker --gpus all``: several worker processes under one, on the CPU here."""

import os
import signal
import subprocess
import sys

import pytest
from sqlalchemy import Engine

from regtune import workers
from regtune.database import transaction
from tests.waiting import wait_until

SECONDS = 120
RUN = """
import sys
from regtune import programs
sys.exit(programs.run_workers([["--device", "cpu", "--name", name] for name in ("a", "b")]))
"""


@pytest.mark.slow
def test_ctrl_c_reaches_every_worker_and_is_waited_for(engine: Engine, database_url: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", RUN],
        env={**os.environ, "REGTUNE_DATABASE_URL": database_url, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    try:
        wait_until(lambda: living(engine) == ["a", "b"], SECONDS)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(SECONDS) == 0
    finally:
        process.kill()
        process.wait()
    assert living(engine) == []


def living(engine: Engine) -> list[str]:
    with transaction(engine) as session:
        return [worker.name for worker in workers.everyone(session, 60) if worker.alive]
