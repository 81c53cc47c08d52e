"""What to try next: two reference points first, then whatever the sampler says.

A sampler is made anew for each trial from the study's seed and the trial's number, so that a
suggestion never depends on which replica was asked, or for how long that one had been running.
"""

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import BaseSampler
from optuna.study import Study as OptunaStudy
from optuna.trial import FrozenTrial

from regtune.leasing import Suggestion
from regtune.space import Fixed, Searched
from regtune.spec import REFERENCE_TRIALS, StudySpec, grid_values

COMMON_DROPOUT = 0.2
COMMON_PATIENCE = 10
COMMON_DECOUPLED_DECAY = 0.01
"""The default of ``torch.optim.AdamW``."""
COMMON_COUPLED_DECAY = 1e-4
"""He et al. 2016, arXiv 1512.03385, and most recipes for SGD since."""

MOST_SHUFFLED = 2**18
"""Points of a grid that are put in order; distinct ones among them exceed the largest budget."""

STARTUP_TRIALS = 10
"""Random trials before a model-based sampler has anything to go by; fewer in a small study."""


def distributions(spec: StudySpec) -> dict[str, BaseDistribution]:
    """Return how Optuna sees the search space of a study."""
    return {name: parameter.distribution() for name, parameter in spec.search.searched().items()}


def kind_of(number: int) -> str:
    """Return whether a trial is a reference point, and which, or one that a sampler suggests."""
    return ("baseline", "default")[number] if number < REFERENCE_TRIALS else "suggested"


def predetermined(spec: StudySpec, number: int) -> dict[str, float] | None:
    """Return the point of a trial that its number alone decides; None where a sampler must say.

    These are the reference points, the grid and the quasi-Monte Carlo sequence.
    """
    match kind_of(number), spec.sampler.name:
        case "baseline", _:
            return _everything_off(spec)
        case "default", _:
            return _common_default(spec)
        case _, "grid":
            return _grid_point(spec, number - REFERENCE_TRIALS)
        case _, "qmc":
            return _sobol_point(spec, number - REFERENCE_TRIALS)
    return None


def make_sampler(spec: StudySpec, number: int) -> BaseSampler:
    """Return the sampler that suggests the trial of this number."""
    seed = int(np.random.SeedSequence([spec.sampler.seed, number]).generate_state(1)[0])
    startup = min(STARTUP_TRIALS, max(REFERENCE_TRIALS, spec.budget.trials // 4))
    match spec.sampler.name:
        case "tpe":
            return _Tpe(
                distributions(spec),
                seed=seed,
                n_startup_trials=startup,
                multivariate=True,
                constant_liar=True,
            )
        case "gp":
            return optuna.samplers.GPSampler(
                seed=seed, n_startup_trials=startup, deterministic_objective=False
            )
        case "cmaes":
            return optuna.samplers.CmaEsSampler(
                seed=seed,
                n_startup_trials=REFERENCE_TRIALS,
                independent_sampler=optuna.samplers.RandomSampler(seed=seed),
                warn_independent_sampling=False,
            )
    return optuna.samplers.RandomSampler(seed=seed)


class _Tpe(optuna.samplers.TPESampler):
    """Optuna's, told the search space, which it would else look up in every trial of the study."""

    def __init__(self, space: Mapping[str, BaseDistribution], **options: Any) -> None:
        super().__init__(**options)
        self._space = {name: kind for name, kind in sorted(space.items()) if not kind.single()}

    def infer_relative_search_space(
        self, study: OptunaStudy, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return the parameters that are sampled together: all of them, as Optuna orders them."""
        return self._space


def as_suggestion(
    spec: StudySpec,
    number: int,
    suggested: Mapping[str, float],
    system_attrs: Mapping[str, object],
) -> Suggestion:
    """Return the trial to append for what was suggested, with the values that will be used."""
    return Suggestion(
        kind=kind_of(number),
        suggested=suggested,
        distributions=distributions(spec),
        params=_used(spec, suggested),
        system_attrs=system_attrs,
    )


def _used(spec: StudySpec, suggested: Mapping[str, float]) -> dict[str, float]:
    return {
        name: parameter.root if isinstance(parameter, Fixed) else parameter.used(suggested[name])
        for name, parameter in spec.search.parameters().items()
    }


def _everything_off(spec: StudySpec) -> dict[str, float]:
    return {name: _off(spec, name, parameter) for name, parameter in spec.search.searched().items()}


def _off(spec: StudySpec, name: str, parameter: Searched) -> float:
    match name:
        case "learning_rate":  # no regularization, so there is nothing to switch off
            return parameter.nearest(spec.training.learning_rate)
        case "patience":
            return parameter.highest()
    return parameter.lowest()


def _common_default(spec: StudySpec) -> dict[str, float]:
    decoupled = spec.training.decay == "decoupled"
    common = {
        "weight_decay": COMMON_DECOUPLED_DECAY if decoupled else COMMON_COUPLED_DECAY,
        "dropout": COMMON_DROPOUT,
        "l1_lambda": 0.0,
        "patience": COMMON_PATIENCE,
        "learning_rate": spec.training.learning_rate,
        "label_smoothing": 0.0,
        "input_noise": 0.0,
        "weight_noise": 0.0,
        "max_norm": 0.0,
        "max_gradient_norm": 0.0,
        "input_dropout": 0.0,
        "augment_strength": 0.0,
        "mixup": 0.0,
    }
    return {
        name: parameter.nearest(common[name]) for name, parameter in spec.search.searched().items()
    }


def _grid_point(spec: StudySpec, index: int) -> dict[str, float]:
    """Return a point of the grid, in an order shuffled by the study's seed.

    Optuna's own sampler holds the whole product in memory; a thousand choices of each of four
    parameters would be 10^12 points.
    """
    axes = {name: grid_values(parameter) for name, parameter in spec.search.searched().items()}
    size = math.prod(len(axis) for axis in axes.values())
    position = int(_shuffled(size, spec.sampler.seed)[index])
    point = {}
    for name, axis in axes.items():
        position, step = divmod(position, len(axis))
        point[name] = axis[step]
    return point


@lru_cache(maxsize=8)
def _shuffled(size: int, seed: int) -> NDArray[np.int64]:
    """Return distinct numbers below ``size`` in random order: all, or more than any budget has.

    Not as many as the budget asks for: it may be changed, and then the order must not.
    """
    generator = np.random.default_rng(seed)
    if size <= MOST_SHUFFLED:
        return generator.permutation(size)
    # With replacement, of which at least 1 - 1/e are distinct, that is, 165 000.
    drawn = generator.integers(size, size=MOST_SHUFFLED)
    _, first = np.unique(drawn, return_index=True)
    return drawn[np.sort(first)]


def _sobol_point(spec: StudySpec, index: int) -> dict[str, float]:
    """Return a point of the scrambled Sobol sequence of the study's seed.

    Optuna's own sampler counts its position in the study's attributes and draws at random until
    the first trial has finished; here the number is the position.
    """
    from scipy.stats import qmc

    searched = spec.search.searched()
    sequence = qmc.Sobol(d=len(searched), scramble=True, rng=spec.sampler.seed)
    if index:
        sequence.fast_forward(index)
    units = sequence.random(1)[0]
    return {
        name: _at(parameter, float(unit))
        for (name, parameter), unit in zip(searched.items(), units, strict=True)
    }


def _at(parameter: Searched, unit: float) -> float:
    """Return the value at a place in [0, 1) of a parameter."""
    match parameter.distribution():
        case CategoricalDistribution(choices=choices):
            return float(choices[int(unit * len(choices))])  # type: ignore[arg-type]
        case IntDistribution(low=low, high=high, log=log):
            value = _between(low - 0.5, high + 0.5, log, unit)
            return min(max(round(value), low), high)
        case FloatDistribution(low=low, high=high, log=log):
            return min(max(_between(low, high, log, unit), low), high)
    raise AssertionError("a parameter is a float, an integer, or a choice")


def _between(low: float, high: float, log: bool, unit: float) -> float:
    if log:
        return math.exp(_between(math.log(low), math.log(high), False, unit))
    return low + unit * (high - low)
