"""Which pruners keep the winner, and what they save: replayed on full learning curves.

The curves are those of ``curves.py``. A run is a study of all points of a landscape in random
order, the two reference points first, in 16 lanes that go on to the next trial as soon as one ends.
The scheduler's own mirror holds the study and asks the pruner, Optuna's as well as ours, and a
verdict is heeded one epoch after the one that earned it, as by a worker that reports every epoch.
All is replayed twice: with patience off, every curve to its last epoch; and with the patience that
each point came with, which saves much by itself, so that there is less to save for a pruner.

- winner: the share of runs in which the trial of the lowest loss ran to its end;
- within 1 SE: the share in which one did that comes within a standard error of the lowest loss. It
  is that of the loss of one training: the standard deviation over the seeds, once what a point has
  in common and what a seed has in common are taken out, over the better half of the points;
- lost: by how many standard errors the best that was left is worse, on average;
- saved: the share of the epochs that was not trained.

    python benchmarks/pruners.py --runs 2        # under a minute
    python benchmarks/pruners.py --json pruners.json
    python benchmarks/pruners.py --tune          # the constants of our own, cross-validated
"""

import argparse
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest.mock import patch

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.pruners import BasePruner

from benchmarks.curves import FOLDER, LANDSCAPES, SEEDS, Curves, path_of
from benchmarks.replaying import play
from regtune.spec import REFERENCE_TRIALS, StudySpec, parse_spec
from service.scheduler import mirror as mirror_module
from service.scheduler.extrapolation import ExtrapolationPruner
from service.scheduler.mirror import Mirror
from service.scheduler.pruning import make_pruner
from worker.training.early_stopping import replay

LANES = 16

PRUNERS: Mapping[str, Mapping[str, Any]] = {
    "none": {"name": "none"},
    "median": {"name": "median", "first_epoch": 1},
    "asha": {"name": "asha", "first_epoch": 1},
    "hyperband": {"name": "hyperband", "first_epoch": 1},
    "median, late": {"name": "median"},
    "asha, late": {"name": "asha"},
    "hyperband, late": {"name": "hyperband"},
    "extrapolation": {"name": "extrapolation"},
}
"""Optuna's from the first epoch on, then from a third of them on, which is regtune's default."""

MARGINS = (0.75, 1.0, 1.25)
LEAST_SHARES = (0.7, 0.8, 1.0)
FIRST_SHARES = (1 / 5, 1 / 4, 1 / 3)
TARGET = 0.95

MakePruner = Callable[[StudySpec], BasePruner]


@dataclass(frozen=True)
class Table:
    """The curves of one landscape and seed, and where each of them ends."""

    landscape: str
    seed: int
    patience: bool
    """Whether trials stop when theirs runs out."""
    losses: NDArray[np.float64]
    """By point and epoch."""
    ends: Sequence[int]
    """The last epoch of each trial, by point."""

    @classmethod
    def read(cls, folder: Path, landscape: str, seed: int, *, patience: bool) -> "Table":
        """Read the curves of a file and cut them where their patience runs out, if it may."""
        curves = Curves.read(path_of(folder, landscape, seed))
        losses = curves.validation.astype(np.float64)
        ends = [
            _last_epoch(curve, int(point["patience"]) if patience else len(curve))
            for curve, point in zip(losses, curves.points, strict=True)
        ]
        return cls(landscape, seed, patience, losses, ends)

    def curve(self, point: int) -> list[float]:
        """Return the losses of a point's trial, to its end."""
        curve: list[float] = self.losses[point, : self.ends[point]].tolist()
        return curve

    @cached_property
    def values(self) -> NDArray[np.float64]:
        """The loss that each trial ends with, by point; infinite where it diverges."""
        return np.array(
            [
                curve[:end].min() if np.isfinite(curve[:end]).all() else math.inf
                for curve, end in zip(self.losses, self.ends, strict=True)
            ]
        )


def _last_epoch(curve: NDArray[np.float64], patience: int) -> int:
    bad = np.flatnonzero(~np.isfinite(curve))
    until = int(bad[0]) + 1 if len(bad) else len(curve)
    return replay(curve[:until].tolist(), patience, min_delta=0.0).epoch


@dataclass(frozen=True)
class Run:
    """What came out of one run."""

    pruner: str
    landscape: str
    patience: bool
    kept_winner: bool
    lost: float
    saved: float


@dataclass(frozen=True)
class Summary:
    """Runs of one pruner, on average; the fields are the columns of the table."""

    winner: float
    within: float
    lost: float
    saved: float

    @classmethod
    def of(cls, runs: Sequence[Run]) -> "Summary":
        """Average over runs."""
        return cls(
            winner=fmean(run.kept_winner for run in runs),
            within=fmean(run.lost <= 1 for run in runs),
            lost=fmean(run.lost for run in runs),
            saved=fmean(run.saved for run in runs),
        )


def main() -> None:
    """Replay, and print what came out."""
    arguments = parse_arguments()
    tables = [
        Table.read(arguments.curves, landscape, seed, patience=patience)
        for landscape, seed, patience in product(LANDSCAPES, range(arguments.seeds), (False, True))
    ]
    errors = standard_errors(tables)
    if arguments.tune:
        print_tuning(replay_all(tables, errors, candidates(), arguments))
        return
    pruners = {name: built_in(pruner) for name, pruner in PRUNERS.items()}
    runs = replay_all(tables, errors, pruners, arguments)
    print_tables(runs, errors)
    if arguments.json:
        arguments.json.write_text(json.dumps(as_figures(runs, errors), indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--curves", type=Path, default=FOLDER, help="default: benchmarks/data")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--runs", type=int, default=20, help="orders of each table; default: 20")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--tune", action="store_true", help="try other constants of our own")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    return parser.parse_args()


def standard_errors(tables: Iterable[Table]) -> dict[str, float]:
    """Return the standard error of the loss of one training, by landscape."""
    values: dict[str, list[NDArray[np.float64]]] = {}
    for table in tables:
        if not table.patience:
            values.setdefault(table.landscape, []).append(table.values)
    return {landscape: _residual_deviation(np.stack(own)) for landscape, own in values.items()}


def _residual_deviation(losses: NDArray[np.float64]) -> float:
    """Return the standard deviation that neither point nor seed explains; ``(seeds, points)``."""
    seeds, points = losses.shape
    better = np.median(losses, axis=0).argsort()[: points // 2]
    values = losses[:, better]
    residuals = values - values.mean(0) - values.mean(1, keepdims=True) + values.mean()
    return math.sqrt((residuals**2).sum() / ((seeds - 1) * (len(better) - 1)))


def replay_all(
    tables: Sequence[Table],
    errors: Mapping[str, float],
    pruners: Mapping[str, MakePruner],
    arguments: argparse.Namespace,
) -> list[Run]:
    """Replay every table in several orders with every pruner."""
    jobs = [
        (table, errors[table.landscape], name, make, order)
        for table in tables
        for name, make in pruners.items()
        for order in range(arguments.runs)
    ]
    with ProcessPoolExecutor(arguments.jobs) as pool:
        return list(pool.map(run_study, *zip(*jobs, strict=True), chunksize=20))


def run_study(table: Table, error: float, name: str, make: MakePruner, order: int) -> Run:
    """Replay one study: all points, in the order of this number."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    spec = parse_spec(
        {
            "name": f"{table.landscape}-{table.seed}-{order}",
            "task": {"dataset": "digits", "model": "mlp"},
            "training": {"max_epochs": table.losses.shape[1]},
            "budget": {"trials": len(table.losses)},
            "sampler": "random",
        }
    )
    with patch.object(mirror_module, "make_pruner", make):
        mirror = Mirror(spec)
    points = _shuffled(len(table.losses), order)
    played = play(mirror, lambda number, _: table.curve(points[number]), len(points), LANES)
    kept = {points[number] for number in played.complete}
    lowest = table.values.min()
    return Run(
        pruner=name,
        landscape=table.landscape,
        patience=table.patience,
        kept_winner=int(table.values.argmin()) in kept,
        lost=float(min(table.values[point] for point in kept) - lowest) / error,
        saved=1 - played.epochs / sum(table.ends),
    )


def _shuffled(points: int, order: int) -> list[int]:
    suggested = np.random.default_rng(order).permutation(np.arange(REFERENCE_TRIALS, points))
    return [*range(REFERENCE_TRIALS), *map(int, suggested)]


def built_in(pruner: Mapping[str, Any]) -> MakePruner:
    """Return how the pruner that a study asks for is made."""
    return partial(_make_for, pruner)


def _make_for(pruner: Mapping[str, Any], spec: StudySpec) -> BasePruner:
    return make_pruner(parse_spec(spec.canonical() | {"pruner": pruner}))


def _tuned(margin: float, least_share: float, first_share: float, spec: StudySpec) -> BasePruner:
    epochs = spec.training.max_epochs
    return ExtrapolationPruner(max(1, int(epochs * first_share)), epochs, margin, least_share)


def candidates() -> dict[str, MakePruner]:
    """Return our pruner with other constants."""
    return {
        f"margin {margin}, share {share}, first at {first:.2f}": partial(
            _tuned, margin, share, first
        )
        for margin, share, first in product(MARGINS, LEAST_SHARES, FIRST_SHARES)
    }


def print_tables(runs: Sequence[Run], errors: Mapping[str, float]) -> None:
    """Print a table for each way to stop, and what they say together."""
    for patience in (False, True):
        chosen = [run for run in runs if run.patience == patience]
        print(f"\n{'with patience as searched' if patience else 'with patience off'}, ", end="")
        print("percent: winner / within 1 SE / saved, and standard errors lost")
        print(f"{'':18}" + "".join(f"{name:>23}" for name in [*errors, "all"]))
        for pruner in PRUNERS:
            own = [run for run in chosen if run.pruner == pruner]
            parts = [[run for run in own if run.landscape == name] for name in errors]
            print(f"{pruner:18}" + "".join(f"{_cell(part):>23}" for part in [*parts, own]))
    print("\nstandard error: " + ", ".join(f"{n} {error:.4f}" for n, error in errors.items()))
    print(f"{len(runs) // len(PRUNERS)} runs of each pruner")


def _cell(runs: Sequence[Run]) -> str:
    s = Summary.of(runs)
    return f"{100 * s.winner:.0f} / {100 * s.within:.0f} / {100 * s.saved:.0f}, {s.lost:.2f}"


def print_tuning(runs: Sequence[Run]) -> None:
    """Print every candidate, and how the best one of all landscapes but one does on that one.

    Best is what saves most, of those that keep one within a standard error in 95 % of the runs, or
    of those that do so most often.
    """
    names = list(dict.fromkeys(run.pruner for run in runs))
    for patience in (False, True):
        print(f"\n{'with patience as searched' if patience else 'with patience off'}")
        for name in names:
            own = [run for run in runs if run.pruner == name and run.patience == patience]
            print(f"{name:40}{_cell(own):>24}")
    landscapes = list(dict.fromkeys(run.landscape for run in runs))
    left_out: list[Run] = []
    print("\nchosen on the other landscapes, on the one left out:")
    for landscape in landscapes:
        others = {
            name: Summary.of(
                [run for run in runs if run.pruner == name and run.landscape != landscape]
            )
            for name in names
        }
        best = max(names, key=lambda n: (min(others[n].within, TARGET), others[n].saved))
        own = [run for run in runs if run.pruner == best and run.landscape == landscape]
        left_out += own
        for patience in (False, True):
            cell = _cell([run for run in own if run.patience == patience])
            print(f"{landscape:14}{'patience' if patience else 'off':10}{best:40}{cell:>24}")
    print("all left-out landscapes, patience off:", _cell([r for r in left_out if not r.patience]))
    print("all left-out landscapes, with patience:", _cell([r for r in left_out if r.patience]))


def as_figures(runs: Sequence[Run], errors: Mapping[str, float]) -> dict[str, Any]:
    """Return all that was measured, for a file."""
    return {
        "standard_errors": errors,
        "runs_each": len(runs) // len(PRUNERS),
        "summaries": [
            {
                "pruner": pruner,
                "patience": patience,
                "landscape": landscape,
                **asdict(
                    Summary.of(
                        [
                            run
                            for run in runs
                            if (run.pruner, run.patience) == (pruner, patience)
                            and landscape in (run.landscape, "all")
                        ]
                    )
                ),
            }
            for pruner, patience, landscape in product(PRUNERS, (False, True), [*errors, "all"])
        ],
    }


if __name__ == "__main__":
    main()
