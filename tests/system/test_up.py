"""``regtune up`` as a person runs it: real processes, ended in every way there is."""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from regtune.client import Client
from tests.waiting import wait_until

SECONDS = 120
SMALL = """
name: small
task: { dataset: digits, model: mlp, hidden: [16] }
training: { max_epochs: 3 }
budget: { trials: 4 }
"""
ENDLESS = """
name: endless
task: { dataset: digits, model: mlp, hidden: [16] }
training: { max_epochs: 100000 }
search: { patience: 100000, dropout: { low: 0.0, high: 0.5 } }
budget: { trials: 4 }
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder to run in; whatever still runs there in the end is killed, and a failure."""
    with new_folder() as folder:
        yield folder


@contextmanager
def new_folder() -> Iterator[Path]:
    # Not pytest's, which another run of pytest closes to the user that PostgreSQL runs as.
    with tempfile.TemporaryDirectory(prefix="regtune-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        yield folder
        left = processes_in(folder)
        for process in left:
            process.kill()
        assert left == []


def processes_in(folder: Path) -> list[psutil.Process]:
    """The processes that were started in a folder, PostgreSQL's own among them."""
    return [process for process in psutil.process_iter() if is_in(process, folder)]


def is_in(process: psutil.Process, folder: Path) -> bool:
    try:
        return Path(process.cwd()).is_relative_to(folder)
    except (psutil.Error, OSError):
        return False


@contextmanager
def up(folder: Path, *options: str, **environment: str) -> Iterator["Up"]:
    """``regtune up`` at the head of a group of its own, as from a terminal."""
    descriptor, output = tempfile.mkstemp(dir=folder)
    with os.fdopen(descriptor, "w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "regtune.cli", "up", *options],
            cwd=folder,
            env={**os.environ, "REGTUNE_PORT": "0", "OMP_NUM_THREADS": "1", **environment},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield Up(process, Path(output))
    finally:
        process.terminate()
        process.wait(SECONDS)


class Up:
    def __init__(self, process: subprocess.Popen[bytes], output: Path) -> None:
        self.process = process
        self._output = output

    @property
    def text(self) -> str:
        return self._output.read_text()

    def wait(self) -> int:
        return self.process.wait(SECONDS)

    def says(self, pattern: str) -> str:
        """Wait until the output holds a pattern; return its first group, or all of it."""
        with suppress(AssertionError):
            wait_until(lambda: re.search(pattern, self.text) or self.process.poll(), SECONDS)
        found = re.search(pattern, self.text)
        assert found, self.text
        return found[found.lastindex or 0]

    def interrupt(self) -> None:
        """Press Ctrl-C: the terminal signals the whole group."""
        os.killpg(self.process.pid, signal.SIGINT)


def write(folder: Path, study: str) -> str:
    (folder / "study.yaml").write_text(study)
    return "study.yaml"


@pytest.mark.slow
def test_a_study_is_trained_and_a_second_run_trains_it_under_a_fresh_name(folder: Path) -> None:
    study = write(folder, SMALL)
    with up(folder, "--study", study) as first:
        assert first.wait() == 0, first.text
        assert processes_in(folder) == []
        for words in (
            "best (trial ",
            "common default",
            "everything off",
            "validation loss",
            "test accuracy",
        ):
            assert words in first.text
        assert "study small completed" in first.text
        assert re.search(r"http://127\.0\.0\.1:\d+/dashboard", first.text)
    with up(folder, "--study", study) as second:
        assert second.wait() == 0, second.text
        assert "a study 'small' is there already; this one is 'small-2'" in second.text
        assert "study small-2 completed" in second.text


@pytest.mark.slow
def test_ctrl_c_ends_it_and_until_then_nobody_else_gets_its_folder_or_its_port(
    folder: Path,
) -> None:
    with new_folder() as elsewhere, up(folder, "--workers", "0") as first:
        url = first.says(r"dashboard +(http://\S+)/dashboard")
        with Client(url) as api:
            assert api.ready()
        group = [p.pid for p in processes_in(folder) if os.getpgid(p.pid) == first.process.pid]
        assert group == [first.process.pid]  # Ctrl-C reaches the supervisor alone
        with up(folder) as second:
            assert second.process.wait(15) == 1  # at once: nobody is waited for who lives
            assert f"(process {first.process.pid})" in second.text
        with up(elsewhere, REGTUNE_PORT=url.rpartition(":")[2]) as third:
            assert third.wait() == 1
            assert third.text.count("\n") == 1
            assert "is taken by another program" in third.text
            assert processes_in(elsewhere) == []
        first.interrupt()
        assert first.wait() == 0
        assert processes_in(folder) == []


@pytest.mark.slow
def test_what_was_killed_leaves_nothing_behind_and_goes_on_the_next_time(folder: Path) -> None:
    study = write(folder, ENDLESS)
    with up(folder, "--study", study) as first:
        first.says("4 running")
        left = processes_in(folder)
        first.process.kill()
        first.process.wait()
        with up(folder, "--study", study) as second:
            second.says("study 'endless' goes on where it stopped")
            assert [process for process in left if is_in(process, folder)] == []
            second.says("4 running")
            second.process.terminate()
            assert second.wait() == 128 + signal.SIGTERM
            assert processes_in(folder) == []


def test_a_child_that_dies_takes_all_down_and_its_log_is_shown(folder: Path) -> None:
    with up(folder, "--workers", "0") as running:
        running.says("regtune is up")
        (service,) = [p for p in processes_in(folder) if p.cmdline()[-2:] == ["-m", "service"]]
        service.kill()
        assert running.wait() == 1
        assert processes_in(folder) == []
    assert "service_started" in running.text
    assert "the service ended unexpectedly (signal SIGKILL)" in running.text


def test_ctrl_c_while_the_database_is_being_made_leaves_nothing_and_so_does_a_closed_terminal(
    folder: Path,
) -> None:
    with up(folder, "--workers", "0") as first:
        wait_until(lambda: (folder / ".regtune" / "postgres" / "PG_VERSION").exists(), SECONDS)
        first.interrupt()
        assert first.wait() == 0
        assert processes_in(folder) == []
    with up(folder, "--workers", "0") as second:
        second.says("regtune is up")
        second.process.send_signal(signal.SIGHUP)
        assert second.wait() == 0
        assert processes_in(folder) == []


def test_a_port_taken_from_the_start_leaves_no_process(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with up(folder, REGTUNE_PORT=str(port)) as refused:
            assert refused.wait() == 1
    assert refused.text == (
        f"regtune: port {port} of 127.0.0.1 is taken by another program; end that, or name "
        f"another port: REGTUNE_PORT={port + 1}\n"
    )
    assert not (folder / ".regtune" / "postgres").exists()


def test_a_port_is_taken_before_anybody_listens(folder: Path) -> None:
    """Whoever came next would take the first one's service for its own, and train there."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    with (
        new_folder() as elsewhere,
        up(folder, "--workers", "0", REGTUNE_PORT=port) as first,
    ):
        wait_until(lambda: (folder / ".regtune" / "postgres").exists(), SECONDS)
        first.process.send_signal(signal.SIGSTOP)
        with up(elsewhere, REGTUNE_PORT=port) as second:
            assert second.wait() == 1
            assert f"port {port} of 127.0.0.1 is taken by another `regtune up`" in second.text
            assert not (elsewhere / ".regtune" / "postgres").exists()
        first.process.send_signal(signal.SIGCONT)
        first.says("regtune is up")
