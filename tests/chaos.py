"""Studies under attack: everything that may go wrong goes wrong, at random, and then the audit.

``python -m tests.chaos --minutes 15 --seed 3 --report docs/chaos.md``
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from psycopg.errors import DeadlockDetected
from sqlalchemy import Engine, text
from sqlalchemy.exc import DBAPIError

from regtune import database, studies
from regtune.embedded import EmbeddedServer
from regtune.errors import StudyOver
from regtune.studies import Study, Verb
from tests import builders
from tests.audit import audit
from tests.proxy import Proxy
from tests.waiting import free_port, wait_until

LEASE_SECONDS = 6.0
TAKEOVER_SECONDS = 5.0
PARTING_SECONDS = 10.5
WORKERS, LANES = 3, 3
LIVE_STUDIES = 2
SETTLING_SECONDS = 240.0
HALTING: Sequence[Verb] = ("stop", "cancel")

_PLUGINS = Path(__file__).parent / "plugins"
_ENVIRONMENT = {
    "REGTUNE_LEASE_SECONDS": str(LEASE_SECONDS),
    "REGTUNE_POLL_SECONDS": "1",
    "REGTUNE_CHECKPOINT_SECONDS": "1",
    "REGTUNE_MAX_ATTEMPTS": "1000",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
}


Models = Sequence[dict[str, Any]]

EAGER: Models = ({"model": "faulty", "fault": "raises"},)
"""Never faulty with a sensible decay. Its step is not recorded, which would take long here."""
ALL: Models = (*EAGER, {"model": "mlp", "hidden": [8], "norm": "none"})


@dataclass
class Report:
    """What was done to the studies, and what came of it."""

    seed: int
    seconds: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    takeovers: list[float] = field(default_factory=list)
    partings: list[float] = field(default_factory=list)
    studies: int = 0
    trials: int = 0
    facts: dict[str, int] = field(default_factory=dict)
    findings: dict[str, Any] = field(default_factory=dict)

    def as_markdown(self) -> str:
        faults = "\n".join(f"| {name} | {count} |" for name, count in sorted(self.faults.items()))
        facts = "\n".join(f"| {name} | {count} |" for name, count in self.facts.items())
        found = "\n".join(f"- {name}: {rows}" for name, rows in self.findings.items())
        return f"""# Under attack

`python -m tests.chaos --seed {self.seed}`: {self.seconds / 60:.1f} minutes, {WORKERS} workers of \
{LANES} lanes, two service replicas, one PostgreSQL behind a network that may fail, leases of \
{LEASE_SECONDS:g} s, a checkpoint every second. {self.studies} studies, {self.trials} trials.

| done to them | times |
|---|---|
{faults}

| what came of it | |
|---|---|
{facts}
| longest takeover after the leading replica was killed | {max(self.takeovers, default=0):.1f} s |
| longest from SIGTERM to a worker's end | {max(self.partings, default=0):.1f} s |

Audit: {found or "nothing found."}
"""


class Attack:
    """A whole regtune on this machine, and what can be done to it."""

    def __init__(self, folder: Path, seed: int, stack: ExitStack, models: Models) -> None:
        self.random = random.Random(seed)
        self.report = Report(seed)
        self._models = models
        self._stack = stack
        self._server = EmbeddedServer(folder)
        self._url = self._server.start()
        stack.callback(self._server.stop)
        database.upgrade(self._url)
        self.engine = database.connect(self._url, pool_size=3)
        with self.engine.begin() as connection:
            connection.execute(text(_WITNESS))
        self._proxy = Proxy(folder / "postgres" / ".s.PGSQL.5432")
        stack.callback(self._proxy.close)
        self._folder = folder
        self.disk = folder / "checkpoints"
        self.disk.mkdir()
        self._disk_is_small = self._mount_small_disk()
        self._workers: dict[str, subprocess.Popen[bytes]] = {}
        self._services: dict[str, subprocess.Popen[bytes]] = {}
        self._ports: dict[str, int] = {}
        self._asleep: dict[str, float] = {}
        self._restores: list[tuple[float, Callable[[], None]]] = []
        self._started = 0
        stack.callback(self._end_all)
        for _ in range(2):
            self._start_service()
        for _ in range(WORKERS):
            self._start_worker()
        self.studies: list[Study] = []

    # What can be done.

    def kill_worker(self) -> None:
        name, process = self._any_worker()
        process.kill()
        process.wait()
        self._replace(name)

    def tell_worker_to_stop(self) -> None:
        name, process = self._any_worker()
        began = time.monotonic()
        process.terminate()
        code = process.wait(30)
        self.report.partings.append(time.monotonic() - began)
        if code not in (0, 128 + signal.SIGTERM, -signal.SIGTERM):  # not even started
            self._find("a worker did not end well", (name, code))
        self._replace(name)

    def stop_worker_beyond_its_lease(self) -> None:
        name, process = self._any_worker()
        process.send_signal(signal.SIGSTOP)
        self._asleep[name] = time.monotonic()

        def wake() -> None:
            process.send_signal(signal.SIGCONT)
            self._asleep.pop(name, None)

        self._later(1.7 * LEASE_SECONDS, wake)

    def kill_leading_service(self) -> None:
        led = self._led()
        leader = self.random.choice(sorted(led)) if led else None
        if leader not in self._services:
            return
        for name in self._services:  # the other may have been started a moment ago
            wait_until(lambda name=name: self._is_ready(name), 60)
        self._services[leader].kill()
        self._services.pop(leader).wait()
        began = time.monotonic()
        orphans = led[leader]
        with suppress(AssertionError):
            wait_until(lambda: orphans <= self._led_by_others(leader) | self._over(), 20)
        self.report.takeovers.append(time.monotonic() - began)
        self._start_service()

    def restart_database(self) -> None:
        self._server.stop()
        self._later(2.0, self._start_database)
        self._settle_restores()

    def cut_connections(self) -> None:
        with self.engine.connect() as connection:
            connection.execute(
                text(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE application_name ~ '^(worker|service)'"
                )
            )

    def cut_network(self) -> None:
        self._proxy.cut()

    def delay_answers(self) -> None:
        self._proxy.delay = 0.3
        self._later(4.0, lambda: setattr(self._proxy, "delay", 0.0))

    def silence_network(self) -> None:
        self._proxy.silent = True
        self._later(4.0, lambda: setattr(self._proxy, "silent", False))
        self._settle_restores()

    def fill_disk(self) -> None:
        if not self._disk_is_small:
            return
        filler = self.disk / "filler"
        with suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        self._later(4.0, lambda: filler.unlink(missing_ok=True))

    def harm_checkpoints(self) -> None:
        """Half of them, by cutting them short or changing a byte."""
        for path in sorted(self.disk.rglob("*.safetensors")):
            if self.random.random() < 0.5:
                with suppress(OSError):
                    content = bytearray(path.read_bytes())
                    content[len(content) // 2] ^= 1
                    short = self.random.random() < 0.5
                    path.write_bytes(bytes(content[:-20] if short else content))

    def pause_study(self) -> None:
        if live := self._live():
            study = self.random.choice(live)
            self._ask(study, "pause")
            self._later(2.0, lambda: self._ask(study, "resume"))

    def halt_study(self) -> None:
        if live := self._live():
            self._ask(self.random.choice(live), self.random.choice(HALTING))

    # How it goes.

    def go_on(self, seconds: float) -> None:
        """Let time pass; undo what is due, keep studies and workers going."""
        due = time.monotonic() + seconds
        while time.monotonic() < due:
            self._undo_what_is_due()
            self._look_after_workers()
            time.sleep(0.05)

    def keep_studies_going(self) -> None:
        for _ in range(LIVE_STUDIES - len(self._live())):
            number = len(self.studies)
            self.studies.append(
                builders.create(
                    self.engine,
                    f"study-{number}",
                    budget={"trials": self.random.randint(6, 12)},
                    task={"dataset": "digits", **self.random.choice(self._models)},
                    training={"max_epochs": self.random.randint(30, 90), "batch_size": 256},
                    pruner=self.random.choice(["none", "median"]),
                    sampler="random",
                )
            )

    def settle(self) -> None:
        """Stop attacking, and wait until all studies are over."""
        due = time.monotonic() + SETTLING_SECONDS
        while len(self._over()) < len(self.studies):
            if time.monotonic() > due:
                self._find("a study does not end", self._open_trials())
                return
            self.go_on(0.5)

    def conclude(self) -> Report:
        self.report.studies = len(self.studies)
        self.report.findings |= audit(self.engine)
        with self.engine.connect() as connection:
            for name, query in _ILLICIT.items():
                if rows := [tuple(row) for row in connection.execute(text(query))]:
                    self._find(name, rows[:10])
            for name, query in _FACTS.items():
                self.report.facts[name] = connection.execute(text(query)).scalar_one()
            rows = connection.execute(text(_STATES)).all()
            states = {row.state: row.count for row in rows}
        self.report.trials = sum(states.values())
        self.report.facts |= {f"trials {state}": count for state, count in states.items()}
        if states.get("failed"):
            self._find("trials failed that had no fault", states)
        if slow := [s for s in self.report.takeovers if s > TAKEOVER_SECONDS]:
            self._find("the other replica took long to lead", slow)
        if slow := [s for s in self.report.partings if s > PARTING_SECONDS]:
            self._find("a worker took long to stop", slow)
        return self.report

    def _find(self, what: str, found: Any) -> None:
        self.report.findings.setdefault(what, []).append(found)

    def _open_trials(self) -> list[tuple[Any, ...]]:
        with self.engine.connect() as connection:
            return [tuple(row) for row in connection.execute(text(_OPEN))]

    def _any_worker(self) -> tuple[str, subprocess.Popen[bytes]]:
        """Choose one that is awake, and rather one that trains."""
        while not (awake := sorted(self._workers.keys() - self._asleep.keys())):
            self.go_on(0.5)
        with self.engine.connect() as connection:
            training = set(connection.execute(text(_TRAINING)).scalars())
        name = self.random.choice([name for name in awake if name in training] or awake)
        return name, self._workers[name]

    def _is_ready(self, name: str) -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{self._ports[name]}/readyz").is_success
        except httpx.HTTPError:
            return False

    def _led(self) -> dict[str, set[int]]:
        """Return the studies that each replica leads."""
        led: dict[str, set[int]] = {}
        with self.engine.connect() as connection:
            for name, study_id in connection.execute(text(_LEADERS)):
                led.setdefault(name, set()).add(study_id)
        return led

    def _led_by_others(self, name: str) -> set[int]:
        return {id_ for other, ids in self._led().items() if other != name for id_ in ids}

    def _live(self) -> list[Study]:
        over = self._over()
        return [study for study in self.studies if study.study_id not in over]

    def _over(self) -> set[int]:
        with database.transaction(self.engine) as session:
            live = studies.live_ids(session)
        return {study.study_id for study in self.studies} - set(live)

    def _ask(self, study: Study, verb: Verb) -> None:
        """Do to a study what a client asks, as the service does; later, while that cannot be."""
        try:
            with database.transaction(self.engine) as session:
                studies.act(session, study.name, verb, "client")
        except StudyOver:  # it has ended in this moment
            pass
        except DBAPIError as error:
            if not database.is_outage(error) or isinstance(error.orig, DeadlockDetected):
                self._find("the database refused what a client asked", (verb, str(error.orig)))
            else:
                self._later(1.0, lambda: self._ask(study, verb))

    def _replace(self, name: str) -> None:
        self._workers.pop(name)
        self._start_worker()

    def _look_after_workers(self) -> None:
        """Start those again that ended: without a database when they started, for example."""
        for name, process in list(self._workers.items()):
            if process.poll() is not None:
                if process.returncode not in (3,):
                    self._find("a worker ended by itself", (name, process.returncode))
                self._replace(name)
        for name, process in list(self._services.items()):
            if process.poll() is not None:
                self._services.pop(name)
                self._start_service()

    def _later(self, seconds: float, undo: Callable[[], None]) -> None:
        self._restores.append((time.monotonic() + seconds, undo))

    def _undo_what_is_due(self) -> None:
        now = time.monotonic()
        due = [undo for at, undo in self._restores if at <= now]
        self._restores = [(at, undo) for at, undo in self._restores if at > now]
        for undo in due:
            undo()

    def _settle_restores(self) -> None:
        """Wait for what would keep this program itself from the database."""
        while self._restores:
            self._undo_what_is_due()
            time.sleep(0.05)

    def undo_all(self) -> None:
        self._settle_restores()

    def _start_database(self) -> None:
        self._server.start()
        self.engine.dispose()

    def _start_worker(self) -> None:
        self._started += 1
        name = f"worker-{self._started}"
        options = ("--device", "cpu", "--lanes", str(LANES), "--name", name)
        self._workers[name] = self._start("worker", name, *options)

    def _start_service(self) -> None:
        self._started += 1
        name = f"service-{self._started}"
        self._ports[name] = free_port()
        self._services[name] = self._start("service", name, REGTUNE_PORT=str(self._ports[name]))

    def _start(self, program: str, name: str, *options: str, **environment: str) -> Any:
        url = f"postgresql://postgres@127.0.0.1:{self._proxy.port}/postgres?application_name={name}"
        with (self._folder / f"{name}.log").open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", program, *options],
                env={
                    **os.environ,
                    **_ENVIRONMENT,
                    **environment,
                    "PYTHONPATH": os.pathsep.join([*sys.path, str(_PLUGINS)]),
                    "REGTUNE_DATABASE_URL": url,
                    "REGTUNE_DATA_DIR": str(self._folder / "data"),
                    "REGTUNE_CHECKPOINTS": str(self.disk),
                },
                stdout=log,
                stderr=log,
            )

    def _mount_small_disk(self) -> bool:
        mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(self.disk)]
        if subprocess.run(mount, check=False, capture_output=True).returncode:
            return False
        self._stack.callback(subprocess.run, ["umount", "--lazy", str(self.disk)], check=False)
        return True

    def _end_all(self) -> None:
        for process in (*self._workers.values(), *self._services.values()):
            process.kill()
            process.wait()


FAULTS: dict[str, tuple[int, Callable[[Attack], None]]] = {
    "SIGKILL of a worker": (3, Attack.kill_worker),
    "SIGTERM of a worker": (3, Attack.tell_worker_to_stop),
    "SIGSTOP of a worker beyond its lease, SIGCONT": (3, Attack.stop_worker_beyond_its_lease),
    "SIGKILL of the leading service replica": (2, Attack.kill_leading_service),
    "PostgreSQL restarted": (1, Attack.restart_database),
    "backends terminated": (1, Attack.cut_connections),
    "network cut": (1, Attack.cut_network),
    "answers delayed by 0.3 s": (1, Attack.delay_answers),
    "network silent": (1, Attack.silence_network),
    "checkpoint disk full": (1, Attack.fill_disk),
    "checkpoints cut short or changed": (2, Attack.harm_checkpoints),
    "a study paused by a client, and resumed": (1, Attack.pause_study),
    "a study stopped or cancelled by a client": (1, Attack.halt_study),
}
"""How often each is done, in proportion, and what."""


def attack(seconds: float, seed: int, keep: Path | None = None, models: Models = EAGER) -> Report:
    """Run studies and do all of that to them for so long; return what came of it."""
    began = time.monotonic()
    with _folder(keep) as folder, ExitStack() as stack:
        attacked = Attack(folder, seed, stack, models)
        attacked.keep_studies_going()
        trained = text("SELECT count(*) FROM regtune.epochs")
        wait_until(lambda: _scalar(attacked.engine, trained), 120)
        until = time.monotonic() + seconds
        for name, fault in _rounds(attacked.random):
            if time.monotonic() > until:
                break
            fault(attacked)
            attacked.report.faults[name] += 1
            attacked.go_on(attacked.random.uniform(0.5, 4.0))
            attacked.keep_studies_going()
        attacked.undo_all()
        attacked.settle()
        report = attacked.conclude()
        report.seconds = time.monotonic() - began
        return report


def _rounds(random: random.Random) -> Iterator[tuple[str, Callable[[Attack], None]]]:
    """Yield faults for ever: each as often as it says, in another order each time."""
    while True:
        some = [(name, fault) for name, (often, fault) in FAULTS.items() for _ in range(often)]
        random.shuffle(some)
        yield from some


def _scalar(engine: Engine, query: Any) -> Any:
    try:
        with engine.connect() as connection:
            return connection.execute(query).scalar()
    except DBAPIError:
        return None


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    """A folder that PostgreSQL's own user may look into."""
    folder = keep or Path(tempfile.mkdtemp(prefix="regtune-chaos-"))
    folder.mkdir(exist_ok=True)
    try:
        yield folder
    finally:
        if keep is None:
            shutil.rmtree(folder, ignore_errors=True)


# Who writes says so by the name of its connection; what is true at that moment is noted beside.
_WITNESS = """
CREATE TABLE public.witnessed (
    trial_id int, what text, attempt int, writer text, holder text, holders_attempt int);
CREATE FUNCTION public.witness_epoch() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO public.witnessed
    SELECT NEW.trial_id, 'epoch ' || NEW.epoch, NEW.attempt, current_setting('application_name'),
           CASE state WHEN 'running' THEN worker END, attempt
    FROM regtune.trials WHERE trial_id = NEW.trial_id;
    RETURN NULL;
END $$;
CREATE TRIGGER witness AFTER INSERT OR UPDATE ON regtune.epochs
FOR EACH ROW EXECUTE FUNCTION public.witness_epoch();
CREATE FUNCTION public.witness_end() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO public.witnessed
    VALUES (NEW.trial_id, NEW.state, OLD.attempt, current_setting('application_name'),
            CASE OLD.state WHEN 'running' THEN OLD.worker END, OLD.attempt);
    RETURN NULL;
END $$;
CREATE TRIGGER witness AFTER UPDATE ON regtune.trials
FOR EACH ROW WHEN (NEW.state IN ('complete', 'pruned')) EXECUTE FUNCTION public.witness_end();
"""

_ILLICIT = {
    "a write by a worker that did not hold the lease": """
        SELECT * FROM public.witnessed
        WHERE writer IS DISTINCT FROM holder OR attempt <> holders_attempt""",
    "a trial that ended was not ended once, by its last holder": """
        SELECT t.trial_id, t.state, t.attempt, t.worker, w.n FROM regtune.trials t
        LEFT JOIN (SELECT trial_id, attempt, writer, what, count(*) AS n FROM public.witnessed
                   WHERE what IN ('complete', 'pruned') GROUP BY 1, 2, 3, 4) w
             ON w.trial_id = t.trial_id AND w.attempt = t.attempt AND w.writer = t.worker
             AND w.what = t.state
        WHERE t.state IN ('complete', 'pruned') AND w.n IS DISTINCT FROM 1""",
    "an epoch of the record was not written by the last holder": """
        SELECT t.trial_id, t.attempt, e.epoch FROM regtune.trials t
        JOIN regtune.epochs e USING (trial_id, attempt)
        WHERE NOT EXISTS (SELECT FROM public.witnessed w WHERE w.trial_id = t.trial_id
                          AND w.attempt = t.attempt AND w.writer = t.worker
                          AND w.what = 'epoch ' || e.epoch)""",
    "a study has not used its budget exactly": """
        SELECT s.name, s.state, s.budget_trials, count(t.trial_id)
        FROM regtune.studies s LEFT JOIN regtune.trials t USING (study_id)
        GROUP BY s.study_id
        HAVING s.state = 'completed' AND count(t.trial_id) <> s.budget_trials""",
    "a study ended in a way that nobody had asked for": """
        SELECT s.name, s.state, s.reason FROM regtune.studies s
        WHERE s.state <> 'completed' AND NOT EXISTS (
            SELECT FROM regtune.events e WHERE e.study_id = s.study_id AND e.actor = 'client'
            AND (s.state, e.kind) IN (('stopped', 'study_stop'), ('cancelled', 'study_cancel')))""",
}

_FACTS = {
    "epochs trained and recorded": "SELECT count(*) FROM regtune.epochs",
    "of these beyond the checkpoint that a later attempt went on from, so trained again": """
        SELECT count(*) FROM regtune.epochs e JOIN regtune.trials t USING (trial_id)
        WHERE e.attempt < t.attempt""",
    "leases": "SELECT sum(attempt) FROM regtune.trials",
    "leases lost": "SELECT sum(lost_leases) FROM regtune.trials",
    "attempts that went on from a checkpoint": """
        SELECT count(*) FROM regtune.events WHERE kind = 'trial_resumed'""",
}

_STATES = "SELECT state, count(*)::int FROM regtune.trials GROUP BY state ORDER BY state"

_OPEN = """
SELECT s.name, t.number, t.state, t.attempt, t.lost_leases, t.worker, t.lease_expires_at > now()
FROM regtune.trials t JOIN regtune.studies s USING (study_id)
WHERE t.state IN ('waiting', 'running')
"""

_TRAINING = "SELECT worker FROM regtune.trials WHERE state = 'running'"

_LEADERS = """
SELECT a.application_name, l.objid::int FROM pg_locks l JOIN pg_stat_activity a USING (pid)
WHERE l.locktype = 'advisory' AND l.classid = 29300 AND l.granted
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Attack for so many minutes; write the report; return 1 if the audit found anything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--report", type=Path)
    parser.add_argument("--keep", type=Path, help="a folder for logs and database, kept")
    options = parser.parse_args(arguments)
    report = attack(60 * options.minutes, options.seed, options.keep, ALL)
    print(report.as_markdown())  # noqa: T201 - what it is for
    if options.report:
        options.report.write_text(report.as_markdown())
    return 1 if report.findings else 0


if __name__ == "__main__":
    sys.exit(main())
