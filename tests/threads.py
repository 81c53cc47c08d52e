"""A scheduler and a worker in threads of this process."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from sqlalchemy import Engine

from regtune.settings import Settings
from regtune.studies import Study
from service.scheduler.loop import Scheduler
from tests import builders
from tests.waiting import wait_until
from worker.loop import Worker
from worker.shutdown import Shutdown


@contextmanager
def working(database_url: str, settings: Settings, name: str = "w") -> Iterator[None]:
    """A worker on the CPU, without a scheduler; told to stop in the end."""
    shutdown = Shutdown()
    worker = Worker(database_url, settings, torch.device("cpu"), name, shutdown)
    thread = threading.Thread(target=worker.run)
    thread.start()
    try:
        yield
    finally:
        shutdown.request()
        thread.join()


def run_until_over(
    engine: Engine, database_url: str, settings: Settings, study: Study, seconds: float = 200
) -> None:
    """Run both until a study is over; fail if that takes longer."""
    scheduler = Scheduler(engine, database_url, settings)
    scheduler.start()
    try:
        with working(database_url, settings):
            wait_until(lambda: builders.study_state(engine, study) != "active", seconds)
    finally:
        scheduler.stop()
