"""What ``regtune up`` runs: database, service and workers on this machine, down again in order.

Whatever way it ends, nothing that it has started stays behind: on a signal or an error it takes
everything down itself; if it is killed, its crew's guard does (see ``crew.py``). One at a time may
run in a folder, which is locked until the last process is gone.
"""

import errno
import fcntl
import itertools
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType

from rich.console import Console

from regtune import answer, database, gpus, guard, programs, progress
from regtune.client import Client, Document, Refused, ServiceUnreachable, is_live
from regtune.crew import Child, ChildDied, Crew
from regtune.embedded import EmbeddedServer
from regtune.errors import AddressTaken, FolderUnusable, RegtuneError
from regtune.settings import Settings
from regtune.spec import StudySpec

READY_SECONDS = 120.0
"""Loading torch takes seconds on a warm machine, and a minute from a cold disk."""

GRACE_SECONDS = 15.0
"""What a child has to release its trials and end, once asked."""

_POLL_SECONDS = 0.1


class FolderInUse(RegtuneError):
    """Another ``regtune up`` runs in this folder."""


class NotReady(RegtuneError):
    """The service and its workers did not become ready in time."""


class Interrupted(Exception):
    """A signal asks to end."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


def up(settings: Settings, *, spec: StudySpec | None, workers: int | None, console: Console) -> int:
    """Run everything on this machine; return the exit code.

    With a study, until that is over; else until a signal. ``workers`` is by default as many as
    there are GPUs, or one without. Raise FolderInUse, AddressTaken, NotReady, DatabaseUnavailable.
    """
    try:
        with (
            _signals(console) as signals,
            _claimed(settings.home, signals) as lock,
            _on_free_port(settings) as settled,
            closing(Site(settled, lock, signals, console)) as site,
        ):
            site.start(_devices(workers))
            return _stay(site, console) if spec is None else _train(site, spec, console)
    except Interrupted as interrupted:
        console.out(f"stopped; the next `{_program()} up` goes on where this one ended")
        return 0 if spec is None else interrupted.exit_code
    except ChildDied as death:
        _show(death, console)
        return 1


def submit(api: Client, spec: StudySpec, console: Console) -> Document:
    """Submit a study; if one of that name is over or differs, under the first name that is free.

    One that is still live, because it was interrupted, goes on.
    """
    for number in itertools.count(1):
        name = _numbered(spec.name, number)
        try:
            study, is_new = api.submit(spec.canonical() | {"name": name})
        except Refused as refusal:
            if refusal.status != 409:
                raise
        else:
            if is_new or is_live(study):
                break
    if number > 1:
        console.out(f"a study {spec.name!r} is there already; this one is {name!r}")
    if not is_new:
        console.out(f"study {name!r} goes on where it stopped")
    return study


class Signals:
    """The signals that have come to end this process; whoever waits looks here."""

    def __init__(self) -> None:
        self.received: list[int] = []

    def check(self) -> None:
        """Raise Interrupted if one has come."""
        if self.received:
            raise Interrupted(self.received[0])

    def insistent(self) -> bool:
        """Whether a second one has come."""
        return len(self.received) > 1


@contextmanager
def _signals(console: Console) -> Iterator[Signals]:
    """Note SIGINT, SIGTERM and SIGHUP where they would end the process."""
    signals = Signals()

    def note(signum: int, frame: FrameType | None) -> None:
        signals.received.append(signum)
        if signum == signal.SIGHUP:
            console.quiet = True  # the terminal is gone

    ending = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
        ending.append(signal.SIGHUP)
    before = {signum: signal.signal(signum, note) for signum in ending}
    try:
        yield signals
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


class Site:
    """Database, service and workers; ``close()`` takes down whatever has been started."""

    def __init__(self, settings: Settings, lock: int, signals: Signals, console: Console) -> None:
        self.url = f"http://{_reachable(settings.host)}:{settings.port}"
        self.database_url = settings.database_url or ""
        self.logs = settings.home / "logs"
        self._settings = settings
        self._signals = signals
        self._console = console
        self._embedded = None if settings.database_url else EmbeddedServer(settings.home)
        self._crew = Crew(home=settings.home if self._embedded else None, lock=lock)
        self._service: Child | None = None

    def start(self, devices: Sequence[str]) -> None:
        """Start everything; return when the service and, if there are any, a worker are ready."""
        with self._console.status("starting the database"):
            self._start_database()
        self._start_children(devices)
        with self._console.status("starting the service and the workers"), Client(self.url) as api:
            self._wait_until(api.ready)
            if devices:
                self._wait_until(lambda: any(worker["alive"] for worker in api.workers()))

    def pause(self, seconds: float = _POLL_SECONDS) -> None:
        """Let time pass; raise Interrupted or ChildDied as soon as there is reason to."""
        due = time.monotonic() + seconds
        while True:
            self._signals.check()
            self._crew.revive()
            self._crew.check()
            left = due - time.monotonic()
            if left <= 0:
                return
            time.sleep(min(left, _POLL_SECONDS))

    def close(self) -> None:
        """Take everything down: the workers first, so that they can release their trials."""
        hurry = self._signals.insistent
        workers = [child for child in self._crew.children if child is not self._service]
        with self._console.status("taking everything down"):
            self._crew.end(workers, GRACE_SECONDS, hurry=hurry)
            self._crew.end(self._crew.children, GRACE_SECONDS, hurry=hurry)
            if self._embedded:
                self._embedded.stop()
        self._crew.close()

    def _start_database(self) -> None:
        """Start the embedded database, unless another is named, and apply the migrations."""
        try:
            direct = self._settings.direct_database_url
            if self._embedded:
                self.database_url = direct = self._embedded.start(self.pause)
            self._signals.check()
            database.upgrade(direct or self.database_url)
        except RegtuneError:
            self._signals.check()  # Ctrl-C reaches PostgreSQL's own commands too
            raise

    def _start_children(self, devices: Sequence[str]) -> None:
        self.logs.mkdir(parents=True, exist_ok=True)
        self._service = self._start("service", "service")
        # Names that stay where the database is its own; else others of this host may share it.
        crew = "" if self._embedded else f"{os.getpid()}-"
        for number, device in enumerate(devices):
            name = f"{socket.gethostname()}-{crew}{number}"
            options = "--device", device, "--name", name
            self._start(f"worker-{number}", "worker", *options, workers=len(devices))

    def _start(self, name: str, program: str, *options: str, workers: int = 1) -> Child:
        environment = programs.environment(
            workers=workers,
            REGTUNE_DATABASE_URL=database.address(self.database_url),
            REGTUNE_HOST=self._settings.host,
            REGTUNE_PORT=str(self._settings.port),
            PYTHONUNBUFFERED="1",
        )
        command = programs.command(program, *options)
        log, revive = self.logs / f"{name}.log", program == "worker"
        return self._crew.start(name, command, environment, log=log, revive=revive)

    def _wait_until(self, condition: Callable[[], bool]) -> None:
        due = time.monotonic() + READY_SECONDS
        while not condition():
            if time.monotonic() > due:
                raise NotReady(f"not ready after {READY_SECONDS:.0f} s; see {self.logs}")
            self.pause()


@contextmanager
def _claimed(home: Path, signals: Signals) -> Iterator[int]:
    """Lock a folder for as long as the block lasts; yield the lock's file descriptor."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        lock = os.open(home / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise FolderUnusable(
            f"{home.resolve()} cannot be used ({error.strerror}); name another folder: "
            "REGTUNE_HOME=…"
        ) from None
    try:
        _wait_for(lock, home, signals)
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
        yield lock
    finally:
        os.close(lock)


def _wait_for(lock: int, home: Path, signals: Signals) -> None:
    """Take the lock, at once or after the guard of one that was killed; or raise FolderInUse."""
    due = time.monotonic() + guard.GRACE_SECONDS + 10
    while True:
        signals.check()
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            holder = os.pread(lock, 20, 0).decode()
            if _is_running(holder) or time.monotonic() > due:
                raise FolderInUse(
                    f"`regtune up` runs in {home.resolve()} already (process {holder}); "
                    "end it first, or name another folder: REGTUNE_HOME=…"
                ) from None
            time.sleep(_POLL_SECONDS)


def _is_running(holder: str) -> bool:
    try:
        os.kill(int(holder), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def _on_free_port(settings: Settings) -> Iterator[Settings]:
    """Yield the settings with a port that is free; raise AddressTaken if theirs is not.

    Seconds pass until the service listens. Another ``regtune up`` that began meanwhile would take
    this one's service for its own, so the port is claimed in the block by a name of the kernel's.
    """
    with socket.socket(socket.AF_UNIX) as claim:
        port = _free_port(settings)
        while not _can_claim(port, claim):
            if settings.port:
                raise _taken(settings, "another `regtune up`")
            port = _free_port(settings)
        yield settings.model_copy(update={"port": port})


def _can_claim(port: int, claim: socket.socket) -> bool:
    """Claim a port, where the system has such names, as Linux has; say if nobody else has it."""
    try:
        claim.bind(f"\0regtune-{port}")
    except OSError as error:
        return error.errno != errno.EADDRINUSE
    return True


def _free_port(settings: Settings) -> int:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise AddressTaken(
                    f"cannot listen on {settings.host}:{settings.port}: {error.strerror}"
                ) from None
            raise _taken(settings, "another program") from None
        port: int = probe.getsockname()[1]
        return port


def _taken(settings: Settings, by: str) -> AddressTaken:
    return AddressTaken(
        f"port {settings.port} of {settings.host} is taken by {by}; "
        f"end that, or name another port: REGTUNE_PORT={settings.port + 1}"
    )


def _reachable(host: str) -> str:
    """Return an address under which a client finds what listens on ``host``."""
    if host in ("0.0.0.0", "::"):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


def _devices(workers: int | None) -> list[str]:
    """Return the device of each worker: every GPU once, then again; the CPU without any."""
    known = [f"cuda:{number}" for number in range(gpus.count())] or ["cpu"]
    return [known[i % len(known)] for i in range(len(known) if workers is None else workers)]


def _stay(site: Site, console: Console) -> int:
    """Say where everything is, and wait for a signal."""
    console.out(
        "regtune is up; Ctrl-C ends it\n"
        f"  dashboard     {site.url}/dashboard\n"
        f"  API           {site.url}/docs\n"
        f"  database      {database.normalized(site.database_url)!r}\n"
        f"  logs          {site.logs}\n"
        f"  submit        REGTUNE_URL={site.url} {_program()} submit examples/digits.yaml --watch"
    )
    while True:
        site.pause(1.0)


def _train(site: Site, spec: StudySpec, console: Console) -> int:
    """Submit a study, show how it goes, and print its answer."""
    with Client(site.url) as api, _blaming_children(site):
        console.out(f"dashboard, while this runs: {site.url}/dashboard")
        name = submit(api, spec, console)["name"]
        study = progress.show(api, name, console, site.pause)
        if study["best"]:
            answer.show(api.best(name), console)
    taken = progress.duration(progress.seconds_taken(study))
    console.out(f"\nstudy {name} {study['state']} ({study['reason']}) in {taken}")
    console.out(f"to look again: `{_program()} up`, then {site.url}/dashboard")
    return 0 if study["state"] == "completed" else 1


def _program() -> str:
    """Return how a person runs this program here."""
    return "regtune" if shutil.which("regtune") else sys.argv[0]


@contextmanager
def _blaming_children(site: Site) -> Iterator[None]:
    """Where the service cannot be reached because it has died, say that."""
    try:
        yield
    except ServiceUnreachable:
        site.pause(1.0)
        raise


def _numbered(name: str, number: int) -> str:
    """Return digits, digits-2, digits-3, …, no longer than a name may be."""
    suffix = f"-{number}" if number > 1 else ""
    return name[: 100 - len(suffix)] + suffix


def _show(death: ChildDied, console: Console) -> None:
    console.out(f"{death.child.tail()}\n")
    console.out(f"{death}; above is the end of {death.child.log}", style="red")
