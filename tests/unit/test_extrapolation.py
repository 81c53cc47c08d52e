import warnings
from collections.abc import Mapping, Sequence
from math import inf, log2, nan

import numpy as np
import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import TrialState

from benchmarks.curves import FOLDER
from benchmarks.pruners import PRUNERS, Run, Table, built_in, run_study
from service.scheduler.extrapolation import LEAST_SHARE, ExtrapolationPruner, extrapolate
from service.scheduler.mirror import Mirror
from tests.builders import spec
from tests.playing import Step, played, running

EPOCHS = 40
FIRST = 10

losses = st.floats(0, 10) | st.sampled_from([nan, inf, 0.0, 1.0])
curves = st.lists(losses, min_size=1, max_size=EPOCHS)


def by_epoch(curve: Sequence[float]) -> dict[int, float]:
    return dict(enumerate(curve, start=1))


def prospect(curve: Sequence[float], max_epochs: int = EPOCHS) -> float:
    found = extrapolate(by_epoch(curve), max_epochs)
    assert found is not None
    return found


@pytest.mark.parametrize("now", [4, 10, 20, 39])
@pytest.mark.parametrize("power", [0.1, 0.5, 1.0, 2.0])
def test_no_power_law_ends_below_what_was_foreseen(now: int, power: float) -> None:
    curve = [0.2 + epoch**-power for epoch in range(1, EPOCHS + 1)]
    assert prospect(curve[:now]) <= curve[-1]


def test_a_loss_that_falls_with_the_logarithm_of_the_epochs_is_foreseen_to_go_on_falling() -> None:
    curve = [10 - log2(epoch) for epoch in range(1, EPOCHS + 1)]
    assert prospect(curve[:20]) == pytest.approx(curve[-1], abs=0.02)


@pytest.mark.parametrize("share", [0.5, LEAST_SHARE, 0.9])
def test_a_curve_that_slows_down_is_credited_with_less_for_each_doubling(share: float) -> None:
    """The loss falls with each doubling of the epochs by a share of what it fell by before."""
    curve = [10 - (1 - share ** log2(epoch)) / (1 - share) for epoch in range(1, EPOCHS + 1)]
    found = extrapolate(by_epoch(curve[:10]), EPOCHS, noise_margin=0.0)
    assert found is not None
    latest_gain, credited = curve[4] - curve[9], max(share, LEAST_SHARE)
    assert credited + credited**2 <= (curve[9] - found) / latest_gain < 2


def test_a_curve_that_speeds_up_is_credited_with_no_more_than_it_has_gained() -> None:
    curve = [10 - 1.5 ** log2(epoch) for epoch in range(1, EPOCHS + 1)]
    found = extrapolate(by_epoch(curve[:10]), EPOCHS, noise_margin=0.0)
    assert found == pytest.approx(curve[9] - 2 * (curve[4] - curve[9]))


def test_a_flat_curve_is_foreseen_to_stay_where_it_is() -> None:
    assert prospect([0.5] * 20) == 0.5


def test_a_loss_that_has_risen_is_not_credited_with_it() -> None:
    assert prospect([0.5, *(0.5 + 0.01 * epoch for epoch in range(20))]) == pytest.approx(0.5)


def test_a_loss_that_comes_down_again_is_credited_although_it_was_lower_once() -> None:
    down_again = [0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.9, 0.8, 0.7, 0.7, 0.6, 0.6, 0.5, 0.5, 0.5, 0.45]
    assert prospect(down_again) < 0.2


def test_a_noisy_curve_may_gain_by_luck() -> None:
    assert prospect([0.5, 0.6] * 10) < prospect([0.5, 0.51] * 10) < 0.5


@pytest.mark.parametrize("curve", [[], [1.0], [1.0] * 3, [nan] * 20, [*[nan] * 17, 1.0, 1.0, 1.0]])
def test_nothing_is_foreseen_of_a_curve_that_is_too_short(curve: list[float]) -> None:
    assert extrapolate(by_epoch(curve), EPOCHS) is None


@given(curves)
def test_any_curve_may_be_asked_of(curve: list[float]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = extrapolate(by_epoch(curve), EPOCHS)
    assert found is None or found <= min(loss for loss in curve if np.isfinite(loss))


def study_of(trials: Sequence[tuple[TrialState, Sequence[float]]]) -> optuna.Study:
    study = optuna.create_study()
    for state, curve in trials:
        finite = [loss for loss in curve if np.isfinite(loss)]
        complete = state is TrialState.COMPLETE
        study.add_trial(
            optuna.create_trial(
                state=state,
                value=min(finite, default=1.0) if complete else None,
                intermediate_values=by_epoch(curve),
            )
        )
    return study


def prunes(study: optuna.Study, number: int, first: int = FIRST) -> bool:
    return ExtrapolationPruner(first, EPOCHS).prune(study, study.trials[number])


FLAT = [0.5] * FIRST


def test_a_trial_that_is_not_going_to_catch_up_is_pruned() -> None:
    assert prunes(study_of([(TrialState.RUNNING, [0.4]), (TrialState.RUNNING, FLAT)]), 1)


def test_nothing_is_pruned_before_the_first_epoch() -> None:
    study = study_of([(TrialState.RUNNING, [0.4]), (TrialState.RUNNING, FLAT)])
    assert not prunes(study, 1, first=FIRST + 1)


def test_a_trial_that_trails_but_gains_fast_enough_goes_on() -> None:
    falling = [2.0 - 0.1 * epoch for epoch in range(FIRST)]
    assert not prunes(study_of([(TrialState.COMPLETE, [0.4]), (TrialState.RUNNING, falling)]), 1)


@pytest.mark.parametrize(
    "state", [TrialState.PRUNED, TrialState.FAIL, TrialState.WAITING], ids=lambda s: s.name
)
def test_only_trials_that_count_in_the_end_are_compared_with(state: TrialState) -> None:
    assert not prunes(study_of([(state, [0.4]), (TrialState.RUNNING, FLAT)]), 1)


@pytest.mark.parametrize(("leading", "pruned"), [([-inf, inf, nan], False), ([nan, 0.4], True)])
def test_losses_that_are_not_finite_are_no_best_loss(leading: list[float], pruned: bool) -> None:
    study = study_of([(TrialState.RUNNING, leading), (TrialState.RUNNING, FLAT)])
    assert prunes(study, 1) == pruned


@given(st.lists(st.tuples(st.sampled_from([TrialState.RUNNING, TrialState.COMPLETE]), curves)))
def test_the_trial_that_leads_is_never_pruned(
    trials: list[tuple[TrialState, list[float]]],
) -> None:
    study = study_of(trials)
    best = {
        trial.number: min(filter(np.isfinite, trial.intermediate_values.values()), default=inf)
        for trial in study.trials
    }
    for trial in study.trials:
        if trial.state is TrialState.RUNNING and best[trial.number] == min(best.values()):
            assert not prunes(study, trial.number, first=1)


def test_a_better_loss_counts_from_its_epoch_on() -> None:
    pruner = ExtrapolationPruner(FIRST, EPOCHS)
    study = optuna.create_study()
    leading, trailing = study.ask(), study.ask()
    for epoch, loss in by_epoch(FLAT).items():
        trailing.report(loss, epoch)
    leading.report(0.5, 1)
    assert not pruner.prune(study, study.trials[1])
    leading.report(0.4, 2)
    assert pruner.prune(study, study.trials[1])


events = st.one_of(*[st.floats(0.4, 0.6)] * 9, st.sampled_from([nan, "complete", "fail"]))


@given(st.lists(st.tuples(st.integers(0, 2), events), max_size=80))
def test_what_is_kept_between_calls_changes_no_verdict(steps: list[Step]) -> None:
    kept = ExtrapolationPruner(1, EPOCHS)
    for study in played(steps):
        for trial in running(study):
            anew = ExtrapolationPruner(1, EPOCHS).prune(study, trial)
            assert kept.prune(study, trial) == anew


STRONG = [1.7 - 0.3 * log2(epoch) for epoch in range(1, EPOCHS + 1)]
WEAK = [max(0.6, 1.0 - 0.1 * epoch) + 0.01 * max(0, epoch - 4) for epoch in range(1, EPOCHS + 1)]
"""Weak regularization leads until it overfits; strong regularization ends far below it."""


def verdicts(curves: Mapping[int, Sequence[float]], pruner: str, **settings: int) -> dict[int, int]:
    """The epoch at which each trial of a study is told to stop, by number."""
    mirror = Mirror(
        spec(
            pruner={"name": pruner, "first_epoch": FIRST, **settings},
            training={"max_epochs": EPOCHS},
            budget={"trials": len(curves)},
        )
    )
    mirror.suggest(len(curves))
    stopped: dict[int, int] = {}
    for number, curve in curves.items():
        for epoch, loss in by_epoch(curve).items():
            if mirror.report(number, [(epoch, loss)]):
                stopped[number] = epoch
                mirror.tell(number, TrialState.PRUNED, None)
                break
        else:
            mirror.tell(number, TrialState.COMPLETE, min(curve))
    return stopped


def test_strong_regularization_that_wins_late_is_kept_where_the_median_throws_it_away() -> None:
    study = {0: WEAK, 1: WEAK, 2: WEAK, 3: STRONG, 4: WEAK}
    assert verdicts(study, "median", startup_trials=0) == {3: FIRST}
    assert verdicts(study, "extrapolation") == {4: FIRST}


def test_reference_points_are_never_pruned() -> None:
    hopeless = [5.0] * EPOCHS
    study = {2: STRONG, 0: hopeless, 1: hopeless, 3: hopeless}
    assert verdicts(study, "extrapolation") == {3: FIRST}


def test_a_mirror_that_was_rebuilt_says_stop_as_of_the_last_epoch() -> None:
    trials = [
        (TrialState.COMPLETE, STRONG),
        (TrialState.COMPLETE, WEAK),
        (TrialState.RUNNING, [2.0] * (FIRST - 1)),
        (TrialState.RUNNING, STRONG[: FIRST - 1]),
    ]
    rebuilt = Mirror(spec(training={"max_epochs": EPOCHS}))
    rebuilt.restore(study_of(trials).trials)
    assert rebuilt.report(2, [(FIRST, 2.0)]) == FIRST - 1
    assert rebuilt.report(3, [(FIRST, STRONG[FIRST - 1])]) is None


@pytest.mark.parametrize("landscape", ["fashion", "digits"])
def test_on_stored_curves_it_keeps_the_winner_and_saves_epochs(landscape: str) -> None:
    runs = {name: replayed(landscape, name) for name in ("extrapolation", "median")}
    assert all(run.lost <= 1 for run in runs["extrapolation"])
    assert all(run.saved >= 0.25 for run in runs["extrapolation"])
    assert not all(run.lost <= 1 for run in runs["median"])


def replayed(landscape: str, pruner: str) -> list[Run]:
    return [
        run_study(table, 0.005, pruner, built_in(PRUNERS[pruner]), order)
        for order, table in enumerate(
            Table.read(FOLDER, landscape, seed, patience=False) for seed in range(3)
        )
    ]
