"""Rows that somebody has locked, and who waits for them."""

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from regtune import studies
from regtune.database import transaction
from regtune.studies import Study
from tests.waiting import wait_until


@contextmanager
def locked(engine: Engine, study: Study) -> Iterator[Session]:
    """A transaction of somebody else, who holds a study's row, as to cancel or to append to it."""
    with transaction(engine) as session:
        studies.lock(session, study.study_id)
        yield session


def wait_for_waiters(engine: Engine, count: int = 1) -> None:
    """Return once so many sessions of the database wait for a lock."""
    query = text(
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE datname = current_database() AND wait_event_type = 'Lock'"
    )

    def waiters() -> int:
        with engine.connect() as connection:
            return int(connection.execute(query).scalar() or 0)

    wait_until(lambda: waiters() >= count)
