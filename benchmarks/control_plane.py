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
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import optuna
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.free_training import EPOCHS, our_workers, stock_workers
from benchmarks.meters import Server
from regtune import database
from regtune.settings import Settings
from regtune.spec import StudySpec, parse_spec
from service.scheduler.suggestion import distributions
from tests.audit import audit
from tests.serving import service_process
from tests.waiting import wait_until

console = Console(width=120)


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
    parser.add_argument("--json", type=Path, help="write everything there")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.workers, arguments.trials, arguments.peer_trials = [16], 400, 32
    arguments.parts = arguments.parts or (["throughput"] if arguments.quick else list(PARTS))
    return arguments


def machine() -> str:
    """Say what this runs on."""
    return f"{len(os.sched_getaffinity(0))} cores, shared; Python {platform.python_version()}"


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
    """Run one study that is timed, then a shorter one whose statements are counted."""
    settings = _worker_settings(url, lanes)
    with our_workers(url, settings, workers, processes=workers), server.sampling(url) as held:
        _wait_for_workers(client, workers)
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
    _new_stock_study(address, "timed")
    with server.sampling(url) as held:
        since, until = stock_workers(address, "timed", space, workers, budget)
    trials = _rows(address, "timed")
    _new_stock_study(address, "counted")
    with server.counting() as counted:
        stock_workers(address, "counted", space, min(workers, 4), 8)
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


def _spec(name: str, budget: int, epochs: int = EPOCHS) -> StudySpec:
    """Return a study with a median pruner that waits for nothing, as Optuna's own."""
    return parse_spec(
        {
            "name": name,
            "task": {"dataset": "digits", "model": "mlp"},
            "training": {"max_epochs": epochs},
            "budget": {"trials": budget},
            "pruner": {"name": "median", "first_epoch": 1},
        }
    )


def _time(moment: str) -> float:
    from datetime import datetime

    return datetime.fromisoformat(moment).timestamp()


PARTS: dict[str, Callable[[Server, argparse.Namespace], Any]] = {"throughput": throughput}


if __name__ == "__main__":
    main()
