import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regtune.errors import InvalidSpec
from regtune.space import Range
from regtune.spec import STRENGTHS, StudySpec, load_yaml, parse_spec, parse_text
from tests.builders import BASE, spec

TABLE = {"dataset": "table", "model": "mlp"}
MLP = {"hidden": [128], "norm": "batch", "activation": "relu"}


def refusal(**changes: Any) -> list[tuple[str, str]]:
    with pytest.raises(InvalidSpec) as refused:
        spec(**changes)
    return [(error.field, error.message) for error in refused.value.errors]


def test_name_task_and_budget_are_enough() -> None:
    minimal = spec()
    assert minimal.training.optimizer == "adamw"
    assert minimal.task.settings == MLP
    assert minimal.training.penalized == "weights"
    assert minimal.training.precision == "float32"
    assert minimal.training.warmup_epochs == 0
    assert (minimal.validation.fraction, minimal.validation.members) == (0.2, 1)
    assert (minimal.sampler.name, minimal.pruner.name) == ("tpe", "extrapolation")


def test_a_task_may_be_named_instead_of_a_data_set_and_a_model() -> None:
    short, long = spec(task="waves"), spec(task={"name": "waves"})
    assert short == long
    task = {"name": "waves", "score": "rmse", "width": 3}
    written = spec(task=task)
    assert written.task.settings == {"width": 3}
    assert written.canonical()["task"] == task | {"class_weights": "none"}
    assert parse_spec(written.canonical()) == written


@pytest.mark.parametrize(
    ("task", "field", "message"),
    [
        ({"name": "waves", "dataset": "digits"}, "task", "has data and model of its own"),
        ({"name": "waves", "data": {}, "model": "mlp"}, "task", "leave data and model out"),
        ({"name": "waves", "score": "best"}, "task.score", "'accuracy'"),
        ({"name": 3}, "task.name", "valid string"),
        ({}, "task.dataset", "is required"),
        (3, "task", "must be a mapping of fields (given: 3)"),
    ],
)
def test_what_is_wrong_with_a_task_is_said(task: Any, field: str, message: str) -> None:
    found = refusal(task=task)
    assert found[0][0] == field
    assert message in found[0][1]


@pytest.mark.parametrize(
    ("training", "decay", "l1"),
    [
        ({"optimizer": "adamw"}, (1e-4, 3.0), (1e-4, 0.3)),
        ({"optimizer": "adam"}, (1e-6, 1e-2), (1e-4, 0.3)),
        ({"optimizer": "sgd"}, (1e-6, 1e-2), (1e-4, 0.3)),
        ({"optimizer": "rmsprop"}, (1e-6, 1e-2), (1e-4, 0.3)),
        ({"optimizer": "sgd", "decay": "decoupled"}, (1e-4, 3.0), (1e-4, 0.3)),
        ({"l1": "subgradient"}, (1e-4, 3.0), (1e-7, 1e-3)),
    ],
)
def test_default_ranges_fit_the_training(
    training: dict[str, Any], decay: tuple[float, float], l1: tuple[float, float]
) -> None:
    search = spec(training=training).search
    for parameter, bounds in ((search.weight_decay, decay), (search.l1_lambda, l1)):
        assert isinstance(parameter, Range)
        assert (parameter.low, parameter.high) == bounds
        assert parameter.log
        assert parameter.or_zero
    assert search.dropout.numbers() == (0.0, 0.7)


@pytest.mark.parametrize(
    ("max_epochs", "patience"), [(50, (5, 25)), (100, (10, 50)), (1, (1, 2)), (5, (1, 2))]
)
def test_patience_defaults_from_a_tenth_to_half_of_the_epochs(
    max_epochs: int, patience: tuple[int, int]
) -> None:
    assert spec(training={"max_epochs": max_epochs}).search.patience.numbers() == patience


def test_a_parameter_that_is_left_out_keeps_its_default_range() -> None:
    search = spec(search={"dropout": 0.5}).search
    assert set(search.searched()) == {"weight_decay", "l1_lambda", "patience"}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_learning_rate_is_fixed_and_noise_off_unless_they_are_named(optimizer: str) -> None:
    study = spec(training={"optimizer": optimizer})
    assert study.search.learning_rate.numbers() == (study.training.learning_rate,)
    assert spec(training={"learning_rate": 0.3}).search.learning_rate.numbers() == (0.3,)
    for name in {*STRENGTHS} - {*study.search.searched(), "learning_rate"}:
        assert study.search.parameters()[name].numbers() == (0,)
    assert set(study.search.searched()) == {"weight_decay", "dropout", "l1_lambda", "patience"}


def test_a_learning_rate_that_is_not_searched_is_one_value_wherever_it_is_named() -> None:
    study = spec(search={"learning_rate": 0.25})
    assert study.training.learning_rate == 0.25
    both = spec(search={"learning_rate": 0.25}, training={"learning_rate": 0.25})
    assert both.canonical() == study.canonical()
    (field, message), *_ = refusal(search={"learning_rate": 0.25}, training={"learning_rate": 0.5})
    assert field == ""
    assert "search.learning_rate is fixed at 0.25, but training.learning_rate is 0.5" in message


def test_a_learning_rate_that_is_searched_leaves_that_of_the_training() -> None:
    study = spec(search={"learning_rate": [0.1, 0.2]}, training={"learning_rate": 0.5})
    assert study.training.learning_rate == 0.5
    assert "learning_rate" in study.search.searched()


@pytest.mark.parametrize(
    "name",
    [
        "learning_rate",
        "label_smoothing",
        "input_noise",
        "weight_noise",
        "max_norm",
        "max_gradient_norm",
        "input_dropout",
        "mixup",
    ],
)
def test_each_of_the_others_alone_is_something_to_search(name: str) -> None:
    fixed = {"weight_decay": 0, "dropout": 0, "l1_lambda": 0, "patience": 3}
    study = spec(search={**fixed, name: {"low": 0.1, "high": 0.5}})
    assert set(study.search.searched()) == {name}


@pytest.mark.parametrize(
    ("training", "decay"),
    [
        ({}, "decoupled"),
        ({"optimizer": "adamw", "decay": "decoupled"}, "decoupled"),
        ({"optimizer": "adam"}, "coupled"),
        ({"optimizer": "sgd"}, "coupled"),
        ({"optimizer": "sgd", "decay": "decoupled"}, "decoupled"),
    ],
)
def test_decay_is_coupled_unless_the_optimizer_or_the_study_says_otherwise(
    training: dict[str, Any], decay: str
) -> None:
    assert spec(training=training).canonical()["training"]["decay"] == decay


def test_who_names_augmentations_searches_their_strength_unless_it_is_given() -> None:
    augmented = {"augment": ["shift", "flip"]}
    assert spec(training=augmented).search.augment_strength.numbers() == (0, 1)
    fixed = spec(training=augmented, search={"augment_strength": 0.5})
    assert fixed.search.augment_strength.numbers() == (0.5,)
    assert parse_spec(fixed.canonical()) == fixed


def test_sgd_has_a_momentum_to_set() -> None:
    assert spec(training={"optimizer": "sgd"}).canonical()["training"]["momentum"] == 0.9
    training = spec(training={"optimizer": "sgd", "momentum": 0.5, "nesterov": True}).training
    assert (training.momentum, training.nesterov) == (0.5, True)
    assert spec(training={"optimizer": "sgd", "momentum": 0.0}).training.momentum == 0


def test_what_has_no_meaning_is_not_shown() -> None:
    assert not {"momentum", "nesterov"} & spec().canonical()["training"].keys()
    assert "averaging_start" not in spec().canonical()["training"]
    averaging = spec(training={"averaging": "swa"}).canonical()["training"]
    assert averaging["averaging_start"] == 0.75
    assert "fraction" not in spec(validation={"folds": 5}).canonical()["validation"]
    assert "fraction" in spec(validation={"repeats": 5}).canonical()["validation"]


@pytest.mark.parametrize(
    ("validation", "members"),
    [({"folds": 5}, 5), ({"repeats": 3}, 3), ({"folds": 16, "repeats": 16}, 256)],
)
def test_a_trial_has_as_many_members_as_folds_and_repeats(
    validation: dict[str, int], members: int
) -> None:
    assert spec(validation=validation).validation.members == members


def test_the_learning_rate_defaults_by_optimizer() -> None:
    assert spec().training.learning_rate == 0.001
    assert spec(training={"optimizer": "sgd"}).training.learning_rate == 0.01
    assert spec(training={"optimizer": "sgd", "learning_rate": 0.3}).training.learning_rate == 0.3


@pytest.mark.parametrize(
    ("changes", "field", "says"),
    [
        ({"flavour": 1}, "flavour", "unknown field; known: name, task, training"),
        ({"search": {"dropuot": 0.1}}, "search.dropuot", "known: weight_decay, dropout"),
        ({"search": {"dropout": {"low": 0, "high": 0.5, "lgo": 1}}}, "search.dropout.lgo", "log"),
        (
            {"task": {**BASE["task"], "hiden": [9]}},
            "task.hiden",
            "norm, groups, hidden, activation",
        ),
        ({"task": {**BASE["task"], "hidden": ["a"]}}, "task.hidden.0", "valid integer"),
        ({"task": {**BASE["task"], "hidden": [0]}}, "task.hidden.0", "greater than or equal to 1"),
        (
            {"task": {**BASE["task"], "norm": "instance"}},
            "task.norm",
            "'batch', 'layer', 'group' or 'none'",
        ),
        ({"task": {**BASE["task"], "activation": "elu"}}, "task.activation", "'relu', 'gelu'"),
        (
            {"task": {**BASE["task"], "groups": 4}},
            "task.groups",
            "groups is a setting of norm: group alone, and the norm is batch",
        ),
        (
            {"task": {**BASE["task"], "norm": "group", "hidden": [16, 12]}},
            "task",
            "widths that are multiples of groups, which is 8, but 12 is none",
        ),
        (
            {"task": {"dataset": "digits", "model": "vit_tiny", "width": 16, "heads": 3}},
            "task.heads",
            "width must be a multiple of 4 and of heads, but width is 16 and heads are 3",
        ),
        ({"task": {"dataset": "digits", "model": "vit_tiny", "width": 6}}, "task.heads", "of 4"),
        ({"task": {"dataset": "digits", "model": "cnn", "channels": []}}, "task.channels", "least"),
        (
            {"task": {"dataset": "digits", "model": "cnn", "norm": "group", "channels": [4]}},
            "task",
            "but 4 is none",
        ),
        (
            {"task": {"dataset": "wine", "model": "tabular_resnet", "hidden_factor": 0}},
            "task.hidden_factor",
            "greater than 0",
        ),
        (
            {"task": {"dataset": "digits", "model": "torchvision"}},
            "task.architecture",
            "is required",
        ),
        (
            {"task": {"dataset": "digits", "model": "torchvision", "architecture": "resnet19"}},
            "task.architecture",
            "known: alexnet, googlenet",
        ),
        (
            {"task": {"dataset": "digits", "model": "torchvision", "architecture": "swin_t"}},
            "task.architecture",
            "swin_t leaves out whole layers at random (stochastic depth)",
        ),
        (
            {"task": {"dataset": "digits", "model": "resnet18", "norm": "group"}},
            "task.norm",
            "known for the model resnet18: score, class_weights, dataset, data, model",
        ),
        (
            {"task": {"dataset": "digits", "model": "linear", "data": {"rows": 3}}},
            "task.data.rows",
            "known for the data set digits: none",
        ),
        (
            {"task": {"dataset": "synthetic", "model": "linear", "data": {"classes": 3}}},
            "task.data.classes",
            "classes is a setting of a classification alone, and the kind is regression",
        ),
        (
            {"task": {"dataset": "image_folder", "model": "cnn", "data": {"size": 9}}},
            "task.data.path",
            "is required",
        ),
        ({"task": {"dataset": "digits"}}, "task.model", "is required"),
        ({"task": {**BASE["task"], "data": {"path": "x"}}}, "task.data.path", "unknown field"),
        ({"task": {**BASE["task"], "score": "f1"}}, "task.score", "'balanced_accuracy'"),
        ({"task": {**BASE["task"], "class_weights": 1}}, "task.class_weights", "'balanced'"),
        ({"task": {**TABLE, "data": {"path": "t.csv"}}}, "task.data.target", "is required"),
        ({"task": {**TABLE, "data": 1}}, "task.data", "must be a mapping (given: 1)"),
        (
            {"task": {**TABLE, "data": {"path": "t", "target": "y", "sep": ";"}}},
            "task.data.sep",
            "known for the data set table: path, target, test_path",
        ),
        (
            {"task": {**TABLE, "data": {"path": "t", "target": "y", "kind": "x"}}},
            "task.data.kind",
            "'classification' or 'regression'",
        ),
        ({"range": 1}, "range", "unknown field; known: name, task"),
        ({"search": {"range": 1}}, "search.range", "known: weight_decay, dropout"),
        ({"validation": {"choices": 3}}, "validation.choices", "known: fraction"),
        (
            {"search": {"dropout": {"low": 0, "high": 0.5, "range": 1}}},
            "search.dropout.range",
            "known: low, high",
        ),
        ({"search": {"dropout": {"low": 0.5, "high": 0.1}}}, "search.dropout", "low must be below"),
        ({"search": {"dropout": {"low": 0.5, "high": 0.5}}}, "search.dropout", "low must be below"),
        (
            {"search": {"weight_decay": {"low": 0, "high": 1, "log": True}}},
            "search.weight_decay",
            "log: true needs low > 0",
        ),
        (
            {"search": {"max_norm": {"low": 1, "high": 1e308, "log": True, "or_zero": True}}},
            "search.max_norm",
            "too extreme",
        ),
        (
            {"search": {"weight_decay": {"low": 5e-324, "high": 1, "log": True, "or_zero": True}}},
            "search.weight_decay",
            "too extreme",
        ),
        (
            {"search": {"weight_decay": {"low": 0.1, "high": 1, "or_zero": True}}},
            "search.weight_decay",
            "or_zero: true needs log: true",
        ),
        ({"search": {"dropout": {"low": 0, "high": 1}}}, "search.dropout", "must be in [0, 1)"),
        ({"search": {"dropout": -0.1}}, "search.dropout", "must be in [0, 1)"),
        ({"search": {"dropout": [0.1, 1.0]}}, "search.dropout", "must be in [0, 1)"),
        ({"search": {"dropout": True}}, "search.dropout", "one number"),
        ({"search": {"dropout": []}}, "search.dropout", "must name at least one value"),
        ({"search": {"dropout": [0.1, 0.1]}}, "search.dropout", "only once"),
        ({"search": {"weight_decay": -1e-9}}, "search.weight_decay", "must not be negative"),
        ({"search": {"l1_lambda": [-1.0]}}, "search.l1_lambda", "must not be negative"),
        ({"search": {"weight_decay": math.nan}}, "search.weight_decay", "finite"),
        ({"search": {"weight_decay": math.inf}}, "search.weight_decay", "finite"),
        ({"search": {"patience": 0}}, "search.patience", "must be at least 1"),
        ({"search": {"patience": {"low": 0, "high": 3}}}, "search.patience", "must be at least 1"),
        ({"search": {"patience": 2.5}}, "search.patience", "valid integer"),
        ({"search": {}}, "search", "names no parameter"),
        ({"search": {}}, "search", "patience, learning_rate, label_smoothing, input_noise"),
        ({"search": {"learning_rate": 0}}, "search.learning_rate", "must be above 0"),
        ({"search": {"learning_rate": [1, 200]}}, "search.learning_rate", "at most 100"),
        (
            {"search": {"learning_rate": {"low": 0.1, "high": 1, "log": True, "or_zero": True}}},
            "search.learning_rate",
            "learning_rate has no zero",
        ),
        ({"search": {"label_smoothing": 1}}, "search.label_smoothing", "must be in [0, 1)"),
        ({"search": {"input_noise": -0.1}}, "search.input_noise", "must not be negative"),
        ({"search": {"weight_noise": [-0.1]}}, "search.weight_noise", "must not be negative"),
        (
            {"search": {"weight_decay": 0, "dropout": 0, "l1_lambda": 0, "patience": 3}},
            "search",
            "nothing to search",
        ),
        (
            {
                "search": {
                    "weight_decay": 0,
                    "dropout": 0,
                    "l1_lambda": 0,
                    "patience": 3,
                    "learning_rate": 0.1,
                    "label_smoothing": 0.1,
                    "input_noise": 1,
                }
            },
            "search",
            "nothing to search",
        ),
        ({"search": {"input_dropout": 1}}, "search.input_dropout", "must be in [0, 1)"),
        ({"search": {"mixup": 1.5}}, "search.mixup", "must be in [0, 1]"),
        ({"search": {"augment_strength": [2, 0]}}, "search.augment_strength", "must be in [0, 1]"),
        (
            {"search": {"augment_strength": 0.5}},
            "",
            "training.augment goes, which names nothing; name some of shift, flip, rotation",
        ),
        ({"training": {"augment": ["mixup"]}}, "training.augment.0", "'shift', 'flip', 'rotation'"),
        ({"training": {"augment": ["flip", "flip"]}}, "training.augment", "only once"),
        (
            {"training": {"augment": ["flip"]}, "task": {"dataset": "wine", "model": "mlp"}},
            "",
            "training.augment changes images, but the rows of wine are none",
        ),
        ({"search": {"max_norm": -1}}, "search.max_norm", "must not be negative"),
        (
            {"search": {"max_norm": {"low": 0, "high": 4}}},
            "search.max_norm",
            "a range of limits must begin above 0, but low is 0.0; 0 means no limit",
        ),
        (
            {"search": {"max_gradient_norm": {"low": 1, "high": 4, "or_zero": True}}},
            "search.max_gradient_norm",
            "or_zero: true needs log: true; or a list of limits, in which 0 means none",
        ),
        ({"training": {"optimizer": "lion"}}, "training.optimizer", "'adam', 'adamw', 'sgd'"),
        (
            {"training": {"decay": "coupled"}},
            "training.decay",
            "the decay of adamw is decoupled; leave decay out, or take optimizer: adam",
        ),
        ({"training": {"averaging": "ema"}}, "training.averaging", "'none' or 'swa'"),
        (
            {"training": {"averaging_start": 0.5}},
            "training.averaging_start",
            "says when averaging begins, and there is none",
        ),
        (
            {"training": {"averaging": "swa", "averaging_start": 1}},
            "training.averaging_start",
            "less than 1",
        ),
        ({"training": {"decay": "none"}}, "training.decay", "'coupled' or 'decoupled'"),
        ({"training": {"learning_rate": 0}}, "training.learning_rate", "greater than 0"),
        ({"training": {"max_epochs": 0}}, "training.max_epochs", "greater than or equal to 1"),
        (
            {"training": {"momentum": 0.9}},
            "training.momentum",
            "momentum is a setting of sgd alone, and the optimizer is adamw; leave momentum out",
        ),
        (
            {"training": {"optimizer": "rmsprop", "nesterov": False}},
            "training.nesterov",
            "nesterov is a setting of sgd alone, and the optimizer is rmsprop",
        ),
        (
            {"training": {"optimizer": "sgd", "momentum": 0, "nesterov": True}},
            "training.nesterov",
            "needs momentum > 0",
        ),
        ({"training": {"optimizer": "sgd", "momentum": 1}}, "training.momentum", "less than 1"),
        (
            {"training": {"max_epochs": 5, "warmup_epochs": 5}},
            "training.warmup_epochs",
            "must be smaller than max_epochs, which is 5, but 5 is given",
        ),
        ({"training": {"warmup_epochs": -1}}, "training.warmup_epochs", "greater than or equal"),
        ({"training": {"penalized": "none"}}, "training.penalized", "'weights' or 'all'"),
        ({"training": {"precision": "fp16"}}, "training.precision", "'float32', 'tf32' or 'bf16'"),
        ({"sampler": "magic"}, "sampler.name", "'tpe', 'random', 'grid', 'qmc', 'cmaes' or 'gp'"),
        (
            {"pruner": {"name": "magic"}},
            "pruner.name",
            "'none', 'extrapolation', 'median', 'asha' or 'hyperband'",
        ),
        ({"budget": {"trials": 0}}, "budget.trials", "greater than or equal to 1"),
        ({"budget": {"trials": 10**7}}, "budget.trials", "less than or equal to 100000"),
        ({"budget": {"seconds": 0}}, "budget.seconds", "greater than 0"),
        ({"budget": {"seconds": 1e12}}, "budget.seconds", "less than or equal to"),
        ({"budget": {}}, "budget", "name trials, seconds, trial_epochs, or several"),
        ({"budget": {"trials": "4"}}, "budget.trials", "valid integer"),
        ({"validation": {"fraction": 1.0}}, "validation.fraction", "less than 1"),
        ({"validation": {"folds": 1}}, "validation.folds", "greater than or equal to 2"),
        ({"validation": {"folds": 101}}, "validation.folds", "less than or equal to 100"),
        ({"validation": {"repeats": 0}}, "validation.repeats", "greater than or equal to 1"),
        (
            {"validation": {"folds": 5, "fraction": 0.2}},
            "validation",
            "fraction and folds exclude each other; name one of them",
        ),
        (
            {"validation": {"folds": 100, "repeats": 3}},
            "validation",
            "folds × repeats must be at most 256, but 100 × 3 is given",
        ),
        ({"training": 3}, "training", "must be a mapping of fields (given: 3)"),
        ({"training": {"augment": "flip"}}, "training.augment", "must be a list"),
        ({"priority": 0}, "priority", "greater than or equal to 1"),
        (
            {"budget": {"trial_epochs": 99}},
            "",
            "budget.trial_epochs must be at least 100, so that the reference points",
        ),
        ({"sampler": "grid"}, "", "search.weight_decay is a range"),
        (
            {"pruner": {"startup_trials": 3}},
            "pruner.startup_trials",
            "is no setting of the pruner extrapolation; leave it out",
        ),
        (
            {"pruner": {"name": "none", "first_epoch": 3}},
            "pruner.first_epoch",
            "is no setting of the pruner none",
        ),
        (
            {"pruner": {"first_epoch": 5}, "training": {"max_epochs": 5}},
            "",
            "pruner.first_epoch must be smaller than training.max_epochs, which is 5, but 5 is",
        ),
    ],
)
def test_what_is_wrong_is_named_with_what_would_be_right(
    changes: dict[str, Any], field: str, says: str
) -> None:
    found = refusal(**changes)
    assert [name for name, _ in found] == [field]
    assert says in found[0][1]


@pytest.mark.parametrize("name", ["", "-a", ".a", "a b", "a/b", "ä", "a" * 101, "a\n", "a\x00"])
def test_a_name_must_be_fit_for_an_address(name: str) -> None:
    assert refusal(name=name)[0][0] == "name"


@pytest.mark.parametrize("name", ["a", "0", "A.b_c-9", "a" * 100])
def test_such_names_are_fine(name: str) -> None:
    assert spec(name=name).name == name


def test_every_mistake_is_named_at_once() -> None:
    found = refusal(budget={"trials": 0}, priority=0, training={"batch_size": 0})
    assert {name for name, _ in found} == {"budget.trials", "priority", "training.batch_size"}


def test_every_mistake_that_several_fields_make_together_is_named_at_once() -> None:
    found = refusal(
        sampler="grid",
        pruner={"first_epoch": 60},
        budget={"trial_epochs": 10},
        training={"learning_rate": 0.1},
        search={"augment_strength": [0.5], "learning_rate": 0.2},
    )
    assert [field for field, _ in found] == [""] * 5
    for name in ("augment_strength", "sampler grid", "first_epoch", "trial_epochs", "fixed at 0.2"):
        assert sum(name in message for _, message in found) == 1


@pytest.mark.parametrize("data", [None, 3, "study", [1], []])
def test_a_study_must_be_a_mapping(data: Any) -> None:
    with pytest.raises(InvalidSpec, match="mapping of fields"):
        parse_spec(data)


def test_a_grid_cannot_be_asked_for_more_trials_than_it_has() -> None:
    search = {"weight_decay": [0, 1], "dropout": [0, 0.5], "l1_lambda": 0, "patience": 3}
    assert spec(search=search, sampler="grid", budget={"trials": 6}).budget.trials == 6
    found = refusal(search=search, sampler="grid", budget={"trials": 7})
    assert "the grid has 4 points" in found[0][1]
    assert "at most 6 trials" in found[0][1]
    assert spec(search=search, sampler="grid", budget={"seconds": 9}).budget.trials == 6


def test_a_grid_of_more_points_than_can_be_numbered_is_refused() -> None:
    many = [i / 1000 for i in range(1, 1000)]
    search = {name: many for name in STRENGTHS if name != "patience"}
    augmented = {"augment": ["shift"]}
    found = refusal(search=search, training=augmented, sampler="grid", budget={"seconds": 9})
    assert "more than can be numbered" in found[0][1]
    endless = {"low": 1, "high": 10**15}
    search = {"weight_decay": many, "dropout": many, "l1_lambda": 0, "patience": endless}
    found = refusal(search=search, sampler="grid", budget={"trials": 9})
    assert "more than can be numbered" in found[0][1]


def test_numbers_may_be_written_as_in_json_and_python() -> None:
    text = "{a: 1e-4, b: .5E+3, c: 1.5e3, d: -2e1, e: 2026-11-21, f: 12, g: 040, h: 1:30, i: 0x1F}"
    assert load_yaml(text) == {
        "a": 1e-4, "b": 500.0, "c": 1500.0, "d": -20.0, "e": "2026-11-21", "f": 12, "g": 40,
        "h": "1:30", "i": 31,
    }  # fmt: skip
    assert load_yaml("[-.inf, 0o17, +3, 5., ~, true]") == [float("-inf"), 15, 3, 5.0, None, True]


def test_a_number_that_no_reader_of_json_would_keep_is_named() -> None:
    text = f"{{name: x, search: {{patience: {{low: 1, high: 1{'0' * 400}}}}}}}"
    with pytest.raises(InvalidSpec, match=r"search\.patience\.high: a whole number must be within"):
        parse_text(text)


@pytest.mark.parametrize(
    "text", ["a: [", "{", "a: &x [1]\nb: *x", "!!python/object:os.system {}", "\x00", "? [" * 9999]
)
def test_broken_or_hostile_yaml_is_refused(text: str) -> None:
    with pytest.raises(InvalidSpec, match="not valid YAML"):
        parse_text(text)


@pytest.mark.parametrize(
    ("pruner", "max_epochs", "first"),
    [
        ("extrapolation", 40, 8),
        ("median", 40, 13),
        ("none", 40, 13),
        ("extrapolation", 2, 1),
        ({"first_epoch": 7}, 40, 7),
        ({"name": "asha", "first_epoch": 1}, 40, 1),
    ],
)
def test_no_pruner_acts_early_unless_told_to(pruner: Any, max_epochs: int, first: int) -> None:
    study = spec(pruner=pruner, training={"max_epochs": max_epochs})
    assert study.first_prunable_epoch == first


def test_every_default_is_filled_in_and_read_back_the_same() -> None:
    first = spec(budget={"seconds": 60}, pruner="asha")
    assert parse_spec(first.canonical()).canonical() == first.canonical()
    assert parse_text(json.dumps(first.canonical())) == first


_fractions = st.floats(0.01, 0.98)


@given(
    low=_fractions,
    width=st.floats(0.001, 0.01),
    choices=st.lists(st.integers(1, 99), min_size=1, unique=True),
    trials=st.integers(1, 100_000),
    optimizer=st.sampled_from(["adam", "adamw", "sgd", "rmsprop"]),
    folds=st.none() | st.integers(2, 100),
)
def test_reading_back_is_the_identity(
    low: float, width: float, choices: list[int], trials: int, optimizer: str, folds: int | None
) -> None:
    study = spec(
        search={"dropout": {"low": low, "high": low + width}, "patience": choices},
        budget={"trials": trials},
        training={"optimizer": optimizer},
        validation={"folds": folds},
    )
    again = StudySpec.model_validate(json.loads(json.dumps(study.canonical())))
    assert again.canonical() == study.canonical()


def test_a_study_from_before_there_were_folds_and_noise_reads_the_same() -> None:
    old = spec(training={"optimizer": "sgd"}).canonical()
    for part, names in (
        ("task", ("activation",)),
        (
            "training",
            (
                "momentum",
                "nesterov",
                "warmup_epochs",
                "penalized",
                "precision",
                "decay",
                "augment",
                "averaging",
            ),
        ),
        (
            "search",
            {*STRENGTHS} - {"weight_decay", "dropout", "l1_lambda", "patience"},
        ),
        ("validation", ("folds", "repeats")),
    ):
        for name in names:
            del old[part][name]
    assert parse_spec(old).canonical() == spec(training={"optimizer": "sgd"}).canonical()


@pytest.mark.parametrize(
    "task",
    [
        {"model": "mlp", "norm": "group", "hidden": [16]},
        {"model": "cnn", "channels": [8, 8], "norm": "group", "groups": 4},
        {"model": "torchvision", "architecture": "densenet121"},
        {"model": "tabular_resnet", "dataset": "synthetic", "data": {"kind": "classification"}},
        {"model": "linear", "dataset": "image_folder", "data": {"path": "flowers"}},
    ],
)
def test_settings_of_models_and_data_sets_are_read_back_the_same(task: dict[str, Any]) -> None:
    study = spec(task={"dataset": "digits", **task})
    assert parse_spec(study.canonical()) == study


@pytest.mark.parametrize(
    ("pruner", "settings"),
    [
        ("none", set()),
        ("extrapolation", {"first_epoch"}),
        ("median", {"first_epoch", "startup_trials"}),
        ("asha", {"first_epoch", "reduction_factor"}),
        ("hyperband", {"first_epoch", "reduction_factor"}),
    ],
)
def test_a_pruner_shows_the_settings_that_it_has(pruner: str, settings: set[str]) -> None:
    shown = spec(pruner=pruner).canonical()["pruner"]
    assert shown.keys() == {"name", *settings}
    assert spec(pruner=shown).canonical()["pruner"] == shown
    as_once = {"first_epoch": None, "startup_trials": 5, "reduction_factor": 3, "name": pruner}
    assert spec(pruner=as_once).canonical()["pruner"] == shown


def test_settings_that_have_no_meaning_are_not_shown() -> None:
    assert "groups" not in spec().task.settings
    grouped = spec(task={"dataset": "digits", "model": "mlp", "norm": "group"})
    assert grouped.task.settings["groups"] == 8
    numbers = spec(task={"dataset": "synthetic", "model": "linear"}).task.data
    assert "classes" not in numbers
    assert "noise" in numbers


def test_unknown_models_keep_their_settings_for_the_worker_to_check() -> None:
    study = spec(task={"dataset": "mine", "model": "mine", "depth": 4})
    assert study.task.settings == {"depth": 4}


def test_the_settings_of_a_table_are_filled_in_and_read_back_the_same() -> None:
    study = spec(task={**TABLE, "data": {"path": "t.csv", "target": "y", "ignore": ["id"]}})
    assert study.task.data["test_fraction"] == 0.2
    assert study.task.data["ignore"] == ["id"]
    assert study.task.settings == MLP
    assert parse_spec(study.canonical()) == study


def test_unknown_data_sets_keep_their_settings_for_the_worker_to_check() -> None:
    study = spec(task={"dataset": "mine", "model": "mlp", "data": {"rows": 7}})
    assert study.task.data == {"rows": 7}
