from collections.abc import Sequence
from typing import Any

import numpy as np
import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import FrozenTrial, TrialState, create_trial

from regtune.leasing import Suggestion
from regtune.spec import STRENGTHS
from service.scheduler.mirror import Mirror
from service.scheduler.suggestion import as_suggestion, distributions, predetermined
from tests.builders import spec

CHOICES = {
    "weight_decay": [0.3, 0.1],
    "dropout": [0.4, 0.1],
    "l1_lambda": [1e-3, 1e-2],
    "patience": [3, 7],
}


UNTOUCHED = {
    "learning_rate": 0.001,
    "label_smoothing": 0,
    "input_noise": 0,
    "weight_noise": 0,
    "max_norm": 0,
    "max_gradient_norm": 0,
    "input_dropout": 0,
    "augment_strength": 0,
    "mixup": 0,
}
"""What a study does not search unless it says so."""

NEW_RANGES: dict[str, Any] = {
    "learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
    "label_smoothing": {"low": 0.05, "high": 0.3},
    "input_noise": {"low": 0.1, "high": 1.0, "log": True, "or_zero": True},
    "weight_noise": [0.3, 0.0, 0.1],
    "max_norm": {"low": 1.0, "high": 4.0, "log": True, "or_zero": True},
    "max_gradient_norm": [0.5, 5.0],
    "input_dropout": {"low": 0.0, "high": 0.3},
    "augment_strength": {"low": 0.0, "high": 1.0},
    "mixup": [0.5, 0.2],
}
AUGMENTED = {"augment": ["shift"]}


def used(number: int, **changes: Any) -> dict[str, float]:
    study = spec(**changes)
    point = predetermined(study, number)
    assert point is not None
    return dict(as_suggestion(study, number, point, {}).params)


def test_the_baseline_has_everything_off() -> None:
    off = {"weight_decay": 0, "dropout": 0, "l1_lambda": 0, "patience": 25}
    assert used(0) == off | UNTOUCHED


def test_the_baseline_is_at_the_low_end_where_a_range_has_no_zero() -> None:
    assert used(0, search=CHOICES) == {
        "weight_decay": 0.1,
        "dropout": 0.1,
        "l1_lambda": 1e-3,
        "patience": 7,
        **UNTOUCHED,
    }


@pytest.mark.parametrize("number", [0, 1])
def test_reference_points_keep_to_the_learning_rate_and_add_no_noise(number: int) -> None:
    training = {"learning_rate": 0.004, **AUGMENTED}
    point = used(number, search=NEW_RANGES, training=training)
    assert {name: point[name] for name in NEW_RANGES} == {
        "learning_rate": 0.004,
        "label_smoothing": 0.05,
        "input_noise": 0,
        "weight_noise": 0,
        "max_norm": 0,
        "max_gradient_norm": 5.0,
        "input_dropout": 0,
        "augment_strength": 0,
        "mixup": 0.2,
    }


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize(("named", "nearest"), [(1e-6, 1e-4), (0.5, 1e-2)])
def test_reference_points_come_as_near_to_the_learning_rate_as_its_range_allows(
    number: int, named: float, nearest: float
) -> None:
    training = {"learning_rate": named, **AUGMENTED}
    assert used(number, search=NEW_RANGES, training=training)["learning_rate"] == nearest
    choices = {"learning_rate": [1e-2, 1e-4]}
    assert used(number, search=choices, training=training)["learning_rate"] == nearest


@pytest.mark.parametrize(
    ("training", "decay"),
    [
        ({"optimizer": "adamw"}, 0.01),
        ({"optimizer": "sgd"}, 1e-4),
        ({"optimizer": "adam"}, 1e-4),
        ({"optimizer": "adam", "decay": "decoupled"}, 0.01),
    ],
)
def test_the_common_default_is_what_most_people_would_set(
    training: dict[str, str], decay: float
) -> None:
    assert used(1, training={**training, "max_epochs": 40}) == {
        "weight_decay": decay,
        "dropout": 0.2,
        "l1_lambda": 0,
        "patience": 10,
        **UNTOUCHED,
        "learning_rate": 0.01 if training["optimizer"] == "sgd" else 0.001,
    }


def test_fixed_values_are_used_and_not_suggested() -> None:
    study = spec(search={"weight_decay": 0.25, "l1_lambda": 0})
    assert set(distributions(study)) == {"dropout", "patience"}
    assert used(0, search={"weight_decay": 0.25, "l1_lambda": 0})["weight_decay"] == 0.25


def test_a_sampler_must_say_where_the_number_alone_does_not_decide() -> None:
    assert predetermined(spec(), 2) is None


def test_every_trial_has_all_values() -> None:
    study = spec(sampler="qmc", search=NEW_RANGES, training=AUGMENTED)
    assert set(distributions(study)) == set(STRENGTHS)
    assert set(used(2, sampler="qmc", search=NEW_RANGES, training=AUGMENTED)) == set(STRENGTHS)
    assert set(used(2, sampler="qmc")) == set(STRENGTHS)


@given(seed=st.integers(0, 2**31 - 1), number=st.integers(2, 500))
def test_sobol_points_lie_in_the_space(seed: int, number: int) -> None:
    study = spec(sampler={"name": "qmc", "seed": seed}, search={"dropout": [0.1, 0.2, 0.3]})
    point = predetermined(study, number)
    assert point is not None
    # Optuna raises for a value outside its distribution.
    create_trial(value=0.0, params=point, distributions=distributions(study))


def test_sobol_points_cover_the_space_evenly() -> None:
    study = spec(sampler="qmc", budget={"trials": 66})
    dropouts = [predetermined(study, number)["dropout"] for number in range(2, 66)]
    for lower in range(8):
        inside = [p for p in dropouts if lower * 0.0875 <= p < (lower + 1) * 0.0875]
        assert len(inside) == 8


def test_tpe_suggests_what_optuna_would_have() -> None:
    study = spec(budget={"trials": 60})
    mirror, plain = Mirror(study), optuna.create_study()
    for number in range(40):
        suggestion = mirror.suggest(1)[0]
        seed = int(np.random.SeedSequence([0, number]).generate_state(1)[0])
        plain.sampler = optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=10, multivariate=True, constant_liar=True
        )
        if number < 2:
            plain.enqueue_trial(dict(suggestion.suggested))
        trial = plain.ask(distributions(study))
        assert trial.params == suggestion.suggested
        mirror.tell(number, TrialState.COMPLETE, trial.params["dropout"])
        plain.tell(trial, trial.params["dropout"])


def test_suggestions_stop_when_their_time_is_over() -> None:
    assert len(Mirror(spec(budget={"trials": 60})).suggest(5, seconds=0)) == 1


def test_a_grid_of_a_million_million_points_costs_no_memory() -> None:
    many = [float(i) for i in range(1000)]
    study = spec(
        sampler="grid",
        search={
            "weight_decay": many,
            "dropout": [i / 1000 for i in range(1000)],
            "l1_lambda": many,
            "patience": list(range(1, 1001)),
        },
        budget={"trials": 50},
    )
    points = {str(predetermined(study, number)) for number in range(2, 50)}
    assert len(points) == 48


@pytest.mark.parametrize("points", [8, 1000])
def test_a_grid_keeps_its_order_when_the_budget_is_changed(points: int) -> None:
    """And never repeats a point, whether the grid is shuffled whole or too large for that."""
    choices = list(range(1, points + 1))
    axes = {"patience": choices, "dropout": [0.1, 0.2], "weight_decay": [0.0, 1.0], "l1_lambda": 0}
    if points > 8:
        axes["l1_lambda"] = [n / 1000 for n in range(1000)]
    small = spec(sampler="grid", search=axes, budget={"trials": 10})
    large = spec(sampler="grid", search=axes, budget={"trials": 34})
    points_of = [[predetermined(of, n) for n in range(34)] for of in (small, large)]
    assert points_of[0] == points_of[1]
    suggested = [tuple(sorted(point.items())) for point in points_of[0][2:] if point]
    assert len(set(suggested)) == 32


SHAPES: dict[str, Any] = {
    "optimizer": ["adamw", "sgd"],
    "batch_size": [64, 256],
    "model": {"hidden": [[64], [256]]},
}


@pytest.mark.parametrize("number", [0, 1])
def test_reference_points_keep_to_the_shape_of_task_and_training(number: int) -> None:
    training = {"optimizer": "sgd", "batch_size": 256}
    point = used(number, search=SHAPES, training=training)
    own = {"optimizer": "sgd", "batch_size": 256, "model.hidden": [64], "learning_rate": 0.01}
    assert point.items() >= own.items()
    assert point["weight_decay"] == (0, 1e-4)[number]
    assert set(point) == {*STRENGTHS, "optimizer", "batch_size", "model.hidden"}


@pytest.mark.parametrize("sampler", ["tpe", "random", "qmc"])
def test_a_trial_has_the_strengths_of_its_own_optimizer(sampler: str) -> None:
    study = spec(search=SHAPES, sampler=sampler, budget={"trials": 60})
    mirror, seen = Mirror(study), set()
    for number in range(40):
        made = mirror.suggest(1)[0]
        optimizer = made.params["optimizer"]
        conditional = {name for name in made.suggested if "[" in name}
        assert conditional == {f"weight_decay[{optimizer}]"}
        assert made.params["learning_rate"] == {"adamw": 0.001, "sgd": 0.01}[optimizer]
        assert made.params["weight_decay"] <= {"adamw": 3.0, "sgd": 0.01}[optimizer]
        assert study.shape_of(made.params) == made.shape
        seen.add(made.shape)
        mirror.tell(number, TrialState.COMPLETE, float(made.params["dropout"]))
    assert len(seen) > 3


@pytest.mark.filterwarnings("ignore:Argument ``group``")
def test_tpe_suggests_conditional_parameters_as_optuna_would_have() -> None:
    study = spec(search=SHAPES, budget={"trials": 60})
    mirror, plain = Mirror(study), optuna.create_study()
    for number in range(40):
        suggestion = mirror.suggest(1)[0]
        seed = int(np.random.SeedSequence([0, number]).generate_state(1)[0])
        plain.sampler = optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=10, multivariate=True, group=True, constant_liar=True
        )
        if number < 2:
            plain.enqueue_trial(dict(suggestion.suggested))
        trial = plain.ask()
        optimizer = trial.suggest_categorical("optimizer", ["adamw", "sgd"])
        trial.suggest_categorical("batch_size", [64, 256])
        trial.suggest_categorical("model.hidden", ["[64]", "[256]"])
        trial.suggest_float("dropout", 0.0, 0.7)
        trial.suggest_float("l1_lambda", 1e-5, 0.3, log=True)
        trial.suggest_int("patience", 5, 25)
        bounds = {"adamw": (1e-5, 3.0), "sgd": (1e-7, 0.01)}[optimizer]
        trial.suggest_float(f"weight_decay[{optimizer}]", *bounds, log=True)
        assert trial.params == suggestion.suggested
        mirror.tell(number, TrialState.COMPLETE, trial.params["dropout"])
        plain.tell(trial, trial.params["dropout"])


def test_a_mirror_is_restored_with_conditional_parameters() -> None:
    study = spec(search=SHAPES, budget={"trials": 60})
    first, second = Mirror(study), Mirror(study)
    trials = []
    for number in range(12):
        made = first.suggest(1)[0]
        first.tell(number, TrialState.COMPLETE, made.params["dropout"])
        trials.append(
            create_trial(
                value=made.params["dropout"],
                params=dict(made.suggested),
                distributions={name: made.distributions[name] for name in made.suggested},
            )
        )
    second.restore(trials)
    assert second.suggest(1)[0].suggested == first.suggest(1)[0].suggested


ASHA = {
    "pruner": {"name": "asha", "first_epoch": 2, "reduction_factor": 3},
    "training": {"max_epochs": 30},
    "budget": {"trials": 60},
}


def as_stored(made: Suggestion, losses: Sequence[float], state: TrialState) -> FrozenTrial:
    """A trial as it is read from the database; nobody has noted anything on it."""
    return create_trial(
        state=state,
        value=losses[-1] if state is TrialState.COMPLETE else None,
        params=dict(made.suggested),
        distributions={name: made.distributions[name] for name in made.suggested},
        intermediate_values=dict(enumerate(losses, 1)),
    )


def test_a_verdict_that_nobody_has_heard_is_said_again_by_who_leads_next() -> None:
    """Successive halving says it once alone, at a rung."""
    study = spec(**ASHA)
    mirror = Mirror(study)
    made = mirror.suggest(8)
    epochs = [(1, 0.5), (2, 0.4)]
    for number in range(2, 7):
        assert mirror.report(number, epochs) is None
    assert mirror.report(7, [(1, 0.9), (2, 0.8)]) == 2
    assert mirror.report(7, [(3, 0.8)]) == 2  # by another attempt at it
    assert mirror.report(7, [(4, 0.8)], over=True) is None
    running = TrialState.RUNNING
    heir = Mirror(study)
    heir.restore(
        [as_stored(one, [0.5, 0.4], running) for one in made[:7]]
        + [as_stored(made[7], [0.9, 0.8], running)]
    )
    assert heir.report(6, [(3, 0.3)]) is None
    assert heir.report(7, [(3, 0.8)]) == 2


def test_what_has_ended_while_nobody_led_takes_part_in_the_rungs() -> None:
    study = spec(**ASHA)
    made = Mirror(study).suggest(8)
    heir = Mirror(study)
    heir.restore(
        [as_stored(one, [0.5, 0.4, 0.3], TrialState.COMPLETE) for one in made[:7]]
        + [as_stored(made[7], [], TrialState.RUNNING)]
    )
    assert heir.report(7, [(1, 0.9), (2, 0.8)]) == 2


def test_what_was_noted_of_a_trial_before_it_ended_unseen_is_not_all() -> None:
    study = spec(**ASHA)
    mirror = Mirror(study)
    made = mirror.suggest(8)
    mirror.report(7, [(1, 0.5), (2, 0.4)])
    ended = as_stored(made[7], [0.5, 0.4, *[0.3] * 28], TrialState.COMPLETE)
    ended.system_attrs = {**made[7].system_attrs, **mirror.take_notes(7)}
    heir = Mirror(study)
    open_ones = [as_stored(one, [], TrialState.RUNNING) for one in made[:7]]
    (noted,) = heir.restore([*open_ones, ended]).values()
    assert {"completed_rung_1", "completed_rung_2"} <= noted.keys()
    ended.system_attrs |= noted
    assert Mirror(study).restore([*open_ones, ended]) == {}


def test_a_trial_that_was_promoted_is_not_condemned_in_hindsight() -> None:
    """It came first to its rung; what has come after it was better there."""
    study = spec(**ASHA)
    mirror = Mirror(study)
    made = mirror.suggest(8)
    assert mirror.report(7, [(1, 0.9), (2, 0.8), (3, 0.1)]) is None
    notes = dict(mirror.take_notes(7))
    assert notes
    assert mirror.take_notes(7) == {}
    others = [as_stored(one, [0.5, 0.4], TrialState.RUNNING) for one in made[:7]]
    promoted = as_stored(made[7], [0.9, 0.8, 0.1], TrialState.RUNNING)
    promoted.system_attrs = {**made[7].system_attrs, **notes}
    heir = Mirror(study)
    heir.restore([*others, promoted])
    assert heir.report(7, [(4, 0.1)]) is None


def test_a_verdict_is_kept_among_the_notes_and_stands_for_every_attempt() -> None:
    study = spec(**ASHA)
    mirror = Mirror(study)
    made = mirror.suggest(8)
    for number in range(2, 7):
        mirror.report(number, [(1, 0.5), (2, 0.4)])
    assert mirror.report(7, [(1, 0.9), (2, 0.8)]) == 2
    again = as_stored(made[7], [0.9, 0.8, 0.7], TrialState.RUNNING)
    again.system_attrs = {**made[7].system_attrs, **mirror.take_notes(7)}
    heir = Mirror(study)
    heir.restore([as_stored(one, [], TrialState.RUNNING) for one in made[:7]] + [again])
    assert heir.report(7, [(4, 0.1)]) == 2


@pytest.mark.parametrize("pruner", ["extrapolation", "median"])
def test_other_pruners_are_asked_about_the_last_epoch_of_a_trial_that_is_taken_over(
    pruner: str,
) -> None:
    """It was among the worst, when nobody could know; by now it leads."""
    study = spec(**{**ASHA, "pruner": {"name": pruner, "first_epoch": 2}})
    made = Mirror(study).suggest(12)
    slow = [0.9] * 20 + [0.1] * 5
    ended = [as_stored(one, [0.5] * 30, TrialState.COMPLETE) for one in made[:11]]
    heir = Mirror(study)
    heir.restore([*ended, as_stored(made[11], slow, TrialState.RUNNING)])
    assert heir.report(11, [(26, 0.1)]) is None
    late = Mirror(study)
    late.restore([*ended, as_stored(made[11], slow[:20], TrialState.RUNNING)])
    assert late.report(11, [(21, 0.9)]) is not None


def test_a_grid_has_every_point_of_every_optimizer_once() -> None:
    search = {
        "optimizer": ["adamw", "sgd"],
        "weight_decay": {"adamw": [0.1, 1.0, 3.0], "sgd": 1e-4},
        "learning_rate": {"adamw": 0.001, "sgd": [0.01, 0.1]},
        "dropout": [0.1, 0.2],
        "patience": 5,
        "l1_lambda": 0.0,
    }
    study = spec(search=search, sampler="grid", budget={"seconds": 9})
    points = {str(predetermined(study, number)) for number in range(2, study.budget.trials)}
    assert len(points) == 2 * 3 + 2 * 2
    assert sum("adamw" in point for point in points) == 6


def test_sobol_points_of_both_optimizers_cover_their_ranges_evenly() -> None:
    study = spec(search=SHAPES, sampler="qmc", budget={"trials": 130})
    points = [predetermined(study, number) or {} for number in range(2, 130)]
    for optimizer, low, high in (("adamw", 1e-5, 3.0), ("sgd", 1e-7, 0.01)):
        own = [p[f"weight_decay[{optimizer}]"] for p in points if p["optimizer"] == optimizer]
        assert len(own) == 64
        places = np.log(np.array(own) / low) / np.log(high / low)
        assert np.histogram(places, bins=4, range=(0, 1))[0].tolist() == pytest.approx([16] * 4)
