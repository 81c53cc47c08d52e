"""Two studies on two real workers: their time is shared by weight, and no trial begins twice."""

from collections.abc import Iterator

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


def is_shared(engine: Engine) -> bool:
    """Whether the time until now is shared as it should be in the long run; never, if by halves."""
    light, heavy = seconds(engine)
    return light / (light + heavy) == pytest.approx(0.25, rel=0.1)


@pytest.mark.usefixtures("scheduler")
@pytest.mark.slow
def test_real_workers_share_their_time_by_weight(engine: Engine, database_url: str) -> None:
    for name, priority in (("light", 1), ("heavy", 3)):
        builders.create(
            engine, name, priority=priority, training=TRAINING, budget={"trials": 100_000}
        )
    with (
        worker_process(database_url, "a", lanes=4, REGTUNE_STAY_SECONDS="0.3"),
        worker_process(database_url, "b", lanes=4, REGTUNE_STAY_SECONDS="0.3"),
    ):
        wait_until(lambda: sum(seconds(engine)) > WORKER_SECONDS and is_shared(engine), 240)
    with engine.connect() as connection:
        attempts = connection.execute(text("SELECT max(attempt) FROM regtune.trials")).scalar()
    assert attempts == 1
    assert audit(engine) == {}
