"""The embedded PostgreSQL after what may have happened to it."""

import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from regtune import database
from regtune.database import EmbeddedServer


@pytest.fixture
def home() -> Iterator[Path]:
    # Not pytest's folder, which another run closes to the user that PostgreSQL runs as.
    with tempfile.TemporaryDirectory(prefix="regtune-", ignore_cleanup_errors=True) as name:
        yield Path(name)
        EmbeddedServer(Path(name)).stop_leftover()


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
    heir.stop_leftover()
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
