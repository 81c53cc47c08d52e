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

All trials of a study share held-out rows, initial weights and order, so its lowest loss is as much
a matter of that one draw as of the strengths that were found. In the end, therefore, everybody's
best strengths are trained again under other seeds, the same for all, as lanes of one engine.

    python benchmarks/study.py --data-dir ~/data --quick      # under two minutes
    python benchmarks/study.py --data-dir ~/data --json study.json
"""

import argparse
import json
import logging
import math
import os
import shutil
import socket
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from operator import itemgetter
from pathlib import Path
from statistics import fmean, median
from time import perf_counter
from typing import Any

import numpy as np
import structlog
import torch
from numpy.typing import NDArray
from rich.console import Console

from benchmarks.peers import BATCH_ROWS, shortened
from benchmarks.retraining import Again, train_again
from benchmarks.stock import Crowd, share_out
from regtune import gpus, progress, supervisor
from regtune.client import Client
from regtune.settings import Settings
from regtune.spec import StudySpec, parse_spec
from regtune.supervisor import Signals, Site
from regtune.task import Data, Storage
from worker.tasks.images import mnist

ROWS, TEST_ROWS = 60_000, 10_000
STUDY = "benchmark"
OURS, OURS_AT_FIRST, OURS_IN_BF16 = "regtune", "regtune, first", "regtune, bf16"


@dataclass(frozen=True)
class Figures:
    """What a study took and found; ``total_seconds`` count from the start of the programs."""

    seconds: float
    total_seconds: float
    best_validation_loss: float
    trials: float
    median_epochs: float
    epochs: float


@dataclass(frozen=True)
class Outcome(Figures):
    """The same of one study, and the strengths and patience of its best trial."""

    best_params: Mapping[str, float]


def main() -> None:
    """Run all studies in turn; print and write what came out."""
    arguments = parse_arguments()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
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
        if arguments.again:
            best = {name: [outcomes[name].best_params for outcomes in rounds] for name in rounds[0]}
            study = partial(study_spec, arguments)
            again = train_again(study, best, arguments.again, data_dir, device(), arguments.cores)
            print_again(again)
            write_json(arguments, rounds, again)


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
    parser.add_argument(
        "--again", type=int, help="seeds under which the best are trained again; default: 8"
    )
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    arguments = parser.parse_args()
    full = {"seeds": 3, "trials": 32, "epochs": 20, "rows": ROWS, "again": 8}
    quick = {"seeds": 1, "trials": 16, "epochs": 6, "rows": 9_600, "again": 2}
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
            best_params = api.best(spec.name)["params"]
    return Outcome(
        seconds=progress.seconds_taken(study),
        total_seconds=total_seconds,
        best_validation_loss=study["best_validation_loss"],
        trials=len(epochs),
        median_epochs=median(epochs),
        epochs=sum(epochs),
        best_params=best_params,
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
        shares, seconds, total_seconds = share_out(
            spec, data_dir, device(), crowd, Path(folder) / "journal"
        )
    epochs = [count for share in shares for count in share.epochs]
    complete = [one for share in shares for one in zip(share.losses, share.params, strict=True)]
    best_loss, best_params = min(complete, key=itemgetter(0))
    return Outcome(
        seconds=seconds,
        total_seconds=total_seconds,
        best_validation_loss=best_loss,
        trials=len(epochs),
        median_epochs=median(epochs),
        epochs=sum(epochs),
        best_params=best_params,
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


def means(rounds: Sequence[Mapping[str, Outcome]]) -> dict[str, Figures]:
    """Return the mean of each figure, for each contender."""
    return {name: mean([outcomes[name] for outcomes in rounds]) for name in rounds[0]}


def mean(outcomes: Sequence[Outcome]) -> Figures:
    """Return the mean of each figure."""
    names = [each.name for each in fields(Figures)]
    return Figures(**{name: fmean(getattr(one, name) for one in outcomes) for name in names})


def print_rows(name: str, outcomes: Mapping[str, Figures], *, first: bool = False) -> None:
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


def print_again(again: Again) -> None:
    """Print how good everybody's best strengths are under seeds that they were not chosen by."""
    seeds = next(iter(again.losses.values())).shape[1]
    print(f"\nbest strengths trained again, the mean of {seeds} other seeds:")
    peer = next(name for name in again.losses if not name.startswith(OURS))
    for name, losses in again.losses.items():
        studies = ", ".join(f"{loss:.5f}" for loss in losses.mean(axis=1))
        above, error = again.against(name, peer)
        told = f"{above:+12.5f}" + ("" if math.isnan(error) else f" ± {error:.5f}")
        difference = "" if name == peer else f"{told} of {peer}'s"
        print(f"{name:15}{losses.mean():10.5f} ({studies}){difference}", flush=True)


def write_json(
    arguments: argparse.Namespace,
    rounds: Sequence[Mapping[str, Outcome]],
    again: Again | None = None,
) -> None:
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
            **(
                {"trained_again": {name: own.tolist() for name, own in again.losses.items()}}
                if again
                else {}
            ),
        }
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


CAPTION = """
seconds: regtune from the POST to the study's end, Optuna from the loading of the data to the end;
with start-up: from nothing, on an installed machine; epochs: of all trials together, those of
pruned ones included; / regtune and so on: how many times its seconds."""


if __name__ == "__main__":
    main()
