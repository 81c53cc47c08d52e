"""A scheduler and a worker in threads of this process."""

import threading

import torch
from sqlalchemy import Engine

from regtune.settings import Settings
from regtune.studies import Study
from service.scheduler.loop import Scheduler
from tests import builders
from tests.waiting import wait_until
from worker.loop import Worker
from worker.shutdown import Shutdown


def run_until_over(
    engine: Engine, database_url: str, settings: Settings, study: Study, seconds: float = 200
) -> None:
    """Run both until a study is over; fail if that takes longer."""
    shutdown = Shutdown()
    worker = Worker(database_url, settings, torch.device("cpu"), "w", shutdown)
    thread = threading.Thread(target=worker.run)
    scheduler = Scheduler(engine, database_url, settings)
    scheduler.start()
    thread.start()
    try:
        wait_until(lambda: builders.study_state(engine, study) != "active", seconds)
    finally:
        shutdown.request()
        thread.join()
        scheduler.stop()
