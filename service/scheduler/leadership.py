"""Which replica leads which study: one advisory lock a study, all on one connection.

These locks need a session of their own, so a proxy that pools transactions cannot stand between
the service and the database for this connection. When the connection is lost, so are the locks,
and another replica leads within its next poll. So they are when nothing is asked on it any more: a
process that is frozen, or hangs in a sampler, leaves a connection behind that looks alive.
"""

import time
from collections.abc import Iterable, Set

from sqlalchemy import Connection, Engine, text

_LOCK_CLASS = 0x7274
"""First key of the two-key advisory locks; the second is the study's id."""


SILENT_SECONDS = 120.0
"""After so long without a word the server ends the session. A scheduler says one at each poll and
before each round of a study, but it may take a while to read one of very many trials."""

_SAID_LATELY = 1.0
"""Seconds after which a word is worth a statement."""


_KNOWS_LIMIT = (14,)
"""The PostgreSQL since which a session may be ended for idling."""


class Leadership:
    """The studies that this process leads."""

    def __init__(self, engine: Engine, silent_seconds: float = SILENT_SECONDS) -> None:
        self._engine = engine
        self._silent_seconds = silent_seconds
        self._said_at = 0.0
        self._connection: Connection | None = None
        self._led: set[int] = set()

    @property
    def led(self) -> Set[int]:
        """The ids of the studies that it leads, as far as it knows."""
        return self._led

    def claim(self, live: Iterable[int]) -> None:
        """Let go of studies that are over, and try to lead the other live ones.

        Raise the driver's error if the connection is lost; nothing is led from then on.
        """
        wanted = set(live)
        try:
            connection = self._connected()
            self._unlock(connection, self._led - wanted)
            self._led |= self._try_lock(connection, wanted - self._led)
            self._said_at = time.monotonic()
        except BaseException:
            self.give_up()
            raise

    def stay(self) -> None:
        """Say that this process lives, if it has not lately; raise as ``claim`` does."""
        if time.monotonic() - self._said_at > _SAID_LATELY:
            self.claim(self._led)

    def give_up(self) -> None:
        """Lead nothing any more."""
        self._led.clear()
        connection, self._connection = self._connection, None
        if connection is not None:
            # Closing for good, not back into the pool, is what frees the locks.
            connection.invalidate()
            connection.close()

    def _connected(self) -> Connection:
        if self._connection is None:
            self._connection = self._engine.connect().execution_options(
                isolation_level="AUTOCOMMIT"
            )
            if (self._connection.dialect.server_version_info or ()) >= _KNOWS_LIMIT:
                self._connection.execute(
                    text("SELECT set_config('idle_session_timeout', :seconds, false)"),
                    {"seconds": f"{self._silent_seconds:.0f}s"},
                )
        return self._connection

    def _unlock(self, connection: Connection, ended: set[int]) -> None:
        # Also the proof, at every claim, that the connection and so the locks are still there.
        connection.execute(
            text("SELECT pg_advisory_unlock(:class, id) FROM unnest(cast(:ids AS int[])) AS id"),
            {"class": _LOCK_CLASS, "ids": sorted(ended)},
        )
        self._led -= ended

    def _try_lock(self, connection: Connection, ids: set[int]) -> set[int]:
        if not ids:
            return set()
        rows = connection.execute(
            text(
                "SELECT id, pg_try_advisory_lock(:class, id) AS got"
                " FROM unnest(cast(:ids AS int[])) AS id"
            ),
            {"class": _LOCK_CLASS, "ids": sorted(ids)},
        )
        return {row.id for row in rows if row.got}
