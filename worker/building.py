"""What a worker does while it builds a study: that may take long, and runs the user's code."""

import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

import structlog
from sqlalchemy import Engine as Database
from sqlalchemy.orm import Session

from regtune import database, leasing, reporting, workers
from regtune.leasing import Lease
from regtune.settings import Settings
from worker.heartbeat import BEATS_A_LEASE, end_process
from worker.shutdown import Shutdown

log = structlog.get_logger()

_SLICE_SECONDS = 0.2
_JOIN_SECONDS = 1.0

_PARTING_SECONDS = 2.0
"""Most studies are built in that time; loading data, or a compiler that is waited for, may not."""


class Building:
    """Lets the worker be heard of in its block, and keeps the leases it builds for.

    They are given back when the worker is told to stop, and the process ends if the build then goes
    on: whoever builds does not notice. So does a build that never ends.
    """

    def __init__(
        self,
        engine: Database,
        settings: Settings,
        worker: str,
        lanes: int,
        leases: Sequence[Lease],
        shutdown: Shutdown,
    ) -> None:
        """``lanes`` is how many the worker may have, as far as it knows yet."""
        self._database = engine
        self._settings = settings
        self._worker = worker
        self._lanes = lanes
        self._leases = leases
        self._shutdown = shutdown
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="building", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join(_JOIN_SECONDS)  # longer only where the database is away

    def _run(self) -> None:
        began = time.monotonic()
        pause = self._settings.lease_seconds / BEATS_A_LEASE
        due = began + pause
        while not self._ended.wait(min(_SLICE_SECONDS, pause)):
            if self._shutdown.requested:
                self._part()
                return
            if time.monotonic() - began > self._settings.build_seconds:
                log.error("build_hung", seconds=round(time.monotonic() - began))
                end_process()
            if time.monotonic() >= due:
                due = time.monotonic() + pause
                self._transact(self._renew)

    def _part(self) -> None:
        self._transact(self._give_back)
        if not self._ended.wait(_PARTING_SECONDS):
            self._shutdown.part()

    def _transact(self, work: Callable[[Session], object]) -> None:
        try:
            with database.transaction(self._database) as session:
                work(session)
        except database.FAULTS as error:
            log.warning("database_lost", worker=self._worker, error=str(error).splitlines()[0])

    def _give_back(self, session: Session) -> None:
        leasing.release(session, self._leases, self._worker)

    def _renew(self, session: Session) -> None:
        reporting.flush(session, self._leases, {}, self._settings.lease_seconds)
        wanted = max(0, self._lanes - len(self._leases))
        workers.beat(session, self._worker, wanted_lanes=wanted, study_id=None)
