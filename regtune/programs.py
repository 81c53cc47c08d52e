"""The service and the workers as programs of their own: this package imports neither."""

import importlib.util
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from math import ceil
from pathlib import Path
from types import FrameType
from typing import NoReturn

from regtune import database, workers
from regtune.crew import Crew
from regtune.errors import RegtuneError

_NEEDS = {"service": "fastapi", "worker": "torch"}
_POLL_SECONDS = 0.1
_CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")


class NotInstalled(RegtuneError):
    """A part of regtune is not installed."""


class Hidden(RegtuneError):
    """Another module has the name of a part of regtune, and would be imported instead."""


def command(program: str, *options: str) -> list[str]:
    """Return the command line of a program, a part of regtune or a module of it.

    Raise NotInstalled if it could not run, and Hidden if something else would run in its place.
    """
    part = program.partition(".")[0]
    _check_path(part)
    if importlib.util.find_spec(_NEEDS[part]) is None:
        raise NotInstalled(f"the {part} is not installed here: pip install 'regtune[{part}]'")
    # -P: a folder named `worker` where the person happens to be is not ours.
    return [sys.executable, "-P", "-m", program, *options]


def _check_path(part: str) -> None:
    ours = Path(__file__).resolve().parent.parent / part
    # What `-P` leaves out is not looked at: only these folders come before our own.
    named = os.environ.get("PYTHONPATH")
    for folder in named.split(os.pathsep) if named else ():
        # No name is that of the folder where the person happens to be, `-P` or not.
        for found in (Path(folder, part), Path(folder, f"{part}.py")):
            if found.is_file() or (found / "__init__.py").is_file():
                if found.resolve() == ours:
                    return
                raise Hidden(
                    f"{found} hides regtune's own {part!r}, since PYTHONPATH names its folder; "
                    "give it another name, or move what is to be imported to a folder of its own"
                )


def cores() -> int:
    """Return how many cores this process may use; of the machine where the system does not say.

    A container may have leave to use many for a short time of each period, as under ``docker run
    --cpus 2``: more threads than that would be stopped in the middle of their work. Part of a core
    counts as one.
    """
    return max(1, min(_schedulable(), ceil(_quota())))


def _schedulable() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _quota() -> float:
    """Return how many cores' time a container may take, all without a limit (control groups 2)."""
    try:
        quota, period = map(int, _CPU_LIMIT.read_text().split())
    except (OSError, ValueError):  # no such limit, or "max"
        return _schedulable()
    return quota / period


def environment(workers: int = 1, **changes: str) -> dict[str, str]:
    """Return the environment of a program, some of it changed; unless told otherwise:

    Several ``workers`` on one machine share its cores out among themselves, and nobody takes more
    than a container's limit leaves.

    Threads that wait for each other sleep instead of spinning: service, database and other workers
    want the same cores. Measured on two busy ones: an epoch of 16 lanes takes 0.3 s instead of 3.
    """
    defaults = {"OMP_WAIT_POLICY": "PASSIVE"}
    if workers > 1 or cores() < _schedulable():
        defaults["OMP_NUM_THREADS"] = str(max(1, cores() // workers))
    return {**defaults, **os.environ, **changes}


def become(program: str, *options: str) -> NoReturn:
    """Turn this process into a program, so that signals go straight to it."""
    os.execve(sys.executable, command(program, *options), environment())


def run_workers(options: Sequence[Sequence[str]]) -> int:
    """Run a worker for each list of options until all have ended; return the worst exit code.

    One that crashes, because a trial's code kills or hangs its process, is started again. SIGTERM
    and SIGINT are passed on to all.
    """
    received: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        received.append(signum)

    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, note)
    with closing(Crew()) as crew:
        for number, own in enumerate(options):
            own_environment = environment(workers=len(options))
            crew.start(f"worker-{number}", command("worker", *own), own_environment, revive=True)
        told_to_stop = False
        while any(not child.ended for child in crew.children) if told_to_stop else crew.working:
            time.sleep(_POLL_SECONDS)
            while received:
                told_to_stop = True
                crew.forward(received.pop(0))
            if not told_to_stop:
                crew.revive()
        return max(child.exit_code for child in crew.children)


def has_living_worker(url: str, alive_seconds: float, *, proxied: bool) -> bool:
    """Say whether a worker of this host beats in the database; ``proxied`` as in ``connect``."""
    engine = database.connect(url, proxied=proxied)
    with database.reachable(), database.transaction(engine) as session:
        living = workers.everyone(session, alive_seconds, alive=True)
    engine.dispose()
    return any(worker.host == socket.gethostname() for worker in living)
