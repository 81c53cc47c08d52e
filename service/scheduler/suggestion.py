"""What to try next: two reference points first, then whatever the sampler says.

A point is what is suggested, by the names in Optuna's tables: ``weight_decay``, or
``weight_decay[adamw]`` where it differs by optimizer.

A sampler is made anew for each trial from the study's seed and the trial's number, so that a
suggestion never depends on which replica was asked, or for how long that one had been running.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
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
from regtune.space import Dimension, Fixed, Options, Searched
from regtune.spec import REFERENCE_TRIALS, STRENGTHS, StudySpec
from regtune.spec.shape import value_at

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
    """Return how Optuna sees the search space of a study: all that any of its trials may have."""
    return {d.label: d.parameter.distribution() for d in spec.search.dimensions()}


def common_distributions(spec: StudySpec) -> dict[str, BaseDistribution]:
    """Return how Optuna sees what all trials of a study have."""
    dimensions = spec.search.dimensions()
    return {d.label: d.parameter.distribution() for d in dimensions if d.optimizer is None}


def suggest_rest(spec: StudySpec, trial: optuna.Trial) -> None:
    """Let a sampler suggest what a trial has besides, under the optimizer suggested for it."""
    if not spec.search.conditional:
        return
    optimizer = trial.params["optimizer"]
    for dimension in spec.search.dimensions():
        if dimension.optimizer == optimizer:
            _suggest(trial, dimension.label, dimension.parameter.distribution())


def _suggest(trial: optuna.Trial, label: str, distribution: BaseDistribution) -> None:
    match distribution:
        case CategoricalDistribution(choices=choices):
            trial.suggest_categorical(label, choices)
        case IntDistribution(low=low, high=high, log=log):
            trial.suggest_int(label, low, high, log=log)
        case FloatDistribution(low=low, high=high, log=log):
            trial.suggest_float(label, low, high, log=log)


def kind_of(number: int) -> str:
    """Return whether a trial is a reference point, and which, or one that a sampler suggests."""
    return ("baseline", "default")[number] if number < REFERENCE_TRIALS else "suggested"


def predetermined(spec: StudySpec, number: int) -> dict[str, Any] | None:
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
        case "tpe" if spec.search.conditional:
            return _grouped_tpe(seed, startup)
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


def _grouped_tpe(seed: int, startup: int) -> BaseSampler:
    """Return TPE for a space of which an optimizer's trials have a part of their own.

    It samples together what all trials have, and apart from that what those of an optimizer have.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(
            seed=seed,
            n_startup_trials=startup,
            multivariate=True,
            group=True,
            constant_liar=True,
        )


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
    suggested: Mapping[str, Any],
    system_attrs: Mapping[str, object],
) -> Suggestion:
    """Return the trial to append for what was suggested, with the values that will be used."""
    params = _used(spec, suggested)
    return Suggestion(
        kind=kind_of(number),
        suggested=suggested,
        distributions=distributions(spec),
        params=params,
        shape=spec.shape_of(params),
        system_attrs=system_attrs,
    )


def _used(spec: StudySpec, suggested: Mapping[str, Any]) -> dict[str, Any]:
    shaping = {
        name: options.used(suggested[name]) for name, options in spec.search.shaping().items()
    }
    optimizer = shaping.get("optimizer", spec.training.optimizer)
    searched = {
        d.name: d.parameter.used(suggested[d.label])
        for d in spec.search.dimensions()
        if d.belongs_to(optimizer)
    }
    strengths = {
        name: parameter.root if isinstance(parameter, Fixed) else searched[name]
        for name, parameter in spec.search.under(optimizer).items()
    }
    return shaping | strengths


def _reference(spec: StudySpec, strength: Callable[[str, Searched], float]) -> dict[str, Any]:
    """Return a reference point: the study's own shape, and a strength for each that is searched."""
    return {
        d.label: d.parameter.label(value_at(d.name, spec.task, spec.training))
        if isinstance(d.parameter, Options)
        else strength(d.name, d.parameter)
        for d in spec.search.dimensions()
        if d.belongs_to(spec.training.optimizer)
    }


def _everything_off(spec: StudySpec) -> dict[str, Any]:
    return _reference(spec, lambda name, parameter: _off(spec, name, parameter))


def _off(spec: StudySpec, name: str, parameter: Searched) -> float:
    match name:
        case "learning_rate":  # no regularization, so there is nothing to switch off
            return parameter.nearest(spec.training.learning_rate)
        case "patience":
            return parameter.highest()
    return parameter.lowest()


def _common_default(spec: StudySpec) -> dict[str, Any]:
    decoupled = spec.training.decay == "decoupled"
    common = dict.fromkeys(STRENGTHS, 0.0) | {
        "weight_decay": COMMON_DECOUPLED_DECAY if decoupled else COMMON_COUPLED_DECAY,
        "dropout": COMMON_DROPOUT,
        "patience": COMMON_PATIENCE,
        "learning_rate": spec.training.learning_rate,
    }
    return _reference(spec, lambda name, parameter: parameter.nearest(common[name]))


def _grid_point(spec: StudySpec, index: int) -> dict[str, Any]:
    """Return a point of the grid, in an order shuffled by the study's seed.

    Optuna's own sampler holds the whole product in memory; a thousand choices of each of four
    parameters would be 10^12 points.
    """
    grids = spec.grids()
    sizes = [math.prod(map(len, axes.values())) for axes in grids]
    position = int(_shuffled(sum(sizes), spec.sampler.seed)[index])
    for axes, size in zip(grids, sizes, strict=True):
        if position < size:
            return _point_on(axes, position)
        position -= size
    raise AssertionError("the positions of all grids are numbered")


def _point_on(axes: Mapping[str, Sequence[Any]], position: int) -> dict[str, Any]:
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


def _sobol_point(spec: StudySpec, index: int) -> dict[str, Any]:
    """Return a point of the scrambled Sobol sequence of the study's seed.

    Optuna's own sampler counts its position in the study's attributes and draws at random until
    the first trial has finished; here the number is the position. A strength that differs by
    optimizer has one axis for all of them.
    """
    from scipy.stats import qmc

    searched = spec.search.searched()
    sequence = qmc.Sobol(d=len(searched), scramble=True, rng=spec.sampler.seed)
    if index:
        sequence.fast_forward(index)
    units = dict(zip(searched, sequence.random(1)[0].tolist(), strict=True))
    point: dict[str, Any] = {}
    for dimension in spec.search.dimensions():
        if dimension.belongs_to(point.get("optimizer", spec.training.optimizer)):
            point[dimension.label] = _at(dimension, units[dimension.name])
    return point


def _at(dimension: Dimension, unit: float) -> Any:
    """Return the value at a place in [0, 1) of a parameter."""
    match dimension.parameter.distribution():
        case CategoricalDistribution(choices=choices):
            return choices[int(unit * len(choices))]
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
