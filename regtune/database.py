"""The database: engine, transactions, notifications, the schema's version."""

import hashlib
import json
import os
import select
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from math import inf
from pathlib import Path
from typing import Any, Self

import psycopg
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from pydantic_core import from_json
from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import ArgumentError, DBAPIError, DisconnectionError, TimeoutError
from sqlalchemy.orm import Session
from sqlalchemy.pool import ConnectionPoolEntry

from regtune import optuna_tables
from regtune.errors import DatabaseUnavailable, RightsMissing, UnknownSchema
from regtune.tables import SCHEMA

WORK = "regtune_work"
"""Notification to all workers: there may be trials to lease. The payload is a study's id."""

WORK_FOR = "regtune_work_"
"""Notification to one worker, as ``WORK``; its name's hash follows, as of ``work_for``."""

NEWS = "regtune_news"
"""Notification to schedulers: something was asked of a study, or of all; the payload is its id."""

_PATIENCE = {
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,
}
"""Of libpq: seconds, and milliseconds for the last. Else a server that has gone without a word, as
when its machine or the network between is lost, would be waited for for hours."""

_SERVER_PATIENCE = {
    "idle_in_transaction_session_timeout": "15s",
    "tcp_keepalives_idle": "10",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": "20s",
}
"""The same of the server for those who are connected to it: a process that is frozen, or whose
machine is lost, would keep its locks, those of leadership included, for hours."""

_MIGRATIONS = Path(__file__).resolve().parent.parent / "migrations"
_PREPARE_AFTER = 5
"""Uses of a statement on a connection after which it is prepared there; the driver's default."""

TRUST_SECONDS = 1.0
"""For who works all the time, and tries again what has failed."""

_UPGRADE_LOCK = 0x7265_6774


def connect(
    url: str,
    *,
    pool_size: int = 5,
    program: str = "service",
    proxied: bool = False,
    trust_seconds: float = 0.0,
) -> Engine:
    """Return an engine for a PostgreSQL address; nothing is opened until it is used.

    ``program`` is who asks, as ``pg_stat_activity`` and the server's log then say it. ``proxied``
    says that a proxy may give each transaction another session, so that nothing is prepared.
    A connection is tried before it is used, unless it was used less than ``trust_seconds`` ago.
    """
    engine = create_engine(
        normalized(url),
        pool_size=pool_size,
        max_overflow=0,
        pool_use_lifo=True,  # what one connection has prepared, another has not
        json_deserializer=from_json,  # a fourth of the standard library's time
        json_serializer=lambda value: json.dumps(value, allow_nan=False),
        connect_args=connect_args(normalized(url), program, proxied),
    )
    event.listen(engine, "checkin", _note_use)
    event.listen(engine, "checkout", partial(_try_if_rested, engine, trust_seconds))
    return engine


def _note_use(_: object, record: ConnectionPoolEntry) -> None:
    record.info["used_at"] = time.monotonic()


def _try_if_rested(
    engine: Engine,
    trust_seconds: float,
    connection: DBAPIConnection,
    record: ConnectionPoolEntry,
    _: object,
) -> None:
    """Try a connection that has rested; the pool replaces one that is dead."""
    if time.monotonic() - record.info.get("used_at", inf) < trust_seconds:
        return
    try:
        engine.dialect.do_ping(connection)
    except psycopg.Error as error:
        raise DisconnectionError from error


def connect_args(url: URL, program: str, proxied: bool) -> dict[str, Any]:
    """Return what the driver needs to know beside the address; as in ``connect``."""
    threshold = None if proxied else _PREPARE_AFTER
    return {**_options(url, f"regtune-{program}", proxied), "prepare_threshold": threshold}


def _options(url: URL, name: str, proxied: bool = False) -> dict[str, Any]:
    """Return what libpq is to know besides an address; what that says itself comes first.

    A proxy knows no settings of a session; it has time limits of its own.
    """
    options = {"application_name": name, **_PATIENCE}
    chosen = {key: value for key, value in options.items() if key not in url.query}
    if proxied:
        return chosen
    ours = [f"-c {key}={value}" for key, value in _SERVER_PATIENCE.items()]
    # libpq looks there only where it is given no options; the last word counts.
    theirs = [os.environ.get("PGOPTIONS", ""), *_as_texts(url.query.get("options", ()))]
    return {**chosen, "options": " ".join([*ours, *theirs]).strip()}


def _as_texts(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value


def normalized(url: str) -> URL:
    """Return the address with the driver that regtune uses; raise DatabaseUnavailable if broken."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):  # the latter for a port that is no number
        raise DatabaseUnavailable(
            "REGTUNE_DATABASE_URL must look like postgresql://user:password@host:5432/database"
        ) from None
    if parsed.get_backend_name() not in {"postgresql", "postgres"}:
        raise DatabaseUnavailable(
            f"regtune needs PostgreSQL, but the database's address begins with {parsed.drivername}"
        )
    return parsed.set(drivername="postgresql+psycopg")


def address(url: str) -> str:
    """Return the address as text, its password included, for Optuna and child processes."""
    return normalized(url).render_as_string(hide_password=False)


@contextmanager
def transaction(engine: Engine) -> Iterator[Session]:
    """Open a session that commits when its block ends well, and rolls back when it does not."""
    with Session(engine, expire_on_commit=False) as session, session.begin():
        yield session


def work_for(worker: str) -> str:
    """Return the channel on which one worker is told of work."""
    return WORK_FOR + hashlib.md5(worker.encode(), usedforsecurity=False).hexdigest()


class Listener:
    """A connection that hears notifications; it reconnects by itself and never misses for long.

    A notification that falls into a reconnection is lost, so whoever waits here polls as well.
    """

    def __init__(self, url: str, *channels: str, program: str = "service") -> None:
        parsed = normalized(url).set(drivername="postgresql")
        self._options = _options(parsed, f"regtune-{program}-listen")
        self._url = parsed.render_as_string(hide_password=False)
        self._channels = channels
        self._connection: psycopg.Connection[Any] | None = None

    def wait(self, seconds: float) -> set[int]:
        """Wait for notifications; return the ids of the studies they name, empty on time-out."""
        try:
            connection = self._connected()
            heard = list(connection.notifies(timeout=0))
            if not heard and _readable(connection, seconds):
                heard = list(connection.notifies(timeout=0))  # a storm is one awakening
            return {int(notify.payload) for notify in heard if notify.payload.isdecimal()}
        except (psycopg.Error, OSError):
            self.close()
            time.sleep(min(seconds, 1.0))
            return set()

    def drain(self) -> None:
        """Forget what has come by now; a connection that is lost stays so until the next wait."""
        if self._connection is not None:
            self.wait(0)

    def close(self) -> None:
        """Close the connection, if there is one."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _connected(self) -> psycopg.Connection[Any]:
        if self._connection is None:
            self._connection = psycopg.connect(self._url, autocommit=True, **self._options)
            for channel in self._channels:
                self._connection.execute(f"LISTEN {channel}")
        return self._connection


def _readable(connection: psycopg.Connection[Any], seconds: float) -> bool:
    """Wait until the server has sent something; the driver would look ten times a second."""
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN)
    return bool(poll.poll(1000 * seconds))


def upgrade(url: str) -> None:
    """Bring both schemas up to date: Optuna's tables in ``public``, ours in ``regtune``.

    Safe to run from several places at once. Raise UnknownSchema if Optuna's tables are of another
    version than ours knows.
    """
    engine = connect(url)
    # No transaction that is idle meanwhile: its session would be ended.
    alone = engine.execution_options(isolation_level="AUTOCOMMIT")
    try:
        with reachable(), alone.connect() as lock:
            lock.execute(text("SELECT pg_advisory_lock(:key)"), {"key": _UPGRADE_LOCK})
            _look_in_public_first(url)
            optuna_tables.create(address(url))
            with engine.begin() as connection:
                _upgrade(connection)
    finally:
        engine.dispose()


def _upgrade(connection: Connection) -> None:
    optuna_tables.check_version(connection)
    connection.execute(text(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}"))
    try:
        command.upgrade(_alembic(connection), "head")
    except CommandError as error:
        raise UnknownSchema(
            f"the schema {SCHEMA!r} is not one that this version knows, perhaps a newer one's: "
            f"{error}"
        ) from error
    connection.execute(_READABLE_AGAIN)


_READABLE_AGAIN = text(f"""
UPDATE {SCHEMA}.events SET transaction_id = '1'
WHERE EXISTS (SELECT FROM {SCHEMA}.events
              WHERE transaction_id >= pg_snapshot_xmax(pg_current_snapshot()))
""")
"""Events of a dump that has been restored on another server, where so many transactions have not
been: readers would wait until they have. All of them, since they are read in this order."""


def _look_in_public_first(url: str) -> None:
    """Let a role that is named like our schema see Optuna's tables, not ours, as ``studies``.

    By default PostgreSQL looks into the schema of the role's own name first. A role may change
    that for itself; it holds for all who connect as that role, a notebook with Optuna included.
    """
    # Not on a connection that is used again: only a new one looks where it was told.
    engine = connect(url, pool_size=1)
    with engine.begin() as connection:
        if connection.execute(text("SELECT current_user")).scalar() == SCHEMA:
            connection.execute(text(_LOOK_IN_PUBLIC_FIRST))
    engine.dispose()


_LOOK_IN_PUBLIC_FIRST = """
DO $$ BEGIN
    EXECUTE format('ALTER ROLE %I IN DATABASE %I SET search_path TO public',
                   current_user, current_database());
END $$
"""


def check(engine: Engine) -> None:
    """Raise UnknownSchema unless both schemas are the ones that this version knows."""
    with reachable(), engine.connect() as connection:
        first = connection.execute(text("SELECT current_schema()")).scalar()
        if first != "public":
            raise UnknownSchema(
                f"the role's search_path begins with {first!r}, and Optuna's tables are in public; "
                "run `regtune db upgrade`, or set the path with ALTER ROLE … SET search_path"
            )
        optuna_tables.check_version(connection)
        context = MigrationContext.configure(connection, opts={"version_table_schema": SCHEMA})
        found = context.get_current_revision()
    known = ScriptDirectory(str(_MIGRATIONS)).get_current_head()
    if found != known:
        raise UnknownSchema(
            f"the schema {SCHEMA!r} is at {found or 'nothing'}, this version needs {known}; "
            "run `regtune db upgrade`"
        )


@contextmanager
def reachable() -> Iterator[None]:
    """Turn a driver's error into one of ours, with its first line, where a person can mend it.

    Raise DatabaseUnavailable for a connection that fails, UnknownSchema for a table or column that
    is not there, RightsMissing for what the role may not do.
    """
    try:
        yield
    except DBAPIError as error:
        said = str(error.orig).partition("\n")[0]
        if is_outage(error):
            raise DatabaseUnavailable(f"the database cannot be reached: {said}") from error
        if isinstance(error.orig, psycopg.errors.InsufficientPrivilege):
            raise RightsMissing(
                f"the database's role may not do what regtune needs: {said}; grant it CREATE on "
                "the database and on the schema public, or make it the database's owner"
            ) from error
        if isinstance(error.orig, psycopg.errors.UndefinedTable | psycopg.errors.UndefinedColumn):
            raise UnknownSchema(f"{said}; run `regtune db upgrade`") from error
        raise


FAULTS = (DBAPIError, TimeoutError)
"""What the database, or the pool of connections to it, may raise; an outage or not."""


def is_outage(error: BaseException) -> bool:
    """Say whether the database may do, a moment later, what it has refused with this error."""
    if isinstance(error, DBAPIError):
        # Read-only is a standby that is about to take over, or has not yet.
        passing = psycopg.OperationalError | psycopg.errors.ReadOnlySqlTransaction
        return error.connection_invalidated or isinstance(error.orig, passing)
    return isinstance(error, TimeoutError)


def _alembic(connection: Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    config.attributes["connection"] = connection
    return config
