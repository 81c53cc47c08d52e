"""A whole study, from its first trial to its last: regtune against a stock Optuna script.

MNIST, 784-128-10 with batch norm, batch 64, AdamW; weight decay, dropout, L1 and patience are
searched over regtune's default ranges. Both get the same trials and epochs at most, the same rows
to train and to validate on, and the same cores; they take turns, a study each for every seed:

- regtune: database, service and one worker, started as ``regtune up --study`` does, in a data
  folder where such a study ran before, so that what the worker compiled and measured is there;
- regtune, first: the same in a new folder, with nothing compiled before;
- regtune, bf16, if asked for: as regtune, with that ``training.precision``;
- Optuna, stock: ``study.optimize`` with ``TPESampler`` and ``MedianPruner`` as they come, over the
  hand-tuned loop of ``peers.py`` with early stopping; one process with all threads, and the storage
  in memory;
- Optuna, spread: the same in one process with one thread for each core, with a journal file.

The seconds count from the moment when all programs have started: for regtune from the POST to the
study's end, for Optuna from the loading of the data to the end of the last process.

    python benchmarks/study.py --data-dir ~/data --quick      # under two minutes
    python benchmarks/study.py --data-dir ~/data --json study.json
"""

import argparse
import json
import multiprocessing
import os
import shutil
import socket
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.synchronize import Barrier
from pathlib import Path
from statistics import fmean, median
from time import perf_counter
from typing import Any

import numpy as np
import optuna
import torch
from numpy.typing import NDArray
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from rich.console import Console

from benchmarks.peers import BATCH_ROWS, HandTuned, Held, Strengths, mlp, shortened
from regtune import gpus, progress, supervisor
from regtune.client import Client
from regtune.settings import Settings
from regtune.space import Fixed
from regtune.spec import StudySpec, parse_spec
from regtune.supervisor import Signals, Site
from regtune.task import Data, Storage
from worker.tasks.images import mnist
from worker.tasks.preparation import prepare

ROWS, TEST_ROWS = 60_000, 10_000
STUDY = "benchmark"
READY_SECONDS = 300.0
OURS, OURS_AT_FIRST, OURS_IN_BF16 = "regtune", "regtune, first", "regtune, bf16"


@dataclass(frozen=True)
class Outcome:
    """What a study took and found; ``total_seconds`` count from the start of the programs."""

    seconds: float
    total_seconds: float
    best_validation_loss: float
    trials: int
    median_epochs: float
    epochs: int


@dataclass(frozen=True)
class Crowd:
    """How the peer spreads its trials: so many processes with so many threads each."""

    processes: int
    threads: int

    def __str__(self) -> str:
        """Say it as the report does."""
        return "Optuna" if self.processes == 1 else f"Optuna × {self.processes}"


@dataclass(frozen=True)
class Task:
    """What a process of the peer is given."""

    spec: StudySpec
    data_dir: Path
    device: str
    journal: Path | None
    threads: int
    trials: int
    seed: int


@dataclass(frozen=True)
class Share:
    """What a process of the peer has done."""

    losses: Sequence[float]
    epochs: Sequence[int]
    seconds: float


def main() -> None:
    """Run all studies in turn; print and write what came out."""
    arguments = parse_arguments()
    # Its own programs set what suits them; Optuna's shall have what they would have anywhere.
    os.environ.pop("OMP_WAIT_POLICY", None)
    os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)  # set by torch as soon as it is imported
    data = shortened(mnist(Storage(arguments.data_dir)), arguments.rows, TEST_ROWS)
    with tempfile.TemporaryDirectory(prefix="regtune-benchmark-") as folder:
        data_dir = Path(folder) / "data"
        write_mnist(data, data_dir)
        crowds = [
            Crowd(processes, arguments.cores // processes) for processes in arguments.processes
        ]
        rounds: list[dict[str, Outcome]] = []
        for seed in range(arguments.seeds):
            spec = study_spec(arguments, seed)
            used = Path(folder) / "used"
            shutil.copytree(data_dir, used, dirs_exist_ok=True)
            ours = {OURS: "float32", **({OURS_IN_BF16: "bf16"} if arguments.bf16 else {})}
            if not seed:
                for precision in ours.values():
                    run_ours(study_spec(arguments, arguments.seeds, precision), used)
            contenders = {
                **{
                    name: partial(run_ours, study_spec(arguments, seed, precision), used)
                    for name, precision in ours.items()
                },
                OURS_AT_FIRST: partial(run_ours_at_first, spec, data_dir),
                **{str(crowd): partial(run_peer, spec, data_dir, crowd) for crowd in crowds},
            }
            # Whoever begins may find a cooler machine, so all take turns at it.
            names = list(contenders)
            turns = names[seed % len(names) :] + names[: seed % len(names)]
            done = {name: contenders[name]() for name in turns}
            rounds.append({name: done[name] for name in names})
            print_rows(str(seed), rounds[-1], first=not seed)
            write_json(arguments, rounds)
    print_rows("mean", means(rounds))
    print(CAPTION)


def parse_arguments() -> argparse.Namespace:
    """Read the command line; what a quick run does with less can still be named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, default=Path(".regtune/data"))
    parser.add_argument("--quick", action="store_true", help="less of everything that is not named")
    parser.add_argument("--seeds", type=int, help="how many studies; default: 3")
    parser.add_argument("--trials", type=int, help="default: 32")
    parser.add_argument("--epochs", type=int, help="most of a trial; default: 20")
    parser.add_argument("--rows", type=int, help="take only the first training rows")
    parser.add_argument("--cores", type=int, default=torch.get_num_threads(), help="of the peer")
    parser.add_argument(
        "--processes", type=int, nargs="+", help="of the peers; default: 1, and one for each core"
    )
    parser.add_argument("--bf16", action="store_true", help="regtune also in bfloat16 autocast")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    arguments = parser.parse_args()
    full = {"seeds": 3, "trials": 32, "epochs": 20, "rows": ROWS}
    quick = {"seeds": 1, "trials": 16, "epochs": 6, "rows": 9_600}
    for name, value in (quick if arguments.quick else full).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    if arguments.processes is None:
        arguments.processes = sorted({1, arguments.cores})
    return arguments


def study_spec(arguments: argparse.Namespace, seed: int, precision: str = "float32") -> StudySpec:
    """Return the study, for all; the peers train in float32."""
    return parse_spec(
        {
            "name": f"{STUDY}-{seed}",
            "task": {"dataset": "mnist", "model": "mlp", "hidden": [128], "norm": "batch"},
            "training": {
                "batch_size": BATCH_ROWS,
                "max_epochs": arguments.epochs,
                "seed": seed,
                "precision": precision,
            },
            "budget": {"trials": arguments.trials},
            "sampler": {"name": "tpe", "seed": seed},
        }
    )


def run_ours_at_first(spec: StudySpec, data_dir: Path) -> Outcome:
    """Run the study in a data folder of its own: there the worker keeps what it compiles."""
    with tempfile.TemporaryDirectory(prefix="regtune-data-") as folder:
        shutil.copytree(data_dir, folder, dirs_exist_ok=True)
        return run_ours(spec, Path(folder))


def run_ours(spec: StudySpec, data_dir: Path) -> Outcome:
    """Run the study as a person would with ``regtune up --study``."""
    started = perf_counter()
    with tempfile.TemporaryDirectory(prefix="regtune-home-") as home:
        os.environ["REGTUNE_DATA_DIR"] = str(data_dir)
        with running_site(Path(home)) as site, Client(site.url) as api:
            supervisor.submit(api, spec, Console(quiet=True))
            study = progress.show(api, spec.name, Console(quiet=True), site.pause)
            total_seconds = perf_counter() - started
            numbers = [trial["number"] for trial in api.trials(spec.name)]
            epochs = [len(api.trial(spec.name, number)["epochs"]) for number in numbers]
    return Outcome(
        seconds=progress.seconds_taken(study),
        total_seconds=total_seconds,
        best_validation_loss=study["best_validation_loss"],
        trials=len(epochs),
        median_epochs=median(epochs),
        epochs=sum(epochs),
    )


@contextmanager
def running_site(home: Path) -> Iterator[Site]:
    """Run database, service and one worker, as ``regtune up`` does."""
    settings = Settings(database_url=None, home=home, host="127.0.0.1", port=free_port())
    lock = os.open(home / "lock", os.O_RDWR | os.O_CREAT)
    try:
        with closing(Site(settings, lock, Signals(), Console(quiet=True))) as site:
            site.start([device()])
            yield site
    finally:
        os.close(lock)


def run_peer(spec: StudySpec, data_dir: Path, crowd: Crowd) -> Outcome:
    """Run the study as a good engineer would with Optuna alone."""
    with tempfile.TemporaryDirectory(prefix="optuna-") as folder:
        shares, seconds, total_seconds = share_out(spec, data_dir, crowd, Path(folder) / "journal")
    epochs = [count for share in shares for count in share.epochs]
    return Outcome(
        seconds=seconds,
        total_seconds=total_seconds,
        best_validation_loss=min(loss for share in shares for loss in share.losses),
        trials=len(epochs),
        median_epochs=median(epochs),
        epochs=sum(epochs),
    )


def share_out(
    spec: StudySpec, data_dir: Path, crowd: Crowd, journal: Path
) -> tuple[Sequence[Share], float, float]:
    """Share a study's trials out among processes; return what they did, and in which seconds."""
    started = perf_counter()
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(crowd.processes + 1)
    ends, processes = [], []
    for number in range(crowd.processes):
        ours, theirs = context.Pipe()
        task = Task(
            spec,
            data_dir,
            device(),
            journal if crowd.processes > 1 else None,
            crowd.threads,
            trials=len(range(number, spec.budget.trials, crowd.processes)),
            seed=spec.sampler.seed * crowd.processes + number,
        )
        processes.append(context.Process(target=optimize, args=(task, ready, theirs)))
        ends.append(ours)
        processes[-1].start()
        theirs.close()
    ready.wait(READY_SECONDS)
    began = perf_counter()
    shares = [end.recv() for end in ends]
    ended = perf_counter()
    for process in processes:
        process.join()
    return shares, ended - began, ended - started


def optimize(task: Task, ready: Barrier, end: Any) -> None:
    """Train some trials of a study, in a process of its own; send what came out."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    torch.set_num_threads(task.threads)
    torch.set_flush_denormal(True)
    ready.wait(READY_SECONDS)
    training, validation = task.spec.training, task.spec.validation
    data = mnist(Storage(task.data_dir))
    prepared = prepare(data, validation, training.seed, torch.float32)
    rows = Held.of(prepared.on(torch.device(task.device)))
    study = optuna.create_study(
        study_name=task.spec.name,
        storage=storage(task.journal),
        sampler=optuna.samplers.TPESampler(seed=task.seed),
        pruner=optuna.pruners.MedianPruner(),
        load_if_exists=True,
    )
    curves, losses = list[list[float]](), list[float]()

    def objective(trial: optuna.Trial) -> float:
        curves.append([])
        losses.append(train(trial, task.spec, rows, curves[-1]))
        return losses[-1]

    began = perf_counter()
    study.optimize(objective, n_trials=task.trials)
    end.send(Share(losses, [len(curve) for curve in curves], perf_counter() - began))


def train(trial: optuna.Trial, spec: StudySpec, rows: Held, curve: list[float]) -> float:
    """Train a trial with early stopping; return its best validation loss.

    Each epoch's is appended to ``curve``. Raises TrialPruned when the pruner says so.
    """
    params = suggest(trial, spec)
    strengths = Strengths(params["weight_decay"], params["dropout"], params["l1_lambda"])
    torch.manual_seed(spec.training.seed)
    model = HandTuned(mlp, rows, strengths)
    for number in range(1, spec.training.max_epochs + 1):
        curve.append(model.train_epoch())
        trial.report(curve[-1], number)
        if trial.should_prune():
            raise optuna.TrialPruned
        best_epoch = 1 + curve.index(min(curve))
        if number - best_epoch >= params["patience"]:
            break
    return min(curve)


def suggest(trial: optuna.Trial, spec: StudySpec) -> dict[str, float]:
    """Suggest what regtune would search, from the same ranges; below a range's low end is zero."""
    params: dict[str, float] = {}
    for name, parameter in spec.search.parameters().items():
        if isinstance(parameter, Fixed):
            params[name] = parameter.root
            continue
        match parameter.distribution():
            case optuna.distributions.FloatDistribution(low=low, high=high, log=log):
                params[name] = parameter.used(trial.suggest_float(name, low, high, log=log))
            case optuna.distributions.IntDistribution(low=low, high=high, log=log):
                params[name] = trial.suggest_int(name, low, high, log=log)
    return params


def storage(journal: Path | None) -> BaseStorage:
    """Return the fastest storage that serves one process, or several."""
    return (
        InMemoryStorage() if journal is None else JournalStorage(JournalFileBackend(str(journal)))
    )


def write_mnist(data: Data, data_dir: Path) -> None:
    """Write a data set as torchvision looks for MNIST, in the IDX format of its authors."""
    raw = data_dir / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, x, y in (("train", data.train_x, data.train_y), ("t10k", data.test_x, data.test_y)):
        (raw / f"{name}-images-idx3-ubyte").write_bytes(idx(x[:, 0]))
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(idx(y))


def idx(array: NDArray[Any]) -> bytes:
    """Return an array of whole numbers up to 255 in the IDX format."""
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def device() -> str:
    """Return what both train on."""
    return "cuda:0" if gpus.count() else "cpu"


def free_port() -> int:
    """Return a port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def means(rounds: Sequence[Mapping[str, Outcome]]) -> dict[str, Outcome]:
    """Return the mean of each figure, for each contender."""
    return {name: mean([outcomes[name] for outcomes in rounds]) for name in rounds[0]}


def mean(outcomes: Sequence[Outcome]) -> Outcome:
    """Return the mean of each figure."""
    columns = zip(*(asdict(outcome).values() for outcome in outcomes), strict=True)
    return Outcome(*(fmean(column) for column in columns))  # type: ignore[arg-type]


def print_rows(name: str, outcomes: Mapping[str, Outcome], *, first: bool = False) -> None:
    """Print a line of the table for each contender, and its head before the first."""
    if first:
        heads = (
            "seconds",
            "with start-up",
            "best loss",
            "median epochs",
            "epochs",
            *(f"/ {name}" for name in outcomes if name.startswith(OURS)),
        )
        print(f"{'seed':6}{'':15}" + "".join(f"{head:>18}" for head in heads))
    for who, own in outcomes.items():
        cells = (
            f"{own.seconds:.1f}",
            f"{own.total_seconds:.1f}",
            f"{own.best_validation_loss:.5f}",
            f"{own.median_epochs:.1f}",
            f"{own.epochs:.0f}",
            *(
                "" if who == other else f"{own.seconds / ours.seconds:.2f} ×"
                for other, ours in outcomes.items()
                if other.startswith(OURS)
            ),
        )
        print(f"{name:6}{who:15}" + "".join(f"{cell:>18}" for cell in cells), flush=True)


def write_json(arguments: argparse.Namespace, rounds: Sequence[Mapping[str, Outcome]]) -> None:
    """Write all figures so far where they are wanted."""
    if arguments.json:
        figures = {
            "device": device(),
            "cores": arguments.cores,
            "rows": arguments.rows,
            "trials": arguments.trials,
            "max_epochs": arguments.epochs,
            "studies": [
                {name: asdict(outcome) for name, outcome in outcomes.items()} for outcomes in rounds
            ],
            "mean": {name: asdict(outcome) for name, outcome in means(rounds).items()},
        }
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


CAPTION = """
seconds: regtune from the POST to the study's end, Optuna from the loading of the data to the end;
with start-up: from nothing, on an installed machine; epochs: of all trials together, those of
pruned ones included; / regtune and so on: how many times its seconds."""


if __name__ == "__main__":
    main()
