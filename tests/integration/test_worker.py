import threading
from pathlib import Path

import torch
from sqlalchemy import Engine, text

from regtune.settings import Settings
from service.scheduler.loop import Scheduler
from tests import builders
from tests.audit import audit
from tests.waiting import wait_until
from worker.loop import Worker
from worker.shutdown import Shutdown


def test_a_data_set_that_cannot_be_read_fails_its_trials_with_the_reason(
    engine: Engine, database_url: str, tmp_path: Path
) -> None:
    no_folder = tmp_path / "file"
    no_folder.write_text("not a folder")
    settings = Settings(data_dir=no_folder, lanes=2, poll_seconds=0.1)
    study = builders.create(engine, task={"dataset": "mnist", "model": "mlp"}, budget={"trials": 2})
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
    assert builders.study_state(engine, study) == "failed"
    with engine.connect() as connection:
        rows = connection.execute(text("SELECT state, reason, error FROM regtune.trials")).all()
    assert [row.state for row in rows] == ["failed", "failed"]
    assert all(row.reason.startswith(("NotADirectoryError", "FileExistsError")) for row in rows)
    assert all("Traceback" in row.error and "mnist" in row.error for row in rows)
    assert audit(engine) == {}
