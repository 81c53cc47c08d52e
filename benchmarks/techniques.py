"""What each regularization technique costs in a training step: with it against without it.

Lanes train random images, in the shapes of MNIST or of CIFAR-10; an engine for each technique, and
one without any of them. They take turns, an epoch each, in the steady state of one form of the
step: recorded, or compiled. The ratio is the median over the rounds of the seconds with a technique
to those without, in the same round.

    python benchmarks/techniques.py mlp --lanes 8
    python benchmarks/techniques.py colour --form recorded --techniques shift rotation
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.peers import BATCH_ROWS, CLASSES, cnn, mlp
from benchmarks.problems import FOREVER, SEED, some_trials
from regtune.spec import TaskSpec, Training, Validation
from regtune.task import Data, Storage
from worker.training import engine as engine_module
from worker.training.cores import EPOCHS_TRIED
from worker.training.engine import Engine

STEPS = 80
"""Of an epoch: enough to record a step in the first one."""

HELD_OUT = 0.02
"""Share of the rows, so that the validation hardly counts."""

COMMON = frozenset({"weight_decay", "dropout", "l1_lambda"})
NOTHING = "none"


@dataclass(frozen=True)
class Problem:
    """A network for square images."""

    network: Callable[[float], nn.Module]
    channels: int
    side: int


@dataclass(frozen=True)
class Technique:
    """A strength beside those that every lane has, and how images are changed."""

    strengths: Mapping[str, float]
    augment: Sequence[str] = ()


@dataclass(frozen=True)
class Cost:
    """What a step of one lane takes, and how many times that is what it takes without."""

    technique: str
    milliseconds: float
    ratio: float


PROBLEMS = {
    "mlp": Problem(mlp, channels=1, side=28),
    "cnn": Problem(cnn, channels=1, side=28),
    "colour": Problem(partial(cnn, channels=3, side=32), channels=3, side=32),
}
TECHNIQUES = {
    NOTHING: Technique({}),
    "input_noise": Technique({"input_noise": 0.3}),
    "weight_noise": Technique({"weight_noise": 0.01}),
    "input_dropout": Technique({"input_dropout": 0.2}),
    "label_smoothing": Technique({"label_smoothing": 0.1}),
    "mixup": Technique({"mixup": 0.5}),
    "max_norm": Technique({"max_norm": 3.0}),
    "max_gradient_norm": Technique({"max_gradient_norm": 1.0}),
    **{
        kind: Technique({"augment_strength": 0.5}, [kind])
        for kind in ("shift", "flip", "rotation", "erasing")
    },
    "all four": Technique({"augment_strength": 0.5}, ["shift", "flip", "rotation", "erasing"]),
}


def main() -> None:
    """Measure, and print and write what came out."""
    arguments = parse_arguments()
    problem = PROBLEMS[arguments.problem]
    names = [NOTHING, *(name for name in arguments.techniques if name != NOTHING)]
    with ExitStack() as opened:
        engines = {
            name: opened.enter_context(closing(build(problem, TECHNIQUES[name], arguments)))
            for name in names
        }
        for name, engine in engines.items():
            bring_to_steady_state(engine, TECHNIQUES[name], arguments)
        costs = compare(engines, arguments)
    show(costs, arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(cost) for cost in costs], indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("problem", choices=PROBLEMS)
    parser.add_argument("--techniques", nargs="+", choices=TECHNIQUES, default=list(TECHNIQUES))
    parser.add_argument("--lanes", type=int, default=8)
    parser.add_argument("--form", choices=("recorded", "compiled"), default="compiled")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    return parser.parse_args()


def build(problem: Problem, technique: Technique, arguments: argparse.Namespace) -> Engine:
    """Build an engine whose lanes use a technique."""
    data = images(problem)
    with (
        patch.object(engine_module, "find_dataset", lambda name: lambda storage: data),
        patch.object(engine_module, "find_model", lambda name: lambda *_: problem.network(0.5)),
    ):
        return Engine(
            task=TaskSpec(dataset="images", model="network"),
            training=Training(
                batch_size=BATCH_ROWS, max_epochs=FOREVER, seed=SEED, augment=technique.augment
            ),
            validation=Validation(fraction=HELD_OUT),
            storage=Storage(Path("unused")),
            device=torch.device(arguments.device),
            max_lanes=arguments.lanes,
            knobs=COMMON | technique.strengths.keys(),
            dtype=getattr(torch, arguments.dtype),
            threads=arguments.threads,
            compiles=arguments.form == "compiled",
        )


def images(problem: Problem) -> Data:
    """Return random images, of which so many are trained on as full batches take."""
    random = np.random.default_rng(SEED)

    def draw(rows: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        shape = (rows, problem.channels, problem.side, problem.side)
        x = random.integers(0, 256, size=shape, dtype=np.uint8)
        return x, random.integers(0, CLASSES, size=rows)

    return Data(*draw(round(STEPS * BATCH_ROWS / (1 - HELD_OUT))), *draw(100), classes=CLASSES)


def bring_to_steady_state(
    engine: Engine, technique: Technique, arguments: argparse.Namespace
) -> None:
    """Train until steps are recorded, compiled where they shall be, and threads chosen."""
    trials = some_trials(arguments.lanes)
    engine.join([replace(trial, **technique.strengths) for trial in trials])
    trying_threads = 2 * EPOCHS_TRIED if arguments.lanes < arguments.threads else 0
    for _ in range(2):
        for _ in range(1 + trying_threads):
            engine.train_epoch()
        engine.settle()


def compare(engines: Mapping[str, Engine], arguments: argparse.Namespace) -> list[Cost]:
    """Let all train an epoch in turn, again and again."""
    rounds = [
        {name: seconds(engine) for name, engine in engines.items()} for _ in range(arguments.rounds)
    ]
    lane_steps = STEPS * arguments.lanes
    return [
        Cost(
            name,
            1e3 * median(each[name] for each in rounds) / lane_steps,
            median(each[name] / each[NOTHING] for each in rounds),
        )
        for name in engines
    ]


def seconds(engine: Engine) -> float:
    """Return how long an epoch takes."""
    started = perf_counter()
    engine.train_epoch()
    return perf_counter() - started


def show(costs: Sequence[Cost], arguments: argparse.Namespace) -> None:
    """Print the figures."""
    table = Table("technique", "ms a lane's step", "× without", box=None, pad_edge=False)
    for cost in costs:
        table.add_row(cost.technique, f"{cost.milliseconds:.3f}", f"{cost.ratio:.2f}")
    settings = ("problem", "lanes", "form", "dtype", "threads")
    console = Console(highlight=False)
    console.print(", ".join(f"{name} {getattr(arguments, name)}" for name in settings))
    console.print(table)


if __name__ == "__main__":
    main()
