"""What may be searched that makes shapes, and strengths that differ by optimizer."""

from typing import Any

import pytest

from regtune.errors import InvalidSpec
from regtune.space import ByOptimizer, Fixed
from regtune.spec import NO_SHAPE, parse_spec
from tests.builders import spec

BOTH = {"optimizer": ["adamw", "sgd"]}
RANGE = {"low": 0.1, "high": 0.5}


def refusal(**changes: Any) -> list[tuple[str, str]]:
    with pytest.raises(InvalidSpec) as refused:
        spec(**changes)
    return [(error.field, error.message) for error in refused.value.errors]


def test_a_study_that_searches_no_shape_says_nothing_of_it() -> None:
    search = spec().canonical()["search"]
    assert not {"optimizer", "batch_size", "model"} & set(search)
    assert spec().shape_of({"dropout": 0.1}) == NO_SHAPE
    assert spec().at(NO_SHAPE) == spec()


@pytest.mark.parametrize(
    "search",
    [
        {"batch_size": [64, 256]},
        BOTH,
        {"optimizer": ["adam", "adamw", "rmsprop", "sgd"], "dropout": 0.1},
        {"model": {"hidden": [[64], [256, 32]], "norm": ["layer", "none"]}},
        {**BOTH, "weight_decay": {"adamw": RANGE, "sgd": [0.0, 1e-4]}, "learning_rate": 0.01},
        {**BOTH, "patience": {"adamw": {"low": 3, "high": 9}, "sgd": 5}, "dropout": RANGE},
    ],
)
def test_what_is_shown_can_be_posted_again(search: dict[str, Any]) -> None:
    posted = spec(search=search)
    assert parse_spec(posted.canonical()).canonical() == posted.canonical()


def test_reference_points_have_the_first_choice_unless_another_is_named() -> None:
    search = {**BOTH, "batch_size": [64, 256], "model": {"hidden": [[64], [256]]}}
    first = spec(search=search)
    assert (first.training.optimizer, first.training.batch_size) == ("adamw", 64)
    assert first.task.settings["hidden"] == [64]
    named = spec(
        search=search,
        training={"optimizer": "sgd", "batch_size": 256},
        task={"dataset": "digits", "model": "mlp", "hidden": [256]},
    )
    assert (named.training.optimizer, named.training.batch_size) == ("sgd", 256)
    assert named.task.settings["hidden"] == [256]


def test_each_optimizer_has_its_own_default_decay_and_learning_rate() -> None:
    search = spec(search=BOTH).search
    decay, rate = search.weight_decay, search.learning_rate
    assert isinstance(decay, ByOptimizer)
    assert isinstance(rate, ByOptimizer)
    assert {name: part.numbers() for name, part in decay.root.items()} == {
        "adamw": (1e-4, 3.0),
        "sgd": (1e-6, 1e-2),
    }
    assert rate.root == {"adamw": Fixed[float](0.001), "sgd": Fixed[float](0.01)}
    alike = spec(search={"optimizer": ["adam", "rmsprop"]}).search
    assert alike.weight_decay.numbers() == (1e-6, 1e-2)
    assert alike.learning_rate == Fixed[float](0.001)


def test_a_learning_rate_that_is_named_is_that_of_all_optimizers() -> None:
    named = spec(search=BOTH, training={"learning_rate": 0.005})
    assert named.search.learning_rate == Fixed[float](0.005)
    own = spec(search={**BOTH, "learning_rate": {"adamw": 0.002, "sgd": 0.1}})
    assert own.training.learning_rate == 0.002


def test_the_study_as_a_shape_sees_it_searches_strengths_alone() -> None:
    whole = spec(search={**BOTH, "batch_size": [64, 256], "model": {"hidden": [[64], [256]]}})
    params = {"optimizer": "sgd", "batch_size": 256, "model.hidden": [256], "dropout": 0.1}
    seen = whole.at(whole.shape_of(params))
    assert (seen.training.optimizer, seen.training.batch_size) == ("sgd", 256)
    assert (seen.task.settings["hidden"], seen.task.settings["norm"]) == ([256], "batch")
    assert seen.search.searched() == ("weight_decay", "dropout", "l1_lambda", "patience")
    assert seen.search.weight_decay.numbers() == (1e-6, 1e-2)
    assert seen.search.learning_rate == Fixed[float](0.01)
    assert whole.shape_of(params) == '{"batch_size":256,"model.hidden":[256],"optimizer":"sgd"}'


@pytest.mark.parametrize(
    ("search", "field", "message"),
    [
        ({"batch_size": 64}, "search.batch_size", "must be a list of choices"),
        ({"batch_size": {"low": 1, "high": 9}}, "search.batch_size", "must be a list of choices"),
        ({"batch_size": []}, "search.batch_size", "at least 1 item"),
        ({"batch_size": [64, 0]}, "search.batch_size.1", "greater than or equal to 1"),
        ({"batch_size": [64, 64.5]}, "search.batch_size.1", "integer"),
        ({"batch_size": [64, 64]}, "search.batch_size", "only once"),
        ({"optimizer": ["adamw", "lion"]}, "search.optimizer.1", "'adam', 'adamw', 'sgd'"),
        ({"model": [1]}, "search.model", "dictionary"),
        ({"model": {"hidden": 3}}, "search.model.hidden", "must be a list of choices"),
        ({"model": {"width": [3, 4]}}, "", "search.model.width is no setting of mlp; known: hid"),
        ({"model": {"hidden": [[64], [0]]}}, "", "search.model.hidden cannot be [0]: should be g"),
        ({"model": {"norm": ["batch", "x"]}}, "", "search.model.norm cannot be x: should be 'ba"),
        ({"model": {"a[b]": [1, 2]}}, "search.model", 'a[b]" cannot be a setting'),
        ({"model": {"hidden": [[64], [float("inf")]]}}, "search.model.hidden", "JSON can write"),
        ({"model": {"hidden": [[n] for n in range(1, 66)]}}, "search.model.hidden", "at most 64"),
        ({"batch_size": [1, 2, 3, 4, 5], "model": {"hidden": [[n] for n in range(1, 15)]}},
         "search", "70 different shapes"),
        ({**BOTH, "weight_decay": {"adamw": RANGE}}, "search", "search.weight_decay is given for "
         "adamw, but search.optimizer has adamw, sgd"),
        ({"weight_decay": {"adamw": RANGE}}, "search", "search.optimizer has no list"),
        ({**BOTH, "dropout": {"adamw": RANGE, "sgd": {"low": 0.5, "high": 1.5}}},
         "search.dropout", "must be in [0, 1)"),
        ({**BOTH, "dropout": {"adamw": RANGE, "sgd": {"low": 0.5}}},
         "search.dropout.sgd.high", "is required"),
        ({**BOTH, "learning_rate": {"adamw": 0.1, "sgd": {**RANGE, "log": True, "or_zero": True}}},
         "search.learning_rate", "no zero"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(search: dict[str, Any], field: str, message: str) -> None:
    found = refusal(search=search)
    assert len(found) == 1, found
    assert found[0][0] == field
    assert message in found[0][1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"search": {"batch_size": [64, 256]}, "training": {"batch_size": 128}},
            "search.batch_size must have 128 among its choices, because training.batch_size is",
        ),
        (
            {
                "search": {"model": {"norm": ["layer", "none"]}},
                "task": {"dataset": "digits", "model": "mlp", "norm": "batch"},
            },
            "search.model.norm must have batch among its choices, because task.norm is that",
        ),
        (
            {"search": {**BOTH, "learning_rate": {"adamw": 0.1, "sgd": 0.2}},
             "training": {"learning_rate": 0.3}},
            "search.learning_rate is fixed at 0.1, but training.learning_rate is 0.3",
        ),
        ({"search": BOTH, "sampler": "cmaes"}, "the sampler cmaes would draw it at random"),
        ({"search": BOTH, "sampler": "gp"}, "the sampler gp would draw it at random"),
    ],
)  # fmt: skip
def test_what_does_not_agree_is_refused(changes: dict[str, Any], message: str) -> None:
    found = refusal(**changes)
    assert len(found) == 1, found
    assert message in found[0][1]


@pytest.mark.parametrize("sampler", ["cmaes", "gp"])
def test_shapes_alone_are_open_to_every_sampler(sampler: str) -> None:
    search = {**BOTH, "weight_decay": RANGE, "learning_rate": 0.001}
    assert spec(search=search, sampler=sampler).search.conditional == ()


def test_a_grid_counts_the_points_of_each_optimizer() -> None:
    search = {
        **BOTH,
        "weight_decay": {"adamw": [0.1, 1.0, 3.0], "sgd": 1e-4},
        "dropout": [0.1, 0.2],
        "patience": 5,
        "l1_lambda": 0.0,
    }
    assert spec(search=search, sampler="grid", budget={"seconds": 9}).budget.trials == 2 + 6 + 2
