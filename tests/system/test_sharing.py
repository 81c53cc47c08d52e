"""Two studies on two real workers: time is shared by weight, and no epoch is trained twice."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, text

from regtune.settings import Settings
from service.scheduler.loop import Scheduler
from tests import builders
from tests.audit import audit
from tests.waiting import wait_until
from tests.working import worker_process

TRAINING = {"max_epochs": 10, "batch_size": 256}
WORKER_SECONDS = 40
TRAINED_AGAIN = """
SELECT trial_id, epoch FROM regtune.epochs GROUP BY trial_id, epoch HAVING count(*) > 1
"""


@pytest.fixture
def scheduler(engine: Engine, database_url: str) -> Iterator[None]:
    scheduler = Scheduler(engine, database_url, Settings(poll_seconds=0.2))
    scheduler.start()
    yield
    scheduler.stop()


def seconds(engine: Engine) -> list[float]:
    query = "SELECT worker_seconds FROM regtune.shares ORDER BY study_id"
    with engine.connect() as connection:
        return list(connection.execute(text(query)).scalars())


@pytest.mark.usefixtures("scheduler")
def test_real_workers_share_their_time_by_weight(
    engine: Engine, database_url: str, tmp_path: Path
) -> None:
    environment = {"REGTUNE_STAY_SECONDS": "0.3", "REGTUNE_CHECKPOINTS": str(tmp_path)}
    for name, priority in (("light", 1), ("heavy", 3)):
        builders.create(
            engine, name, priority=priority, training=TRAINING, budget={"trials": 100_000}
        )
    with (
        worker_process(database_url, "a", lanes=4, **environment),
        worker_process(database_url, "b", lanes=4, **environment),
    ):
        wait_until(lambda: sum(seconds(engine)) > WORKER_SECONDS, 240)
        light, heavy = seconds(engine)
    assert light / (light + heavy) == pytest.approx(0.25, rel=0.1)
    with engine.connect() as connection:
        again = connection.execute(text(TRAINED_AGAIN)).all()
    assert again == []
    assert audit(engine) == {}
