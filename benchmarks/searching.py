"""How good an answer a search finds with many trials at once, against one trial at a time.

The curves of ``curves.py`` are interpolated between their points (radial basis functions over the
strengths, logarithms of the losses), so that every point of the search space has a curve; each
trial's is raised or lowered by a random percent or so. On such landscapes a search is
repeated with other seeds:

- stock Optuna: ``TPESampler`` and ``MedianPruner`` as they come, one trial at a time;
- regtune: the scheduler's mirror, with the pruner that is its default, eight lanes that go on to
  the next trial as soon as one ends, and verdicts heeded one epoch late;
- regtune, blind: the same if its sampler takes running trials for bad ones, whatever their curves;
- regtune, one lane.

All stop a trial when its patience runs out. Printed are the lowest loss that any trial has reached,
how far that is from the first one's in the same studies, with its standard error, and how many
epochs were trained.

    python benchmarks/searching.py --runs 4      # under a minute
    python benchmarks/searching.py
"""

import argparse
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from unittest.mock import patch

import numpy as np
import optuna
from numpy.typing import NDArray
from scipy.interpolate import RBFInterpolator

from benchmarks.curves import FOLDER, LANDSCAPES, SEEDS, Curves, path_of
from benchmarks.replaying import play
from benchmarks.stock import suggest
from regtune.space import Fixed
from regtune.spec import StudySpec, parse_spec
from service.scheduler.mirror import Mirror
from service.scheduler.outlook import OutlookStorage
from worker.training.early_stopping import replay

LANES = 8
NOISE = 0.01
"""Standard deviation of a trial's losses, as a part of them."""
WORST_LOSS = 5.0


@dataclass(frozen=True)
class Found:
    """What a search came to."""

    best_loss: float
    epochs: int


@dataclass(frozen=True)
class Search:
    """One study: on a landscape and one of its seeds, the run of a number."""

    folder: Path
    landscape: str
    seed: int
    run: int
    trials: int

    @property
    def spec(self) -> StudySpec:
        """The study; its number of trials and its sampler's seed are this search's."""
        spec = LANDSCAPES[self.landscape].spec.canonical()
        return parse_spec(
            {
                **spec,
                "name": f"{self.landscape}-{self.seed}-{self.run}",
                "budget": {"trials": self.trials},
                "sampler": {"name": "tpe", "seed": self.run},
            }
        )


class Terrain:
    """The curves of all trials of one search."""

    def __init__(self, search: Search) -> None:
        self._landscape = _interpolated(search.folder, search.landscape, search.seed)
        self._spec = search.spec
        self._random = np.random.default_rng(search.run)

    def curve(self, params: Mapping[str, float]) -> list[float]:
        """Return the losses of a trial until its patience runs out."""
        logs = self._landscape(_place(self._spec, params)[None])[0]
        losses = np.exp(logs + NOISE * self._random.standard_normal()).tolist()
        return losses[: replay(losses, int(params["patience"]), min_delta=0.0).epoch]


@cache
def _interpolated(folder: Path, landscape: str, seed: int) -> RBFInterpolator:
    curves, spec = Curves.read(path_of(folder, landscape, seed)), LANDSCAPES[landscape].spec
    losses = np.nan_to_num(curves.validation.astype(np.float64), nan=WORST_LOSS)
    places = np.stack([_place(spec, point) for point in curves.points])
    return RBFInterpolator(places, np.log(np.minimum(losses, WORST_LOSS)), kernel="linear")


def _place(spec: StudySpec, params: Mapping[str, float]) -> NDArray[np.float64]:
    """Return where a point lies, each strength that shapes a curve from 0 to 1."""
    place = []
    for name, parameter in spec.search.parameters().items():
        if isinstance(parameter, Fixed) or name == "patience":
            continue
        kind = parameter.distribution()
        assert isinstance(kind, optuna.distributions.FloatDistribution)
        scale = math.log if kind.log else float
        low, high, value = map(scale, (kind.low, kind.high, max(params[name], kind.low)))
        place.append((value - low) / (high - low))
    return np.array(place)


def stock(search: Search) -> Found:
    """Search as a script with Optuna alone does."""
    terrain, spec = Terrain(search), search.spec
    seen: list[float] = []

    def objective(trial: optuna.Trial) -> float:
        fixed = {"learning_rate": spec.training.learning_rate}
        curve = terrain.curve(fixed | suggest(trial, spec))
        for epoch, loss in enumerate(curve, 1):
            seen.append(loss)
            trial.report(loss, epoch)
            if trial.should_prune():
                raise optuna.TrialPruned
        return min(curve)

    study = optuna.create_study(
        sampler=optuna.samplers.TPESampler(seed=search.run), pruner=optuna.pruners.MedianPruner()
    )
    study.optimize(objective, n_trials=search.trials)
    return Found(min(seen), len(seen))


def ours(search: Search, lanes: int = LANES) -> Found:
    """Search as the scheduler does, with so many lanes."""
    terrain, mirror = Terrain(search), Mirror(search.spec)
    played = play(mirror, lambda _, one: terrain.curve(one.params), search.trials, lanes)
    return Found(played.best_loss, played.epochs)


def blind(search: Search) -> Found:
    """Search as the scheduler would if its sampler saw nothing of running trials' curves."""
    with patch.object(OutlookStorage, "looking_ahead", lambda self: nullcontext()):
        return ours(search)


def one_lane(search: Search) -> Found:
    """Search as the scheduler does for a single lane."""
    return ours(search, lanes=1)


SEARCHES: Mapping[str, Callable[[Search], Found]] = {
    "stock Optuna": stock,
    "regtune": ours,
    "regtune, blind": blind,
    "regtune, one lane": one_lane,
}


def main() -> None:
    """Search every landscape in every way, and print what came out."""
    arguments = parse_arguments()
    print(f"{'':12}{'':20}{'best loss':>10}{'of the first':>22}{'epochs':>8}")
    with ProcessPoolExecutor(arguments.jobs) as pool:
        for landscape in arguments.only:
            searches = [
                Search(arguments.curves, landscape, seed, run, arguments.trials)
                for seed in range(arguments.seeds)
                for run in range(arguments.runs)
            ]
            first: NDArray[np.float64] | None = None
            for name in SEARCHES:
                found = list(pool.map(_search, [name] * len(searches), searches, chunksize=4))
                losses = np.array([one.best_loss for one in found])
                first = losses if first is None else first
                epochs = float(np.mean([one.epochs for one in found]))
                print(f"{landscape:12}{name:20}{_cells(losses, first)}{epochs:8.0f}", flush=True)


def _search(name: str, search: Search) -> Found:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return SEARCHES[name](search)


def _cells(losses: NDArray[np.float64], first: NDArray[np.float64]) -> str:
    ratio = losses / first - 1
    error = ratio.std() / math.sqrt(len(ratio))
    return f"{losses.mean():10.5f}{100 * ratio.mean():+14.2f} ± {100 * error:.2f} %"


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--curves", type=Path, default=FOLDER, help="default: benchmarks/data")
    parser.add_argument("--only", nargs="+", choices=LANDSCAPES, default=[*LANDSCAPES])
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--runs", type=int, default=40, help="of each seed; default: 40")
    parser.add_argument("--trials", type=int, default=32)
    parser.add_argument("--jobs", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
