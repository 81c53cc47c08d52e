from typing import Any, get_args

import pytest

from regtune.errors import InvalidSpec
from regtune.space import ByOptimizer, Fixed, Range
from regtune.spec import parse_spec
from regtune.spec.preset import PresetName
from tests.builders import spec

PRESETS = get_args(PresetName)
EPOCHS = {"max_epochs": 40}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_shown_in_full_and_can_be_posted_again(preset: str) -> None:
    posted = spec(preset=preset, training=EPOCHS)
    assert posted.search != spec(training=EPOCHS).search
    assert posted.canonical()["preset"] == preset
    assert parse_spec(posted.canonical()).canonical() == posted.canonical()
    assert isinstance(posted.search.weight_decay, Range)


@pytest.mark.parametrize(
    ("preset", "searched"),
    [
        ("small_data", {"l1_lambda", "label_smoothing", "input_noise"}),
        ("sequence", {"label_smoothing", "weight_noise", "max_gradient_norm"}),
        ("large_model", {"label_smoothing", "learning_rate"}),
        ("noisy_data", {"label_smoothing", "input_noise", "mixup"}),
    ],
)
def test_a_preset_searches_what_is_usually_advised(preset: str, searched: set[str]) -> None:
    assert set(spec(preset=preset).search.searched()) == {
        "weight_decay",
        "dropout",
        "patience",
        *searched,
    }


def test_patience_is_long_for_small_data_and_short_for_noisy_data() -> None:
    small, noisy = (
        spec(preset=preset, training=EPOCHS).search.patience.numbers()
        for preset in ("small_data", "noisy_data")
    )
    assert (small, noisy) == ((8, 40), (2, 10))


@pytest.mark.parametrize("preset", PRESETS)
def test_what_is_named_wins_over_the_preset(preset: str) -> None:
    named = spec(preset=preset, search={"dropout": 0.25, "label_smoothing": 0.0}).search
    assert named.dropout == Fixed[float](0.25)
    assert named.label_smoothing == Fixed[float](0.0)
    assert named.weight_decay == spec(preset=preset).search.weight_decay


def test_a_learning_rate_in_training_wins_over_the_preset() -> None:
    named = spec(preset="large_model", training={"learning_rate": 0.002})
    assert named.search.learning_rate == Fixed[float](0.002)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_has_a_decay_for_each_optimizer(preset: str) -> None:
    decay = spec(preset=preset, search={"optimizer": ["adamw", "sgd"]}).search.weight_decay
    assert isinstance(decay, ByOptimizer)
    for optimizer, part in decay.root.items():
        alone = spec(preset=preset, training={"optimizer": optimizer}).search.weight_decay
        assert part == alone


@pytest.mark.parametrize("preset", PRESETS)
def test_the_decay_of_a_preset_is_of_the_form_that_training_names(preset: str) -> None:
    both = {"optimizer": ["adamw", "sgd"]}
    decay = spec(preset=preset, search=both, training={"decay": "decoupled"}).search.weight_decay
    assert decay == spec(preset=preset).search.weight_decay


PAIR = {"dataset": "mine", "model": "mlp"}


@pytest.mark.parametrize(
    "task",
    [
        {**PAIR, "dataset": "diabetes"},
        {
            **PAIR,
            "dataset": "table",
            "data": {"path": "a.csv", "target": "b", "kind": "regression"},
        },
        {**PAIR, "dataset": "synthetic"},
        {**PAIR, "score": "rmse"},
        {"name": "waves"},
        "waves",
    ],
)
def test_no_labels_are_smoothed_unless_a_class_is_predicted(task: Any) -> None:
    for preset in PRESETS:
        search = spec(preset=preset, task=task).search
        assert search.label_smoothing == Fixed[float](0.0)


@pytest.mark.parametrize(
    "task",
    [
        PAIR,
        {**PAIR, "dataset": "synthetic", "data": {"kind": "classification"}},
        {"name": "waves", "score": "accuracy"},
    ],
)
def test_labels_are_smoothed_where_a_class_is_predicted(task: Any) -> None:
    for preset in PRESETS:
        assert isinstance(spec(preset=preset, task=task).search.label_smoothing, Range)


def test_an_unknown_preset_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(InvalidSpec) as refused:
        spec(preset="big_data")
    (error,) = refused.value.errors
    assert error.field == "preset"
    assert all(preset in error.message for preset in PRESETS)
