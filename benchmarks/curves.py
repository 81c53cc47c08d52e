"""Full learning curves of a search space, trained by the engine, for ``pruners.py`` to replay.

Every landscape is a data set, a model and a training, with regtune's default ranges or named ones.
Its points are those that a study of the sampler ``qmc`` would try: the two reference points, then
a Sobol sequence. Each is trained to the last epoch, with patience off, once for every seed; a seed
is other held-out rows, initial weights, order and dropout. Patience cuts a curve and changes
nothing else, so ``pruners.py`` applies it afterwards.

One file for each landscape and seed, written when it is complete; what is there already is kept.
MNIST and Fashion-MNIST are read, or downloaded, as the engine's data sets do; ``tabular/`` in the
data folder must hold ``phoneme.csv`` (OpenML 1489) for the landscape of that name.

    python benchmarks/curves.py --data-dir ~/data
    python benchmarks/curves.py --data-dir ~/data --only digits --into /tmp/curves
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.peers import shortened
from regtune.spec import REFERENCE_TRIALS, StudySpec, parse_spec
from regtune.task import Data, Storage
from service.scheduler.suggestion import as_suggestion, predetermined
from worker.tasks.images import digits, fashion_mnist, mnist
from worker.training import engine as engine_module
from worker.training.engine import KNOBS, Engine
from worker.training.lanes import LaneEpoch, LaneTrial

FOLDER = Path(__file__).parent / "data"
POINTS = 60 + REFERENCE_TRIALS
SEEDS = 3
LANES = 16
SIGNIFICANT_BITS = 14
"""Of a stored loss: it is right to three parts in a hundred thousand, and compresses to half."""


def phoneme(storage: Storage) -> Data:
    """Return the 5 404 rows of OpenML 1489: five harmonics of a vowel, nasal or oral."""
    table = np.loadtxt(storage.data_dir / "tabular" / "phoneme.csv", delimiter=",")
    table = np.random.default_rng(0).permutation(table)
    x, y = table[:, :-1].astype(np.float32), table[:, -1].astype(np.int64)
    return Data(x[:4400], y[:4400], x[4400:], y[4400:], classes=2)


@dataclass(frozen=True)
class Landscape:
    """What is trained, as a part of a study, on the first ``rows`` of a data set."""

    name: str
    load: Callable[[Path], Data]
    rows: int
    model: Mapping[str, Any]
    training: Mapping[str, Any]
    search: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def spec(self) -> StudySpec:
        """The study whose trials are trained; the training's seed is set for each run."""
        return parse_spec(
            {
                "name": self.name,
                "task": {"dataset": self.load.__name__, "model": "mlp", **self.model},
                "training": self.training,
                "budget": {"trials": POINTS},
                "sampler": "qmc",
                **({"search": self.search} if self.search else {}),
            }
        )

    def points(self) -> Sequence[Mapping[str, float]]:
        """Return what the trials of the study use, by number."""
        points = [predetermined(self.spec, number) for number in range(POINTS)]
        return [
            as_suggestion(self.spec, number, point, {}).params
            for number, point in enumerate(points)
            if point is not None
        ]


RATES = {"low": 1e-3, "high": 1e-1, "log": True}
LANDSCAPES = {
    landscape.name: landscape
    for landscape in (
        Landscape(
            "fashion",
            fashion_mnist,
            3000,
            {"hidden": [128], "norm": "batch"},
            {"max_epochs": 120},
        ),
        Landscape(
            "mnist",
            mnist,
            2000,
            {"hidden": [128], "norm": "batch"},
            {"max_epochs": 80, "batch_size": 64},
        ),
        Landscape(
            "mnist-short",
            mnist,
            60_000,
            {"hidden": [128], "norm": "batch"},
            {"max_epochs": 20, "batch_size": 64},
        ),
        Landscape(
            "digits",
            digits,
            1437,
            {"hidden": [128], "norm": "batch"},
            {"max_epochs": 100, "batch_size": 64},
        ),
        Landscape(
            "phoneme",
            phoneme,
            4400,
            {"hidden": [128, 128], "norm": "layer"},
            {"optimizer": "adam", "max_epochs": 100, "batch_size": 128},
        ),
        Landscape(
            "fashion-sgd",
            fashion_mnist,
            2000,
            {"hidden": [128], "norm": "none"},
            {"optimizer": "sgd", "max_epochs": 80, "batch_size": 64, "schedule": "cosine"},
            {"learning_rate": RATES},
        ),
    )
}


@dataclass(frozen=True)
class Curves:
    """What one seed of a landscape gave: ``(points, epochs)`` each, and the points by number.

    ``seconds`` is what an epoch took on the clock, for all lanes that trained together.
    """

    points: Sequence[Mapping[str, float]]
    validation: NDArray[np.float32]
    training: NDArray[np.float32]
    seconds: NDArray[np.float32]

    def write(self, path: Path) -> None:
        """Write a file, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")
        with unfinished.open("wb") as file:
            np.savez_compressed(
                file,
                points=json.dumps(self.points),
                validation=_rounded(self.validation),
                training=_rounded(self.training),
                seconds=_rounded(self.seconds),
            )
        unfinished.replace(path)

    @classmethod
    def read(cls, path: Path) -> "Curves":
        """Read a file."""
        with np.load(path) as stored:
            return cls(
                json.loads(str(stored["points"])),
                stored["validation"],
                stored["training"],
                stored["seconds"],
            )


def path_of(folder: Path, name: str, seed: int) -> Path:
    """Return where the curves of a landscape and seed are stored."""
    return folder / f"{name}-{seed}.npz"


def main() -> None:
    """Train what is missing."""
    arguments = parse_arguments()
    torch.set_flush_denormal(True)
    for seed in range(arguments.seeds):
        for name in arguments.only or LANDSCAPES:
            path = path_of(arguments.into, name, seed)
            if path.exists():
                continue
            started = perf_counter()
            curves = train(LANDSCAPES[name], seed, arguments.data_dir, arguments.threads)
            curves.write(path)
            took = perf_counter() - started
            print(f"{path.name}: {took:.0f} s, {path.stat().st_size / 1000:.0f} kB", flush=True)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, default=Path(".regtune/data"))
    parser.add_argument("--into", type=Path, default=FOLDER, help="default: benchmarks/data")
    parser.add_argument("--only", nargs="+", choices=LANDSCAPES)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def train(landscape: Landscape, seed: int, data_dir: Path, threads: int) -> Curves:
    """Train all points of a landscape to the end."""
    points = landscape.points()
    engine = build_engine(landscape, seed, data_dir, threads)
    max_epochs = landscape.spec.training.max_epochs
    measured = np.full((3, len(points), max_epochs), math.nan, np.float32)
    trials = [
        LaneTrial(key=key, **{**point, "patience": max_epochs + 1})
        for key, point in enumerate(points)
    ]
    for epoch in train_all(engine, trials):
        measured[:, epoch.key, epoch.epoch - 1] = (
            epoch.validation_loss,
            epoch.train_loss,
            epoch.seconds,
        )
    engine.close()
    return Curves(points, *measured)


def train_all(engine: Engine, trials: Sequence[LaneTrial]) -> Iterator[LaneEpoch]:
    """Train so many trials to their ends, as many at once as there is room for; yield all epochs.

    The engine is left empty and open.
    """
    waiting = list(trials)
    while waiting or engine.lanes:
        room = engine.free_slots
        engine.join(waiting[:room])
        waiting = waiting[room:]
        epochs = engine.train_epoch()
        yield from epochs
        engine.leave([epoch.key for epoch in epochs if epoch.ended])


def build_engine(landscape: Landscape, seed: int, data_dir: Path, threads: int) -> Engine:
    """Build the engine that a worker would, over the landscape's rows."""
    spec = landscape.spec
    data = shortened(landscape.load(Storage(data_dir)), landscape.rows, landscape.rows)
    with patch.object(engine_module, "find_dataset", lambda name: lambda storage: data):
        return Engine(
            task=spec.task,
            training=spec.training.model_copy(update={"seed": seed}),
            validation=spec.validation,
            storage=Storage(data_dir),
            device=torch.device("cpu"),
            max_lanes=LANES,
            knobs=KNOBS & set(spec.search.searched()),
            threads=threads,
        )


def _rounded(values: NDArray[np.float32]) -> NDArray[np.float32]:
    mantissa, exponent = np.frexp(values)
    return np.ldexp(np.round(np.ldexp(mantissa, SIGNIFICANT_BITS)), exponent - SIGNIFICANT_BITS)


if __name__ == "__main__":
    main()
