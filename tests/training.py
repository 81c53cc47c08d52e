"""A real worker and a real scheduler, in threads, on a real database."""

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
    engine: Engine, url: str, study: Study, settings: Settings, seconds: float = 200
) -> None:
    """Run both until a study is over."""
    settings = settings.model_copy(update={"poll_seconds": 0.1})
    shutdown = Shutdown()
    worker = Worker(url, settings, torch.device("cpu"), "w", shutdown)
    thread = threading.Thread(target=worker.run)
    scheduler = Scheduler(engine, url, settings)
    scheduler.start()
    thread.start()
    try:
        wait_until(lambda: builders.study_state(engine, study) != "active", seconds)
    finally:
        shutdown.request()
        thread.join()
        scheduler.stop()
