"""A proxy that pools transactions: a real PgBouncer in front of the tests' PostgreSQL."""

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from sqlalchemy import URL

from tests.waiting import free_port, wait_until

SESSIONS = 3
"""Of the database, shared by everyone who comes through the proxy."""

_CONFIGURATION = """
[databases]
{database} = host={folder} dbname={database} user={user}

[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = {sessions}
max_client_conn = 200
application_name_add_host = 1
"""


@contextmanager
def pooling_proxy(url: URL) -> Iterator[str]:
    """The address of a database behind a proxy that keeps no session for anyone.

    What comes through it is named ``… - 127.0.0.1:port`` in ``pg_stat_activity``.
    """
    program = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        reason = "no pgbouncer; install Debian's package of that name"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    port, folder = free_port(), Path(str(url.query["host"]))
    with tempfile.NamedTemporaryFile("w", suffix=".ini") as file:
        Path(file.name).chmod(0o644)
        file.write(
            _CONFIGURATION.format(
                database=url.database,
                folder=folder,
                user=url.username,
                port=port,
                sessions=SESSIONS,
            )
        )
        file.flush()
        # It does not run as root, and the server's socket is open to the server's user alone.
        identity = ["-u", folder.owner()] if os.geteuid() == 0 else []
        process = subprocess.Popen(
            [program, "--quiet", *identity, file.name], stderr=subprocess.DEVNULL
        )
        try:
            wait_until(lambda: process.poll() is not None or _listens(port))
            assert process.poll() is None
            yield f"postgresql://{url.username}@127.0.0.1:{port}/{url.database}"
        finally:
            process.kill()
            process.wait()


def _listens(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False
