"""What may be searched that makes shapes, and strengths that differ by optimizer."""

from typing import Any

import pytest

from regtune.errors import InvalidSpec
from regtune.space import ByOptimizer, Fixed, LimitChoices, LimitRange
from regtune.spec import NO_SHAPE, NamedTask, parse_spec
from regtune.spec.shape import write_shape
from tests.builders import spec

BOTH_NAMES = ("adamw", "sgd")
BOTH = {"optimizer": [*BOTH_NAMES]}
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
        {**BOTH, "max_norm": {"adamw": 0.0, "sgd": {**RANGE, "log": True, "or_zero": True}}},
        {"model": {"norm": ["group", "batch"]}},
        {"model": {"norm": ["group"], "groups": [4, 8]}},
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


def test_decay_takes_the_form_of_each_optimizer_unless_one_is_named() -> None:
    own = parse_spec(spec(search=BOTH).canonical())
    assert "decay" not in own.canonical()["training"]
    forms = {name: own.at(write_shape({"optimizer": name})).training.decay for name in BOTH_NAMES}
    assert forms == {"adamw": "decoupled", "sgd": "coupled"}

    named = parse_spec(spec(search=BOTH, training={"decay": "decoupled"}).canonical())
    assert named.canonical()["training"]["decay"] == "decoupled"
    for name in BOTH_NAMES:
        assert named.at(write_shape({"optimizer": name})).training.decay == "decoupled"
    assert named.search.weight_decay.numbers() == (1e-4, 3.0)


@pytest.mark.parametrize("first", ["adam", "sgd"])
def test_no_adamw_is_searched_beside_a_coupled_decay(first: str) -> None:
    training = {"optimizer": first, "decay": "coupled"}
    ((_, message),) = refusal(search={"optimizer": [first, "adamw"]}, training=training)
    assert "training.decay is coupled, but search.optimizer has adamw" in message
    assert (
        spec(search={"optimizer": ["adam", "sgd"]}, training=training).training.decay == "coupled"
    )


def test_limits_may_differ_by_optimizer() -> None:
    limit = {"low": 0.5, "high": 5.0, "log": True, "or_zero": True}
    search = {**BOTH, "max_gradient_norm": {"adamw": [0.0, 1.0], "sgd": limit}}
    parts = spec(search=search).search.max_gradient_norm
    assert isinstance(parts, ByOptimizer)
    assert isinstance(parts.root["adamw"], LimitChoices)
    assert isinstance(parts.root["sgd"], LimitRange)


def test_a_setting_that_a_shape_leaves_no_use_for_is_none_of_its_settings() -> None:
    task = {"dataset": "digits", "model": "mlp", "norm": "group", "groups": 4, "hidden": [64]}
    whole = spec(task=task, search={"model": {"norm": ["batch", "group"]}})
    seen = {norm: whole.at(write_shape({"model.norm": norm})).task for norm in ("batch", "group")}
    assert "groups" not in seen["batch"].settings
    assert seen["group"] == whole.task
    plain = spec(search={"model": {"norm": ["batch", "group"]}})
    assert plain.at(write_shape({"model.norm": "group"})).task.settings["groups"] == 8


@pytest.mark.parametrize("task", ["waves", {"name": "waves", "depth": 2}])
def test_settings_of_a_task_of_one_s_own_are_searched_unchecked(task: Any) -> None:
    search = {"model": {"width": [32, 64], "kind": ["a", None]}}
    whole = parse_spec(spec(task=task, search=search).canonical())
    assert whole.task.settings["width"] == 32
    params = {"model.width": 64, "model.kind": None}
    seen = whole.at(whole.shape_of(params)).task
    assert seen.settings == {**whole.task.settings, "width": 64, "kind": None}
    assert isinstance(seen, NamedTask)
    assert (seen.name, seen.score) == ("waves", None)


@pytest.mark.parametrize("name", ["name", "data", "dataset", "model", "score", "class_weights"])
@pytest.mark.parametrize("task", ["waves", {"dataset": "mine", "model": "mine"}])
def test_what_is_no_setting_of_any_task_is_not_searched(task: Any, name: str) -> None:
    ((_, message),) = refusal(task=task, search={"model": {name: ["a", "b"]}})
    assert f"search.model.{name} is no setting" in message


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
        ({"batch_size": []}, "search.batch_size", "must name at least one value, but the list"),
        ({"batch_size": [64, 0]}, "search.batch_size.1", "greater than or equal to 1"),
        ({"batch_size": [64, 64.5]}, "search.batch_size.1", "integer"),
        ({"batch_size": [64, 64]}, "search.batch_size", "only once"),
        ({"optimizer": ["adamw", "lion"]}, "search.optimizer.1", "'adam', 'adamw', 'sgd'"),
        ({"batch_size": [0, 64]}, "search.batch_size.0", "greater than or equal to 1"),
        ({"batch_size": ["64"]}, "search.batch_size.0", "should be a valid integer"),
        ({"optimizer": ["lion", "adamw"]}, "search.optimizer.0", "'adam', 'adamw', 'sgd'"),
        ({"model": [1]}, "search.model", "must be a mapping"),
        ({"model": {"hidden": []}}, "search.model.hidden", "must name at least one value"),
        ({"model": {"hidden": 3}}, "search.model.hidden", "must be a list of choices"),
        ({"model": {"width": [3, 4]}}, "", "'mlp'; known: norm, groups, hidden, activation"),
        ({"model": {"hidden": [[64], [0]]}}, "", "search.model.hidden cannot be [0]: should be g"),
        ({"model": {"hidden": [[0], [64]]}}, "", "search.model.hidden cannot be [0]: should be g"),
        ({"model": {"hidden": [3, [64]]}}, "", "search.model.hidden cannot be 3: must be a list"),
        ({"model": {"norm": ["x", "batch"]}}, "", "search.model.norm cannot be x: should be 'ba"),
        ({"model": {"hidden": [[60], [64]], "norm": ["group", "batch"]}}, "",
         "search.model.hidden cannot be [60] beside norm group: norm: group wants widths that"),
        ({"model": {"norm": ["group", "x"], "hidden": [[0]]}}, "",
         "search.model.norm cannot be x: should be"),
        ({"model": {"hidden": [[float("nan")], [64]]}}, "search.model.hidden", "JSON can write"),
        ({"model": {"norm": ["batch", "x"]}}, "", "search.model.norm cannot be x: should be 'ba"),
        ({"model": {"norm": ["group", "batch"], "groups": [4, 8]}}, "",
         "search.model.norm cannot be batch beside groups 4: groups is a setting of norm: group"),
        ({"model": {"hidden": [[64], [60]], "norm": ["batch", "group"]}}, "",
         "search.model.hidden cannot be [60] beside norm group: norm: group wants widths that"),
        ({"model": {"a[b]": [1, 2]}}, "search.model", 'a[b]" cannot be a setting'),
        ({"model": {"hidden": [[64], [float("inf")]]}}, "search.model.hidden", "JSON can write"),
        ({"model": {"hidden": [[n] for n in range(1, 66)]}}, "search.model.hidden",
         "must have at most 64 values, but 65 are given"),
        ({"batch_size": [1, 2, 3, 4, 5], "model": {"hidden": [[n] for n in range(1, 15)]}},
         "search", "70 different shapes"),
        ({**BOTH, "weight_decay": {"adamw": RANGE}}, "search", "search.weight_decay is given for "
         "adamw, but search.optimizer has adamw, sgd"),
        ({"weight_decay": {"adamw": RANGE}}, "search", "search.optimizer has no list"),
        ({**BOTH, "dropout": {"adamw": RANGE, "sgd": {"low": 0.5, "high": 1.5}}},
         "search.dropout", "must be in [0, 1)"),
        ({**BOTH, "max_norm": {"adamw": 0.0, "sgd": {"low": 0.0, "high": 4.0}}},
         "search.max_norm", "a range of limits must begin above 0"),
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


def test_a_wrong_choice_and_a_wrong_field_beside_it_are_each_told_of_once() -> None:
    found = refusal(
        search={"batch_size": [0], "optimizer": ["lion"]},
        training={"max_epochs": 0},
        task={"dataset": "digits", "model": "mlp", "norm": "x"},
    )
    assert [field for field, _ in found] == [
        "task.norm",
        "training.max_epochs",
        "search.optimizer.0",
        "search.batch_size.0",
    ]


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


@pytest.mark.parametrize("optimizer", ["rmsprop", "sgd"])
def test_the_optimizer_of_the_reference_points_must_be_searched(optimizer: str) -> None:
    found = refusal(training={"optimizer": optimizer}, search={"optimizer": ["adamw", "adam"]})
    ((_, message),) = found
    assert f"search.optimizer must have {optimizer} among its choices" in message


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
