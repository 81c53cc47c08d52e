"""What it costs a study to search what makes shapes: the same trials in one shape, in two, in four.

MNIST, 784-128-10 with batch norm, batch 64. The choices are activation functions: they make stacks
of their own and hardly change what a step takes. Every trial trains all its epochs, so that all
studies train the same number; they take turns, a study each in every round, with database, service
and one worker as ``regtune up --study`` starts them, each in a new data folder.

Occupancy is the lane-seconds that trials were in training, of those that there were from the POST
to the study's end. Compiling goes on beside training, and takes the time of a core from it.

    python benchmarks/shapes.py --data-dir ~/data
"""

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.peers import BATCH_ROWS, shortened
from benchmarks.study import TEST_ROWS, running_site, write_mnist
from regtune import progress, supervisor
from regtune.client import Client, Document
from regtune.spec import StudySpec, parse_spec
from regtune.task import Storage
from worker.tasks.images import mnist

ACTIVATIONS = ("relu", "silu", "gelu", "tanh")
STUDY = "shapes"


@dataclass(frozen=True)
class Outcome:
    """What a study took: on the clock, in stacks that were built, in compiling."""

    shapes: int
    seconds: float
    occupancy: float
    stacks: int
    compiled: int
    compiling_seconds: float


def main() -> None:
    """Run all studies in turn; print and write what came out."""
    arguments = parse_arguments()
    data = shortened(mnist(Storage(arguments.data_dir)), arguments.rows, TEST_ROWS)
    os.environ |= {
        "REGTUNE_LANES": str(arguments.lanes),
        "REGTUNE_LOG_LEVEL": "debug",
        "REGTUNE_LOG_FORMAT": "json",
    }
    os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)  # set by torch as soon as it is imported
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="regtune-benchmark-") as folder:
        write_mnist(data, Path(folder))
        for seed in range(arguments.rounds):
            for shapes in arguments.shapes:
                outcomes.append(run(study_spec(arguments, shapes, seed), shapes, Path(folder)))
                print(json.dumps(asdict(outcomes[-1])), flush=True)
    show(outcomes)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(o) for o in outcomes], indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, default=Path(".regtune/data"))
    parser.add_argument("--shapes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rows", type=int, default=12_000, help="take only the first rows")
    parser.add_argument("--lanes", type=int, default=8)
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    return parser.parse_args()


def study_spec(arguments: argparse.Namespace, shapes: int, seed: int) -> StudySpec:
    """Return a study of so many shapes."""
    choices = {"model": {"activation": list(ACTIVATIONS[:shapes])}} if shapes > 1 else {}
    epochs = arguments.epochs
    return parse_spec(
        {
            "name": STUDY,
            "task": {"dataset": "mnist", "model": "mlp", "activation": ACTIVATIONS[0]},
            "training": {"batch_size": BATCH_ROWS, "max_epochs": epochs, "seed": seed},
            "search": {"patience": epochs, **choices},
            "budget": {"trials": arguments.trials},
            "sampler": {"name": "random", "seed": seed},
            "pruner": "none",
        }
    )


def run(spec: StudySpec, shapes: int, data_dir: Path) -> Outcome:
    """Run a study from its POST to its end, and read from the worker's log what it built."""
    with (
        tempfile.TemporaryDirectory(prefix="regtune-home-") as home,
        tempfile.TemporaryDirectory(prefix="regtune-data-") as folder,
    ):
        shutil.copytree(data_dir, folder, dirs_exist_ok=True)
        os.environ["REGTUNE_DATA_DIR"] = folder
        with running_site(Path(home)) as site, Client(site.url) as api:
            supervisor.submit(api, spec, Console(quiet=True))
            study = progress.show(api, spec.name, Console(quiet=True), site.pause)
            trained = sum(seconds_in_training(trial) for trial in api.trials(spec.name))
        seconds = progress.seconds_taken(study)
        lines = list(log_lines(Path(home) / "logs"))
    compiling = [line["seconds"] for line in lines if line["event"] == "compiling_took"]
    return Outcome(
        shapes=shapes,
        seconds=seconds,
        occupancy=trained / (int(os.environ["REGTUNE_LANES"]) * seconds),
        stacks=sum(line["event"] == "capacity" for line in lines),
        compiled=len(compiling),
        compiling_seconds=sum(compiling),
    )


def seconds_in_training(trial: Document) -> float:
    """Return how long a trial had a lane."""
    started, finished = (datetime.fromisoformat(trial[at]) for at in ("started_at", "finished_at"))
    return (finished - started).total_seconds()


def log_lines(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield what the worker has logged."""
    for path in folder.glob("worker*.log"):
        for line in path.read_text().splitlines():
            if line.startswith("{"):
                yield json.loads(line)


def show(outcomes: Sequence[Outcome]) -> None:
    """Print the medians."""
    table = Table(
        *("shapes", "seconds", "× one shape", "occupancy", "stacks built", "compiled"),
        box=None,
        pad_edge=False,
    )
    of_shapes = {o.shapes: [p for p in outcomes if p.shapes == o.shapes] for o in outcomes}
    first = median(o.seconds for o in next(iter(of_shapes.values())))
    for shapes, some in of_shapes.items():
        seconds = median(o.seconds for o in some)
        compiled = median(o.compiled for o in some), median(o.compiling_seconds for o in some)
        table.add_row(
            str(shapes),
            f"{seconds:.1f}",
            f"{seconds / first:.2f}",
            f"{median(o.occupancy for o in some):.0%}",
            f"{median(o.stacks for o in some):g}",
            f"{compiled[0]:g} in {compiled[1]:.0f} s",
        )
    Console(highlight=False).print(table)


if __name__ == "__main__":
    main()
