"""Two studies of weights 1 and 3 on one worker: how full its lanes are, and how its time is shared.

    python -m benchmarks.sharing --seconds 90 --epochs 400 --stay 5

Three figures: the occupancy that the worker reports, averaged over the run; the lanes' training
time, as recorded, over that of all lanes from the first lease on, so with what changing studies
costs; and the first study's share, 0.25 if it is right.
"""

import argparse
import tempfile
import time
from pathlib import Path

from sqlalchemy import Engine, text

from regtune import database
from regtune.settings import Settings
from service.scheduler.loop import Scheduler
from tests import builders
from tests.audit import audit
from tests.waiting import wait_until
from tests.working import worker_process

LANES = 8


def main() -> None:
    """Run it and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=90)
    parser.add_argument("--epochs", type=int, default=400)
    parser.add_argument("--stay", type=float, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = database.EmbeddedServer(Path(folder))
        url = server.start()
        database.upgrade(url)
        engine = database.connect(url, pool_size=10)
        scheduler = Scheduler(engine, url, Settings(poll_seconds=0.2))
        scheduler.start()
        for name, priority in (("light", 1), ("heavy", 3)):
            builders.create(
                engine,
                name,
                priority=priority,
                pruner="none",
                training={"max_epochs": options.epochs, "batch_size": 256},
                budget={"trials": 100_000},
            )
        with worker_process(
            url,
            "w",
            LANES,
            REGTUNE_STAY_SECONDS=str(options.stay),
            REGTUNE_CHECKPOINTS=f"{folder}/checkpoints",
        ):
            print(measure(engine, options.seconds))
        scheduler.stop()
        engine.dispose()
        server.stop()


def measure(engine: Engine, seconds: float) -> dict[str, float]:
    """Return the figures after so many seconds."""
    wait_until(lambda: value(engine, _TRAINED), 300)
    due = time.monotonic() + seconds
    reported: list[float] = []
    while time.monotonic() < due:
        time.sleep(0.5)
        occupancy = value(engine, "SELECT occupancy FROM regtune.workers")
        reported += [occupancy] if occupancy is not None else []
    figures = {
        "reported": sum(reported) / len(reported),
        "of the clock": value(engine, _TRAINED) / value(engine, _ELAPSED) / LANES,
        "share of the first": value(engine, _SHARE),
        "changes": value(engine, _CHANGES),
    }
    assert audit(engine) == {}
    return figures


def value(engine: Engine, query: str) -> float:
    """Return what a query says."""
    with engine.connect() as connection:
        found: float = connection.execute(text(query)).scalar()
        return found


_TRAINED = "SELECT sum(seconds) FROM regtune.epochs"

_ELAPSED = "SELECT extract(epoch FROM now() - min(started_at))::float FROM regtune.trials"

_SHARE = """
SELECT sum(worker_seconds) FILTER (WHERE study_id = (SELECT min(study_id) FROM regtune.studies))
       / sum(worker_seconds) FROM regtune.shares
"""

_CHANGES = """
SELECT count(*) FROM (
    SELECT study_id <> lag(study_id) OVER (ORDER BY event_id) AS changed
    FROM regtune.events WHERE kind = 'trial_started') t WHERE changed
"""


if __name__ == "__main__":
    main()
