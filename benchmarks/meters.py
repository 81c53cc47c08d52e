"""A PostgreSQL of its own, and what programs cost it: statements, commits, connections, seconds."""

import re
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from sqlalchemy import Engine, create_engine, make_url, text

from regtune import database
from regtune.embedded import EmbeddedServer

CONNECTIONS = 1200
_SAMPLE_SECONDS = 0.25
_FRAME = ("BEGIN", "COMMIT", "ROLLBACK")
_STATEMENT = re.compile(r"^§(?P<program>[^§]*)§ LOG:  (statement|execute [^:]*): (?P<sql>.*)", re.M)


@dataclass(frozen=True)
class Statements:
    """What the server's own log has counted, by the program that asked.

    BEGIN, COMMIT and ROLLBACK are not among the statements; ``commits`` are the transactions that
    ended with COMMIT.
    """

    statements: Mapping[str, int]
    commits: int

    @property
    def total(self) -> int:
        """The statements of all programs."""
        return sum(self.statements.values())


@dataclass
class Connections:
    """The most connections that each program has held at once, by its name."""

    most: Counter[str] = field(default_factory=Counter)

    def of(self, prefix: str) -> int:
        """Return the most of all programs whose name begins so."""
        return sum(count for name, count in self.most.items() if name.startswith(prefix))


@dataclass
class Burn:
    """Processor seconds, and the seconds of the clock in which they were used."""

    seconds: float = 0.0
    postgres: float = 0.0
    service: float = 0.0

    @property
    def cores(self) -> float:
        """How many cores database and service have kept busy together."""
        return (self.postgres + self.service) / self.seconds


class Server:
    """An embedded PostgreSQL in a temporary folder, as it comes but for its connections."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="regtune-benchmark-"))
        self._server = EmbeddedServer(self._folder)
        self.url = self._server.start()
        self._administer(
            f"ALTER SYSTEM SET max_connections = {CONNECTIONS}",
            "ALTER SYSTEM SET log_line_prefix = '§%a§ '",
        )
        self._server.stop()
        self.url = self._server.start()

    def stop(self) -> None:
        """Stop it and remove its data."""
        self._server.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def create(self, name: str) -> str:
        """Make an empty database; return its address."""
        self._administer(f"CREATE DATABASE {name}")
        return make_url(self.url).set(database=name).render_as_string(hide_password=False)

    @contextmanager
    def counting(self) -> Iterator[list[Statements]]:
        """Count what is asked of the server within the block; it is in the list at its end."""
        log = self._folder / "postgres" / "log"
        self._administer("ALTER SYSTEM SET log_statement = 'all'", "SELECT pg_reload_conf()")
        time.sleep(1.0)  # a backend takes note before its next statement, an idle one too
        begin = log.stat().st_size
        found: list[Statements] = []
        yield found
        with log.open(encoding="utf-8", errors="replace") as lines:
            lines.seek(begin)
            found.append(_counted(lines.read()))
        self._administer("ALTER SYSTEM RESET log_statement", "SELECT pg_reload_conf()")

    @contextmanager
    def sampling(self, url: str) -> Iterator[Connections]:
        """Look again and again who holds how many connections of a database."""
        connections, over = Connections(), threading.Event()
        thread = threading.Thread(target=self._sample, args=(url, connections, over))
        thread.start()
        try:
            yield connections
        finally:
            over.set()
            thread.join()

    @contextmanager
    def burning(self, service: psutil.Process) -> Iterator[Burn]:
        """Measure what server and service burn within the block."""
        pid_file = self._folder / "postgres" / "postmaster.pid"
        postmaster = psutil.Process(int(pid_file.read_text().split()[0]))
        before, before_service = _seconds_of_all(postmaster), _seconds(service)
        since, burn = time.monotonic(), Burn()
        yield burn
        burn.seconds = time.monotonic() - since
        burn.postgres = _seconds_of_all(postmaster) - before
        burn.service = _seconds(service) - before_service

    def _sample(self, url: str, connections: Connections, over: threading.Event) -> None:
        engine = create_engine(database.normalized(url), isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            while not over.wait(_SAMPLE_SECONDS):
                rows = connection.execute(text(_WHO))
                now = Counter({row.application_name: row.count for row in rows})
                connections.most |= now
        engine.dispose()

    def _administer(self, *statements: str) -> None:
        engine: Engine = create_engine(database.normalized(self.url), isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            for statement in statements:
                connection.execute(text(statement))
        engine.dispose()


def _counted(log: str) -> Statements:
    found = [(entry["program"], entry["sql"]) for entry in _STATEMENT.finditer(log)]
    return Statements(
        statements=Counter(program for program, sql in found if not sql.startswith(_FRAME)),
        commits=sum(sql.startswith("COMMIT") for _, sql in found),
    )


def _seconds_of_all(postmaster: psutil.Process) -> float:
    """Return the processor seconds of a server, of backends that have ended too."""
    ended = postmaster.cpu_times()
    total = ended.children_user + ended.children_system + _seconds(postmaster)
    for backend in postmaster.children(recursive=True):
        try:
            total += _seconds(backend)
        except psutil.NoSuchProcess:
            continue
    return float(total)


def _seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


_WHO = """
SELECT application_name, count(*) FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid() GROUP BY application_name
"""
