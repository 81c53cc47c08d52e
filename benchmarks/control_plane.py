"""The control plane alone: trials that cost nothing to train, 20 epochs each.

Parts, each by its name or all of them:

- throughput: trials a second with 4, 16 and 64 workers, of one lane and of eight, in processes of
  their own, beside stock Optuna (`study.optimize` with the same sampler, pruner and budget, in as
  many processes on the same PostgreSQL). Statements and commits are counted by the server's own
  log, in runs that are not timed; connections are those that the server sees.
- size: a study of 10 000 trials: suggestions, a restarted scheduler, what the API answers, and the
  dashboard's poll at 2 000 trials.
- fleet: 300 workers of eight lanes each, as threads of ten processes, at the pace of real epochs:
  what PostgreSQL and the service burn of a processor.

    python -m benchmarks.control_plane --quick      # throughput with 16 workers, under a minute
    python -m benchmarks.control_plane throughput size fleet --json control_plane.json
"""

import argparse
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import optuna
import psutil
from rich.console import Console
from rich.table import Table
from sqlalchemy import Engine, text

from benchmarks.free_training import EPOCHS, loss, our_workers, stock_workers
from benchmarks.meters import Server
from regtune import database, leasing, programs, reporting, studies, workers
from regtune.database import transaction
from regtune.reporting import Completed, Epoch
from regtune.settings import Settings
from regtune.spec import StudySpec, parse_spec
from regtune.studies import Study
from regtune.task import Offer
from service.scheduler.mirror import Mirror, as_trials, read_trials
from service.scheduler.suggestion import as_suggestion, distributions
from tests.audit import audit
from tests.serving import service_process
from tests.waiting import wait_until

console = Console(width=120)
_BATCH = 500
_STARTING = 6


@dataclass(frozen=True)
class Throughput:
    """One run of a study to its end; ``statements`` and ``commits`` are a trial's, if counted."""

    who: str
    workers: int
    lanes: int
    budget: int
    trials: int
    seconds: float
    connections_per_worker: float
    statements: float | None = None
    statements_by: dict[str, float] | None = None
    commits: float | None = None

    @property
    def rate(self) -> float:
        """Trials a second."""
        return self.trials / self.seconds


def main() -> None:
    """Run the parts that were named; print tables, write JSON."""
    arguments = parse_arguments()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    server = Server()
    report: dict[str, Any] = {"machine": machine(), "quick": arguments.quick}
    try:
        for part in arguments.parts:
            report[part] = PARTS[part](server, arguments)
            if arguments.json:
                arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    finally:
        server.stop()


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=[])
    parser.add_argument("--quick", action="store_true", help="16 workers, few trials")
    parser.add_argument("--workers", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--lanes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--trials", type=int, default=1000, help="budget of our long runs")
    parser.add_argument("--peer-trials", type=int, default=96, help="budget of both; 0: no peer")
    parser.add_argument("--paces", type=_pace, nargs="+", default=[(5.0, "none"), (5.0, "median")])
    parser.add_argument("--json", type=Path, help="write everything there")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.workers, arguments.trials, arguments.peer_trials = [16], 400, 32
    arguments.parts = arguments.parts or (["throughput"] if arguments.quick else list(PARTS))
    return arguments


def _pace(words: str) -> tuple[float, str]:
    """Read the seconds of an epoch and a pruner, as in 5:median."""
    seconds, _, pruner = words.partition(":")
    return float(seconds), pruner


def machine() -> str:
    """Say what this runs on."""
    return f"{programs.cores()} cores, shared; Python {platform.python_version()}"


# Throughput


def throughput(server: Server, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Run ours and the peer's with each number of workers; print and return what came out."""
    runs: list[Throughput] = []
    with _service(server, "throughput") as (url, client, _):
        for workers in arguments.workers:
            for lanes in arguments.lanes:
                runs.append(_ours(server, url, client, workers, lanes, arguments.trials))
                _print_runs(runs)
            if arguments.peer_trials:
                runs.append(_ours(server, url, client, workers, 1, arguments.peer_trials))
                runs.append(_stock(server, workers, arguments.peer_trials))
                _print_runs(runs)
    return [{**asdict(run), "rate": run.rate} for run in runs]


def _ours(
    server: Server, url: str, client: httpx.Client, workers: int, lanes: int, budget: int
) -> Throughput:
    """Run one study to start up, one that is timed, and a shorter one that is counted.

    A worker starts up once for many studies: it opens connections and prepares its statements.
    """
    settings = _worker_settings(url, lanes)
    with our_workers(url, settings, workers, processes=workers), server.sampling(url) as held:
        _wait_for_workers(client, workers)
        _run_study(client, _STARTING * workers)
        trials, seconds = _run_study(client, budget)
        connections = held.of("regtune-worker") / workers
        counted_trials = max(50, min(budget, 4 * workers * lanes))
        with server.counting() as counted:
            _run_study(client, counted_trials)
    return Throughput(
        who="regtune",
        workers=workers,
        lanes=lanes,
        budget=budget,
        trials=trials,
        seconds=seconds,
        connections_per_worker=connections,
        statements=counted[0].total / counted_trials,
        statements_by={
            program: count / counted_trials for program, count in counted[0].statements.items()
        },
        commits=counted[0].commits / counted_trials,
    )


def _stock(server: Server, workers: int, budget: int) -> Throughput:
    """Let stock Optuna do the same, timed; then, with few trials, counted."""
    url = server.create(f"stock_{time.monotonic_ns()}")
    address = database.address(url)
    space = distributions(_spec("space", budget))
    _new_stock_study(address, "start")
    _new_stock_study(address, "timed")
    with server.sampling(url) as held:
        since, until = stock_workers(address, ("start", "timed"), space, workers, budget)
    trials = _rows(address, "timed")
    _new_stock_study(address, "counted")
    with server.counting() as counted:
        stock_workers(address, ("counted",), space, min(workers, 4), 8)
    counted_trials = _rows(address, "counted")
    return Throughput(
        who="stock Optuna",
        workers=workers,
        lanes=1,
        budget=budget,
        trials=trials,
        seconds=until - since,
        connections_per_worker=sum(held.most.values()) / workers,
        statements=counted[0].total / counted_trials,
        commits=counted[0].commits / counted_trials,
    )


def _run_study(client: httpx.Client, budget: int) -> tuple[int, float]:
    """Post a study and wait for its end; return its trials and how long it took."""
    name = f"study-{time.monotonic_ns()}"
    client.post("/v1/studies", json=_spec(name, budget).model_dump(mode="json")).raise_for_status()
    started = time.monotonic()
    while (study := client.get(f"/v1/studies/{name}").json())["state"] == "active":
        if time.monotonic() - started > 600:
            raise SystemExit(f"{name} does not end: {study['counts']}")
        time.sleep(0.25)
    if study["state"] != "completed":
        raise SystemExit(f"{name} is {study['state']}: {study['reason']}")
    since, until = (_time(study[key]) for key in ("created_at", "finished_at"))
    return sum(study["counts"].values()), until - since


def _new_stock_study(address: str, name: str) -> None:
    optuna.create_study(storage=address, study_name=name)


def _rows(address: str, name: str) -> int:
    return len(optuna.load_study(storage=address, study_name=name).trials)


def _print_runs(runs: Sequence[Throughput]) -> None:
    table = Table(title=f"Throughput, {EPOCHS} epochs a trial that cost nothing")
    for column in ("", "workers", "lanes", "budget", "trials", "over", "trials/s"):
        table.add_column(column, justify="right")
    for column in ("statements", "commits", "connections a worker"):
        table.add_column(column, justify="right")
    for run in runs:
        table.add_row(
            run.who,
            str(run.workers),
            str(run.lanes),
            str(run.budget),
            str(run.trials),
            str(run.trials - run.budget),
            f"{run.rate:.1f}",
            f"{run.statements:.1f}",
            f"{run.commits:.1f}",
            f"{run.connections_per_worker:.1f}",
        )
    console.print(table)


# Size


def size(server: Server, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure what a study of many trials costs whoever asks; print and return it."""
    trials, shown = (1_000, 200) if arguments.quick else (10_000, 2_000)
    url = server.create("size")
    database.upgrade(url)
    engine = database.connect(url)
    big = fill(engine, _spec("big", trials + 1_000), trials)
    small = fill(engine, _spec("small", shown + 1_000), shown)
    measures = [*_suggestions(engine, big), _restart(url, engine, big)]
    with service_process(url) as (_, client):
        _suggest_more(engine, big, 3)
        _wait_until_nothing_is_suggested(engine, big)
        study, poll = f"/v1/studies/{big.name}", f"/api/studies/{small.study_id}?after="
        pages = f"{study}/trials?limit=100"
        measures += [
            _timed(client, f"GET of a study of {trials} trials", study, 20),
            _timed(client, "page of 100 trials by number", pages, 50),
            _timed(client, "… from the middle", _later(client, pages), 50),
            _timed(client, "page of 100 trials by value", f"{pages}&order_by=value", 50),
            _timed(client, "page of 1 000 trials", f"{study}/trials?limit=1000", 50),
            _timed(client, "best trial", f"{study}/best", 20),
            _timed(client, f"dashboard at {shown} trials, all of them", f"{poll}0", None),
            _timed(client, "… a poll for what is new", f"{poll}{shown - 10}", 150),
        ]
        known = _appended(engine, big)
        _want_lanes(engine, 200)
        wait_until(lambda: _appended(engine, big) > known, 120)
        measures.append(_timed(client, "GET of the study while suggestions are made", study, None))
    engine.dispose()
    _print_measures(measures)
    return [asdict(measure) for measure in measures]


@dataclass(frozen=True)
class Measure:
    """The median and the worst of some times, in milliseconds, and what they should stay under."""

    what: str
    median: float
    worst: float
    target: float | None


def fill(engine: Engine, spec: StudySpec, trials: int) -> Study:
    """Create a study with so many complete trials, as scheduler and workers would have."""
    rng, space = random.Random(0), distributions(spec)
    with transaction(engine) as session:
        study, _ = studies.create(session, spec, "benchmark")
    for begin in range(0, trials, _BATCH):
        suggestions = [
            as_suggestion(spec, number, _random_point(space, rng), {})
            for number in range(begin, min(begin + _BATCH, trials))
        ]
        with transaction(engine) as session:
            leasing.append(session, study.study_id, suggestions, expected=begin)
            leases = leasing.lease(session, study.study_id, "nobody", _BATCH, 60)
            curves = {held.trial_id: _curve(held.params) for held in leases}
            reporting.flush(session, leases, curves, 60)
            outcomes = [(held, _outcome(curves[held.trial_id])) for held in leases]
            reporting.finish(session, outcomes, "nobody")
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE"))
    return study


def _random_point(space: Mapping[str, Any], rng: random.Random) -> dict[str, float]:
    return {
        name: rng.randint(kind.low, kind.high)
        if isinstance(kind, optuna.distributions.IntDistribution)
        else rng.uniform(kind.low, kind.high)
        for name, kind in space.items()
    }


def _curve(params: Mapping[str, float]) -> list[Epoch]:
    return [
        Epoch(epoch, 1.0, loss(params, epoch), 0.9, 0.1, 0.0, 0.0) for epoch in range(1, EPOCHS + 1)
    ]


def _outcome(curve: Sequence[Epoch]) -> Completed:
    best = curve[-1]
    return Completed(best.validation_loss, 0.9, best.epoch, 1.0, 0.9, "finished")


def _suggestions(engine: Engine, study: Study) -> list[Measure]:
    """Time suggestions of ours, and of Optuna's sampler with the same trials in memory."""
    with transaction(engine) as session:
        trials = as_trials(read_trials(session, study.study_id, study.spec), study.spec)
    mirror = Mirror(study.spec)
    mirror.restore(trials)
    plain = optuna.create_study(
        sampler=optuna.samplers.TPESampler(seed=0, multivariate=True, constant_liar=True)
    )
    plain.add_trials(trials)
    space = distributions(study.spec)
    ours, theirs = [], []
    for _ in range(20):
        ours.append(_milliseconds(lambda: mirror.suggest(1)))
        theirs.append(_milliseconds(lambda: plain.ask(space)))
    peer = Measure("… Optuna's sampler in memory", statistics.median(theirs), max(theirs), None)
    what = f"suggestion after {len(trials)} trials"
    return [Measure(what, statistics.median(ours), max(ours), peer.median), peer]


def _restart(url: str, engine: Engine, study: Study) -> Measure:
    """Kill a service that leads, start another; time it from its start to its first suggestion."""
    with service_process(url) as (process, _):
        _suggest_more(engine, study, 1)
        process.kill()
        process.wait()
    began = time.perf_counter()
    with service_process(url):
        _suggest_more(engine, study, 2)
        taken = (time.perf_counter() - began) * 1000
    return Measure("a restarted scheduler suggests", taken, taken, 10_000)


def _suggest_more(engine: Engine, study: Study, lanes: int) -> None:
    """Let so many lanes want trials, one of which nobody has suggested yet; return when it is."""
    known = _appended(engine, study)
    _want_lanes(engine, lanes)
    wait_until(lambda: _appended(engine, study) > known, 120)
    _want_lanes(engine, 0)


def _wait_until_nothing_is_suggested(engine: Engine, study: Study) -> None:
    """Wait until a second has passed without a suggestion: what is begun goes on for a while."""
    known, since = _appended(engine, study), time.perf_counter()
    while time.perf_counter() < since + 1:
        time.sleep(0.05)
        if (now := _appended(engine, study)) != known:
            known, since = now, time.perf_counter()


def _want_lanes(engine: Engine, lanes: int) -> None:
    """Let a worker that trains nothing want lanes filled."""
    offer = Offer(frozenset({"digits"}), frozenset({"mlp"}))
    with transaction(engine) as session:
        workers.register(
            session, name="nobody", host="here", pid=1, device="none", lanes=lanes, offer=offer
        )


def _appended(engine: Engine, study: Study) -> int:
    with transaction(engine) as session:
        return studies.by_id(session, study.study_id).appended


def _later(client: httpx.Client, pages: str) -> str:
    """Return the address of the sixth page, as a client would have found it."""
    address = pages
    for _ in range(5):
        address = f"{pages}&cursor={client.get(address).json()['next']}"
    return address


def _timed(client: httpx.Client, what: str, address: str, target: float | None) -> Measure:
    client.get(address).raise_for_status()
    taken = [_milliseconds(lambda: client.get(address).raise_for_status()) for _ in range(20)]
    return Measure(what, statistics.median(taken), max(taken), target)


def _milliseconds(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return (time.perf_counter() - began) * 1000


def _print_measures(measures: Sequence[Measure]) -> None:
    table = Table(title="Size")
    for column in ("", "median, ms", "worst, ms", "to stay under, ms"):
        table.add_column(column, justify="right")
    for measure in measures:
        target = "" if measure.target is None else f"{measure.target:.0f}"
        table.add_row(measure.what, f"{measure.median:.1f}", f"{measure.worst:.1f}", target)
    console.print(table)


# Fleet


@dataclass(frozen=True)
class Fleet:
    """What database and service burned while many workers trained; rates are a second's."""

    workers: int
    lanes: int
    epoch_seconds: float
    pruner: str
    trial_epochs: float
    postgres_cores: float
    service_cores: float


def fleet(server: Server, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Let many workers train at the pace of real epochs; print and return what that costs."""
    found = []
    for epoch_seconds, pruner in arguments.paces:
        found.append(_fleet(server, 50 if arguments.quick else 300, 8, epoch_seconds, pruner))
        _print_fleets(found)
    return [asdict(one) for one in found]


def _fleet(server: Server, count: int, lanes: int, epoch_seconds: float, pruner: str) -> Fleet:
    """Measure for as long as a trial takes, so that as many end as are in training."""
    name = f"fleet_{time.monotonic_ns()}"
    spec = _spec(name.replace("_", "-"), 100_000, pruner=pruner)
    with (
        _service(server, name) as (url, client, service),
        our_workers(
            url, _worker_settings(url, lanes), count, processes=10, epoch_seconds=epoch_seconds
        ),
    ):
        _wait_for_workers(client, count)
        study = client.post("/v1/studies", json=spec.model_dump(mode="json")).json()["name"]
        engine = database.connect(url)
        wait_until(lambda: _running(client, study) > 0.95 * count * lanes, 300)
        before = _epochs(engine)
        with server.burning(service) as burn:
            time.sleep(EPOCHS * epoch_seconds)
        recorded = _epochs(engine) - before
        engine.dispose()
    return Fleet(
        workers=count,
        lanes=lanes,
        epoch_seconds=epoch_seconds,
        pruner=pruner,
        trial_epochs=recorded / burn.seconds,
        postgres_cores=burn.postgres / burn.seconds,
        service_cores=burn.service / burn.seconds,
    )


def _running(client: httpx.Client, study: str) -> int:
    count: int = client.get(f"/v1/studies/{study}").json()["counts"]["running"]
    return count


def _epochs(engine: Engine) -> int:
    with engine.connect() as connection:
        count: int = connection.execute(text("SELECT count(*) FROM regtune.epochs")).scalar_one()
        return count


def _print_fleets(fleets: Sequence[Fleet]) -> None:
    table = Table(title="Fleet: cores that are kept busy")
    for column in ("workers", "lanes", "seconds an epoch", "pruner", "trial-epochs/s"):
        table.add_column(column, justify="right")
    for column in ("PostgreSQL", "service", "together"):
        table.add_column(column, justify="right")
    for one in fleets:
        table.add_row(
            str(one.workers),
            str(one.lanes),
            f"{one.epoch_seconds:g}",
            one.pruner,
            f"{one.trial_epochs:.0f}",
            f"{one.postgres_cores:.2f}",
            f"{one.service_cores:.2f}",
            f"{one.postgres_cores + one.service_cores:.2f}",
        )
    console.print(table)


# What the parts have in common


@contextmanager
def _service(server: Server, name: str) -> Iterator[tuple[str, httpx.Client, psutil.Process]]:
    """Yield a database with both schemas, a client of a service on it, and its process."""
    url = server.create(name)
    database.upgrade(url)
    os.environ["REGTUNE_LOG_LEVEL"] = "warning"
    with service_process(url) as (process, client):
        yield url, client, psutil.Process(process.pid)
        engine = database.connect(url)
        findings = audit(engine)
        engine.dispose()
        if findings:
            raise SystemExit(f"the audit has found: {findings}")


def _worker_settings(url: str, lanes: int) -> Settings:
    return Settings(database_url=url, lanes=lanes, log_level="error")


def _wait_for_workers(client: httpx.Client, count: int) -> None:
    wait_until(lambda: _alive(client) >= count, 120)


def _alive(client: httpx.Client) -> int:
    workers = client.get("/v1/workers").json()["items"]
    return sum(worker["alive"] for worker in workers)


def _spec(name: str, budget: int, pruner: str = "median") -> StudySpec:
    """Return a study with a median pruner that waits for nothing, as Optuna's own."""
    return parse_spec(
        {
            "name": name,
            "task": {"dataset": "digits", "model": "mlp"},
            "training": {"max_epochs": EPOCHS},
            "budget": {"trials": budget},
            "pruner": {"name": pruner, "first_epoch": 1} if pruner != "none" else "none",
        }
    )


def _time(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()


PARTS: dict[str, Callable[[Server, argparse.Namespace], Any]] = {
    "throughput": throughput,
    "size": size,
    "fleet": fleet,
}


if __name__ == "__main__":
    main()
