"""The scheduler, for tests of workers as processes."""

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine

from regtune.settings import Settings
from service.scheduler.loop import Scheduler

LEASE_SECONDS = 6.0
"""Longer than the first step of a model takes, which is recorded, on a busy machine."""


@pytest.fixture
def scheduler(engine: Engine, database_url: str) -> Iterator[None]:
    settings = Settings(lease_seconds=LEASE_SECONDS, poll_seconds=0.2, max_attempts=9)
    scheduler = Scheduler(engine, database_url, settings)
    scheduler.start()
    yield
    scheduler.stop()
