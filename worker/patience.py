"""Transactions for which the database may be away for a while."""

import threading
from collections.abc import Callable
from typing import TypeVar

import structlog
from sqlalchemy import Engine as Database
from sqlalchemy.orm import Session
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    sleep_using_event,
    stop_when_event_set,
    wait_random_exponential,
)

from regtune import database

log = structlog.get_logger()

MOST_SECONDS_BETWEEN_TRIES = 5.0
"""How long after an outage a worker may be silent; less than a lease lasts."""

T = TypeVar("T")


def transact_patiently(
    engine: Database,
    work: Callable[[Session], T],
    stop: threading.Event | None = None,
    before_next: Callable[[RetryCallState], None] | None = None,
) -> T:
    """Do work in a transaction, again and again until the database is there; or ``stop``.

    Raise whatever is no outage, and the last one after a stop.
    """
    stop = stop or threading.Event()

    def attempt() -> T:
        with database.transaction(engine) as session:
            return work(session)

    return Retrying(
        retry=retry_if_exception(database.is_outage),
        wait=wait_random_exponential(0.2, MOST_SECONDS_BETWEEN_TRIES),
        stop=stop_when_event_set(stop),
        sleep=sleep_using_event(stop),
        before_sleep=before_next or _say,
        reraise=True,
    )(attempt)


def _say(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    log.warning("database_lost", error=str(error).splitlines()[0] if error else "")
