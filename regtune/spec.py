"""What a person may post: a study, validated field by field, with every default filled in.

Nothing is left implicit: ``StudySpec`` holds the ranges that will be searched also where the
person named none, so that what is stored and shown is what is run.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    Strict,
    ValidationError,
    ValidationInfo,
)
from pydantic import field_validator as validate_field
from pydantic import model_serializer as serialize_model
from pydantic import model_validator as validate_model
from pydantic_core import ErrorDetails, PydanticCustomError
from yaml.constructor import ConstructorError

from regtune.errors import FieldError, InvalidSpec
from regtune.space import (
    PARAMETER_KINDS,
    Choices,
    Fixed,
    IntegerParameter,
    Parameter,
    Range,
    Searched,
)

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
MAX_BODY_BYTES = 256 * 1024
MAX_YAML_VALUES = 10_000
"""Most values in a YAML text, which takes a few hundred times longer to read than JSON."""
REFERENCE_TRIALS = 2
"""Every study first trains two reference points: everything off, and a common default."""
MAX_LEARNING_RATE = 100
MAX_MEMBERS = 256
"""Most trainings that one trial may stand for."""
MAX_GRID_POINTS = 2**63 - 1
"""Most points that can be shuffled by number."""

Optimizer = Literal["adam", "adamw", "sgd", "rmsprop"]
SamplerName = Literal["tpe", "random", "grid", "qmc", "cmaes", "gp"]
PrunerName = Literal["none", "extrapolation", "median", "asha", "hyperband"]
ScoreName = Literal["accuracy", "balanced_accuracy", "log_loss", "r2", "rmse"]
CLASSIFICATION_SCORES: tuple[ScoreName, ...] = ("accuracy", "balanced_accuracy", "log_loss")
REGRESSION_SCORES: tuple[ScoreName, ...] = ("r2", "rmse")

_P = TypeVar("_P", bound=Parameter | IntegerParameter)


class _SpecModel(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def _with_computed_defaults(*names: str) -> Callable[[dict[str, Any]], None]:
    """Let a JSON schema say that fields may be left out whose defaults depend on other fields."""

    def change(schema: dict[str, Any]) -> None:
        schema["required"] = [name for name in schema.get("required", ()) if name not in names]
        for name in names:
            schema["properties"][name].pop("default", None)

    return change


class _PartlyUsed(_SpecModel):
    """A part of a spec in which some fields have no meaning, depending on the others.

    Such a field is not written: it may not be named either, and what is shown can be posted again.
    """

    def _unused(self) -> tuple[str, ...]:
        raise NotImplementedError

    @serialize_model(mode="wrap")
    def _write_what_is_used(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        unused = self._unused()
        return {name: value for name, value in write(self).items() if name not in unused}


class MlpSettings(_SpecModel):
    """Settings of the model ``mlp``: linear, norm, ReLU and dropout per hidden layer."""

    hidden: Annotated[
        tuple[Annotated[int, Field(ge=1, le=65_536)], ...], Strict(False), Field(max_length=64)
    ] = Field((128,), description="Width of each hidden layer.", examples=[[128], [512, 512]])
    norm: Literal["batch", "layer", "none"] = Field(
        "batch", description="Normalization before each ReLU.", examples=["batch"]
    )


MODEL_SETTINGS: Mapping[str, type[BaseModel]] = {"mlp": MlpSettings}
"""The settings of models that can be checked without importing the model."""


class NoSettings(_SpecModel):
    """Settings of a data set that has none."""


ColumnNames = Annotated[tuple[str, ...], Strict(False), Field(max_length=10_000)]


class TableSettings(_SpecModel):
    """Settings of the data set ``table``: a CSV or Parquet file with a column to predict."""

    path: str = Field(
        max_length=2000,
        description="File of the training rows: a path, or an address that fsspec knows, under a "
        "root that the worker's own REGTUNE_DATA_ROOTS names, or relative to its data folder. "
        "Parquet if it ends in .parquet or .pq, CSV otherwise.",
        examples=["adult.csv", "s3://bucket/adult.parquet"],
    )
    target: str = Field(description="The column to predict.", examples=["income"], max_length=1000)
    test_path: str | None = Field(
        None,
        max_length=2000,
        description="File of the test rows. Default: test_fraction of the rows in path.",
        examples=["adult-test.csv"],
    )
    test_fraction: float = Field(
        0.2,
        gt=0,
        lt=1,
        description="Share of the rows in path that are the test rows: stratified, the same for "
        "every study.",
        examples=[0.2],
    )
    kind: Literal["classification", "regression"] | None = Field(
        None,
        description="What is predicted. Default: a number where the target is one with more than "
        "20 values or with fractions, otherwise a class.",
        examples=["regression"],
    )
    columns: ColumnNames | None = Field(
        None,
        description="Names of a CSV file's columns, if its first line is not their names.",
        examples=[["age", "workclass", "income"]],
    )
    numeric: ColumnNames = Field(
        (), description="Columns that are numbers, whatever they look like.", examples=[["age"]]
    )
    categorical: ColumnNames = Field(
        (),
        description="Columns that are categories, whatever they look like.",
        examples=[["postcode"]],
    )
    ignore: ColumnNames = Field((), description="Columns to leave out.", examples=[["id"]])
    missing: ColumnNames = Field(
        ("", "NA", "N/A", "NaN", "nan", "null", "None", "?"),
        description="What stands in a text column where a value is missing.",
        examples=[["", "?"]],
    )
    delimiter: str = Field(
        ",", min_length=1, max_length=1, description="Between the columns of a CSV file."
    )


DATASET_SETTINGS: Mapping[str, type[BaseModel]] = {
    "digits": NoSettings,
    "mnist": NoSettings,
    "fashion_mnist": NoSettings,
    "breast_cancer": NoSettings,
    "wine": NoSettings,
    "diabetes": NoSettings,
    "table": TableSettings,
}
"""The settings of data sets that can be checked without importing the data set."""


class TaskSpec(BaseModel):
    """What is trained: a data set and a model; every further field is a setting of the model."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, allow_inf_nan=False)

    dataset: str = Field(
        description="Name of the data set, as a worker has it installed.",
        examples=["digits", "mnist", "fashion_mnist", "table"],
        max_length=100,
    )
    data: dict[str, Any] = Field(
        default_factory=dict,
        validate_default=True,
        description="The data set's own settings.",
        examples=[{"path": "adult.csv", "target": "income"}],
    )
    score: ScoreName | None = Field(
        None,
        description="The score beside the loss: accuracy, balanced_accuracy or log_loss of a "
        "classification, r2 or rmse of a regression. It chooses nothing. Default: accuracy or r2, "
        "or the task's own.",
        examples=["balanced_accuracy"],
    )
    class_weights: Literal["none", "balanced"] = Field(
        "none",
        description="balanced: each row's cross-entropy counts rows / (classes × rows of its "
        "class) times, in training and in the validation and test loss.",
        examples=["balanced"],
    )
    model: str = Field(
        description="Name of the model, as a worker has it installed.",
        examples=["mlp"],
        max_length=100,
    )

    @property
    def settings(self) -> dict[str, Any]:
        """The model's own settings."""
        return dict(self.model_extra or {})

    @validate_field("data")
    @classmethod
    def _fill_in_data_settings(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        """Check the data set's settings where its schema is known, and fill in their defaults."""
        schema = DATASET_SETTINGS.get(info.data.get("dataset", ""))
        return value if schema is None else schema.model_validate(value).model_dump(mode="json")

    @validate_model(mode="before")
    @classmethod
    def _fill_in_settings(cls, data: Any) -> Any:
        """Check the model's settings where its schema is known, and fill in their defaults."""
        if not isinstance(data, Mapping) or not isinstance(data.get("model"), str):
            return data
        schema = MODEL_SETTINGS.get(data["model"])
        if schema is None:
            return data
        own = {key: data[key] for key in data if key in cls.model_fields}
        settings = {key: data[key] for key in data if key not in cls.model_fields}
        return own | schema.model_validate(settings).model_dump(mode="json")


class Training(_PartlyUsed):
    """How each trial is trained; the same for all trials."""

    model_config = ConfigDict(json_schema_extra=_with_computed_defaults("learning_rate"))

    optimizer: Optimizer = Field(
        "adamw",
        description="Weight decay is decoupled in AdamW, and coupled (added to the gradient) in "
        "the others.",
        examples=["adamw"],
    )
    learning_rate: float = Field(
        0.0,
        gt=0,
        le=MAX_LEARNING_RATE,
        validate_default=False,
        description="Step size η, unless search.learning_rate searches it; the reference points "
        "keep to it then. Default: 0.001, or 0.01 for sgd.",
        examples=[0.001],
    )
    momentum: float = Field(
        0.9,
        ge=0,
        lt=1,
        description="Momentum of sgd; the other optimizers have none to set.",
        examples=[0.9],
    )
    nesterov: bool = Field(
        False,
        description="Nesterov's form of the momentum of sgd; needs momentum > 0.",
        examples=[False],
    )
    batch_size: int = Field(128, ge=1, le=1_000_000, description="Rows per step.", examples=[128])
    max_epochs: int = Field(
        50, ge=1, le=100_000, description="Longest training of a trial.", examples=[50]
    )
    schedule: Literal["constant", "cosine"] = Field(
        "constant",
        description="Learning rate over max_epochs, after the warm-up; cosine ends at zero.",
        examples=["constant"],
    )
    warmup_epochs: int = Field(
        0,
        ge=0,
        description="Epochs in which the learning rate first rises linearly to η; fewer than "
        "max_epochs.",
        examples=[0],
    )
    min_delta: float = Field(
        0.0,
        ge=0,
        description="Early stopping counts only an improvement of the validation loss by more.",
        examples=[0.0],
    )
    l1: Literal["proximal", "subgradient"] = Field(
        "proximal",
        description="proximal: soft threshold by η·λ₁ after each step, which gives true zeros; "
        "subgradient: λ₁·‖w‖₁ is part of the loss (its useful λ₁ is about 1000 times smaller).",
        examples=["proximal"],
    )
    penalized: Literal["weights", "all"] = Field(
        "weights",
        description="What weight decay and L1 act on. weights: parameters of two or more "
        "dimensions outside normalization layers; all: biases and normalization parameters too.",
        examples=["weights"],
    )
    precision: Literal["float32", "tf32", "bf16"] = Field(
        "float32",
        description="float32; tf32: the same with TF32 matrix products, on CUDA only (elsewhere "
        "the same as float32); bf16: forward and backward pass under bfloat16 autocast, weights "
        "and moments stay float32.",
        examples=["float32"],
    )
    seed: int = Field(
        0,
        ge=0,
        lt=2**31,
        description="Seed of initial weights, data order, dropout, noise and the validation rows.",
        examples=[0],
    )

    # Only what is named comes here: a default is not validated.
    @validate_field("momentum", "nesterov")
    @classmethod
    def _check_optimizer_has_momentum(cls, value: Any, info: ValidationInfo) -> Any:
        optimizer = info.data.get("optimizer", "sgd")
        if optimizer != "sgd":
            raise PydanticCustomError(
                "momentum",
                "{field} is a setting of sgd alone, and the optimizer is {optimizer}; leave "
                "{field} out, or take optimizer: sgd",
                {"field": info.field_name, "optimizer": optimizer},
            )
        return value

    @validate_field("nesterov")
    @classmethod
    def _check_nesterov(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("momentum") == 0:
            raise PydanticCustomError(
                "momentum", "nesterov: true needs momentum > 0, but momentum is 0"
            )
        return value

    @validate_field("warmup_epochs")
    @classmethod
    def _check_warmup(cls, value: int, info: ValidationInfo) -> int:
        if value >= info.data.get("max_epochs", value + 1):
            raise PydanticCustomError(
                "warmup",
                "must be smaller than max_epochs, which is {max_epochs}, but {value} is given",
                {"max_epochs": info.data["max_epochs"], "value": value},
            )
        return value

    @validate_model(mode="after")
    def _fill_in_learning_rate(self) -> Self:
        if "learning_rate" not in self.model_fields_set:
            self.__dict__["learning_rate"] = 0.01 if self.optimizer == "sgd" else 0.001
        return self

    def _unused(self) -> tuple[str, ...]:
        return () if self.optimizer == "sgd" else ("momentum", "nesterov")


class Search(_SpecModel):
    """What is searched. A parameter that is left out gets its default range or fixed value."""

    model_config = ConfigDict(
        json_schema_extra=_with_computed_defaults(
            "weight_decay",
            "dropout",
            "l1_lambda",
            "patience",
            "learning_rate",
            "label_smoothing",
            "input_noise",
            "weight_noise",
        )
    )

    weight_decay: Parameter = Field(
        description="λ₂ ≥ 0. Default: zero or 1e-4…3 (log) for AdamW, whose decay below "
        "1 / (learning rate × steps) does nothing; zero or 1e-6…1e-2 (log) for the others.",
        examples=[{"low": 1e-4, "high": 3.0, "log": True, "or_zero": True}],
    )
    dropout: Parameter = Field(
        description="Rate p of every dropout site, 0 ≤ p < 1. Default: 0…0.7.",
        examples=[{"low": 0.0, "high": 0.7}],
    )
    l1_lambda: Parameter = Field(
        description="λ₁ ≥ 0. Default: zero or 1e-4…0.3 (log) in the proximal form, zero or "
        "1e-7…1e-3 (log) as subgradient.",
        examples=[{"low": 1e-4, "high": 0.3, "log": True, "or_zero": True}],
    )
    patience: IntegerParameter = Field(
        description="Epochs in a row without improvement after which a trial stops, ≥ 1. "
        "Default: from a tenth of max_epochs to half of it.",
        examples=[{"low": 5, "high": 25}],
    )
    learning_rate: Parameter = Field(
        description="η > 0. Default: fixed at training.learning_rate.",
        examples=[{"low": 1e-4, "high": 1e-2, "log": True}],
    )
    label_smoothing: Parameter = Field(
        description="ε, 0 ≤ ε < 1: the training loss counts the right class with 1 - ε, and ε "
        "spread evenly over all classes. Default: fixed at 0.",
        examples=[{"low": 0.0, "high": 0.3}],
    )
    input_noise: Parameter = Field(
        description="σ ≥ 0 of Gaussian noise on the standardized inputs, in training only. "
        "Default: fixed at 0.",
        examples=[{"low": 0.0, "high": 1.0}],
    )
    weight_noise: Parameter = Field(
        description="σ ≥ 0 of Gaussian noise on the weights in the forward pass, in training only. "
        "Default: fixed at 0.",
        examples=[{"low": 1e-4, "high": 0.1, "log": True, "or_zero": True}],
    )

    @validate_field("weight_decay", "l1_lambda", "input_noise", "weight_noise")
    @classmethod
    def _check_strength(cls, parameter: Parameter) -> Parameter:
        return _check_numbers(parameter, lambda value: value >= 0, "must not be negative")

    @validate_field("dropout", "label_smoothing")
    @classmethod
    def _check_rate(cls, parameter: Parameter) -> Parameter:
        return _check_numbers(parameter, lambda value: 0 <= value < 1, "must be in [0, 1)")

    @validate_field("patience")
    @classmethod
    def _check_patience(cls, parameter: IntegerParameter) -> IntegerParameter:
        _check_has_no_zero(parameter, "patience")
        return _check_numbers(parameter, lambda value: value >= 1, "must be at least 1")

    @validate_field("learning_rate")
    @classmethod
    def _check_learning_rate(cls, parameter: Parameter) -> Parameter:
        _check_has_no_zero(parameter, "learning_rate")
        return _check_numbers(
            parameter,
            lambda value: 0 < value <= MAX_LEARNING_RATE,
            f"must be above 0 and at most {MAX_LEARNING_RATE}",
        )

    @validate_model(mode="after")
    def _check_not_empty(self) -> Self:
        if not self.searched():
            raise PydanticCustomError(
                "empty", "nothing to search: make a range or a list of at least one parameter"
            )
        return self

    def parameters(self) -> dict[str, Searched | Fixed[float] | Fixed[int]]:
        """All parameters by name, in the order in which they are shown."""
        return {name: getattr(self, name) for name in type(self).model_fields}

    def searched(self) -> dict[str, Searched]:
        """The parameters that are not fixed, by name."""
        return {
            name: parameter
            for name, parameter in self.parameters().items()
            if not isinstance(parameter, Fixed)
        }


def _check_numbers(parameter: _P, is_right: Callable[[float], bool], what_is_right: str) -> _P:
    for value in parameter.numbers():
        if not is_right(value):
            raise PydanticCustomError(
                "bounds", "{what}, but {value} is given", {"what": what_is_right, "value": value}
            )
    return parameter


def _check_has_no_zero(parameter: Parameter | IntegerParameter, name: str) -> None:
    if isinstance(parameter, Range) and parameter.or_zero:
        raise PydanticCustomError(
            "parameter", "{name} has no zero; leave or_zero out", {"name": name}
        )


def default_search(training: Training) -> dict[str, Any]:
    """Return the default ranges and fixed values for a training.

    In AdamW a decay λ acts over 1 / (η·λ) steps (Wang & Aitchison 2024, arXiv 2405.13698), so one
    below 1 / (η · steps of the whole training) does nothing; the range 1e-6…1e-2 that is usual
    for coupled decay would mostly be off on small data. Proximal L1 shrinks by η·λ₁ each step
    whatever the optimizer; the subgradient is rescaled by Adam and needs λ₁ far smaller.
    """
    decoupled = training.optimizer == "adamw"
    proximal = training.l1 == "proximal"
    return {
        "weight_decay": _zero_or(1e-4, 3.0) if decoupled else _zero_or(1e-6, 1e-2),
        "dropout": {"low": 0.0, "high": 0.7},
        "l1_lambda": _zero_or(1e-4, 0.3) if proximal else _zero_or(1e-7, 1e-3),
        "patience": _patience_range(training.max_epochs),
        "learning_rate": training.learning_rate,
        "label_smoothing": 0.0,
        "input_noise": 0.0,
        "weight_noise": 0.0,
    }


def _zero_or(low: float, high: float) -> dict[str, Any]:
    return {"low": low, "high": high, "log": True, "or_zero": True}


def _patience_range(max_epochs: int) -> dict[str, Any]:
    low = max(1, max_epochs // 10)
    return {"low": low, "high": max(low + 1, max_epochs // 2)}


class Validation(_PartlyUsed):
    """Which training rows are held out to choose by, and how often each trial is trained."""

    fraction: float = Field(
        0.2,
        gt=0,
        lt=1,
        description="Share of the training rows that is held out, stratified, the same rows for "
        "every trial; unless there are folds.",
        examples=[0.2],
    )
    folds: int | None = Field(
        None,
        ge=2,
        le=100,
        description="Stratified k-fold cross-validation instead of a fraction: a trial is trained "
        "once for each fold, which is held out.",
        examples=[5],
    )
    repeats: int = Field(
        1,
        ge=1,
        le=100,
        description="How often all of that is done, each time with other rows held out and other "
        "noise; folds × repeats is at most 256.",
        examples=[1],
    )

    @validate_model(mode="after")
    def _check_together(self) -> Self:
        if self.folds is not None and "fraction" in self.model_fields_set:
            raise PydanticCustomError(
                "validation", "fraction and folds exclude each other; name one of them"
            )
        if self.members > MAX_MEMBERS:
            raise PydanticCustomError(
                "validation",
                "folds × repeats must be at most {most}, but {folds} × {repeats} is given",
                {"most": MAX_MEMBERS, "folds": self.folds, "repeats": self.repeats},
            )
        return self

    @property
    def members(self) -> int:
        """How many trainings, side by side, one trial stands for."""
        return (self.folds or 1) * self.repeats

    def _unused(self) -> tuple[str, ...]:
        return () if self.folds is None else ("fraction",)


class Budget(_SpecModel):
    """When the study is done; whichever comes first."""

    model_config = ConfigDict(json_schema_extra=_with_computed_defaults("trials"))

    trials: int = Field(
        100_000,
        ge=1,
        le=100_000,
        description="How many trials, exactly; the two reference points count. Default: as many "
        "as the seconds or trial_epochs allow.",
        examples=[40],
    )
    seconds: float | None = Field(
        None,
        gt=0,
        le=366 * 86_400,
        description="Wall-clock seconds from the first lease; then no trial starts any more.",
        examples=[600.0],
    )
    trial_epochs: int | None = Field(
        None,
        ge=1,
        le=10**12,
        description="Epochs that all trials train together, never more: a trial is added only "
        "while all of its max_epochs would fit. An epoch that is trained again after a lost lease "
        "counts once.",
        examples=[1500],
    )

    @validate_model(mode="after")
    def _check_given(self) -> Self:
        others = (self.seconds, self.trial_epochs)
        if "trials" not in self.model_fields_set and others == (None, None):
            raise PydanticCustomError("budget", "name trials, seconds, trial_epochs, or several")
        return self


class Sampler(_SpecModel):
    """Who suggests what to try next."""

    name: SamplerName = Field(
        "tpe",
        description="Which algorithm; grid needs a list or whole numbers everywhere.",
        examples=["tpe"],
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of the suggestions.", examples=[0])


class Pruner(_SpecModel):
    """Who stops trials early that look bad."""

    name: PrunerName = Field(
        "extrapolation",
        description="extrapolation: our own, which stops a trial that is not going to catch up "
        "with the best; median, asha and hyperband: Optuna's.",
        examples=["extrapolation"],
    )
    first_epoch: int | None = Field(
        None,
        ge=1,
        description="No trial is pruned before it, because strong regularization looks worse "
        "early and wins late. Default: a quarter of max_epochs for extrapolation, which does not "
        "compare early losses, and a third for the others.",
        examples=[16],
    )
    startup_trials: int = Field(
        5, ge=0, description="median: trials that are never pruned.", examples=[5]
    )
    reduction_factor: int = Field(
        3,
        ge=2,
        le=100,
        description="asha and hyperband: one in so many goes on at each rung.",
        examples=[3],
    )


class Requires(_SpecModel):
    """What a worker must have to train the study."""

    device: Literal["cpu", "cuda", "mps", "xpu"] | None = Field(
        None, description="Kind of device, in PyTorch's words. Default: any.", examples=["cuda"]
    )
    min_memory_gb: float = Field(
        0.0,
        ge=0,
        le=1e6,
        description="Least memory of the device, in 10^9 bytes, as its driver counts them; of the "
        "machine where the device is a CPU.",
        examples=[15],
    )


class StudySpec(_SpecModel):
    """A study: what is trained, what is searched, and how far."""

    model_config = ConfigDict(json_schema_extra=_with_computed_defaults("search"))

    name: str = Field(pattern=NAME_PATTERN, description="Unique name.", examples=["digits"])
    task: TaskSpec = Field(
        description="What is trained: a data set, a model, and the model's own settings.",
        examples=[{"dataset": "digits", "model": "mlp", "hidden": [128], "norm": "batch"}],
    )
    training: Training = Field(
        default_factory=Training,
        description="How each trial is trained.",
        examples=[{"optimizer": "adamw", "max_epochs": 50}],
    )
    search: Search = Field(
        description="What is searched. Default: sensible ranges of weight_decay, dropout, "
        "l1_lambda and patience.",
        examples=[{"dropout": {"low": 0.0, "high": 0.5}, "l1_lambda": 0.0}],
    )
    validation: Validation = Field(
        default_factory=Validation,
        description="Which rows are held out to choose by.",
        examples=[{"fraction": 0.2}],
    )
    budget: Budget = Field(description="When the study is done.", examples=[{"trials": 40}])
    sampler: Sampler = Field(
        default_factory=Sampler,
        description="Who suggests; a name alone will do.",
        examples=[{"name": "tpe"}],
    )
    pruner: Pruner = Field(
        default_factory=Pruner,
        description="Who stops trials early; a name alone will do.",
        examples=[{"name": "extrapolation"}],
    )
    priority: int = Field(
        1,
        ge=1,
        le=1000,
        description="Weight by which studies share the workers.",
        examples=[1],
    )

    requires: Requires = Field(
        default_factory=Requires,
        description="What a worker must have to train it.",
        examples=[{"device": "cuda", "min_memory_gb": 15}],
    )

    @validate_field("sampler", "pruner", mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @validate_model(mode="before")
    @classmethod
    def _fill_in_search(cls, data: Any) -> Any:
        """Give each parameter that is not named its default range, which depends on training."""
        if not isinstance(data, Mapping) or data.get("search") == {}:
            return data
        search = data.get("search", {})
        try:
            training = Training.model_validate(data.get("training", {}))
        except ValidationError:
            # The person is told of the training alone: its errors come up again by themselves.
            training = Training()
        if not isinstance(search, Mapping):
            return data
        return {**data, "search": default_search(training) | dict(search)}

    @validate_field("search", mode="before")
    @classmethod
    def _check_search_given(cls, value: Any) -> Any:
        if value == {}:
            raise PydanticCustomError(
                "empty",
                "names no parameter; leave search out for the default ranges, or name one of "
                "{known}",
                {"known": ", ".join(Search.model_fields)},
            )
        return value

    @validate_model(mode="after")
    def _agree_on_learning_rate(self) -> Self:
        """Let a learning rate that is not searched be one value, wherever it was named."""
        fixed = self.search.learning_rate
        if not isinstance(fixed, Fixed) or fixed.root == self.training.learning_rate:
            return self
        if "learning_rate" in self.training.model_fields_set:
            raise PydanticCustomError(
                "learning_rate",
                "search.learning_rate is fixed at {fixed}, but training.learning_rate is {named}; "
                "name one of them",
                {"fixed": fixed.root, "named": self.training.learning_rate},
            )
        self.__dict__["training"] = self.training.model_copy(update={"learning_rate": fixed.root})
        return self

    @validate_model(mode="after")
    def _check_grid(self) -> Self:
        if self.sampler.name != "grid":
            return self
        points = REFERENCE_TRIALS
        size = 1
        for name, parameter in self.search.searched().items():
            if isinstance(parameter, Range) and not isinstance(parameter.low, int):
                raise PydanticCustomError(
                    "grid",
                    "the sampler grid needs a list of choices for every searched parameter, but "
                    "search.{name} is a range",
                    {"name": name},
                )
            size *= len(grid_values(parameter))
        if size > MAX_GRID_POINTS:
            raise PydanticCustomError(
                "grid", "the grid has {size} points, more than can be numbered", {"size": size}
            )
        points += size
        if "trials" not in self.budget.model_fields_set:
            self.__dict__["budget"] = self.budget.model_copy(update={"trials": points})
        if self.budget.trials > points:
            raise PydanticCustomError(
                "grid",
                "the grid has {size} points; with the two reference points ask for at most "
                "{points} trials",
                {"size": size, "points": points},
            )
        return self

    @validate_model(mode="after")
    def _check_reference_points_fit(self) -> Self:
        least = min(REFERENCE_TRIALS, self.budget.trials) * self.training.max_epochs
        if self.budget.trial_epochs is not None and self.budget.trial_epochs < least:
            raise PydanticCustomError(
                "budget",
                "budget.trial_epochs must be at least {least}, so that the reference points can "
                "train for max_epochs, but {given} is given",
                {"least": least, "given": self.budget.trial_epochs},
            )
        return self

    @property
    def first_prunable_epoch(self) -> int:
        """No pruner acts before this epoch, counted from 1."""
        share = 4 if self.pruner.name == "extrapolation" else 3
        return self.pruner.first_epoch or max(1, self.training.max_epochs // share)

    def canonical(self) -> dict[str, Any]:
        """The spec as JSON data, every default filled in: two equal studies give equal data."""
        return self.model_dump(mode="json")


class BudgetChange(_SpecModel):
    """What is to change of a budget; null takes a limit away."""

    model_config = ConfigDict(
        json_schema_extra=_with_computed_defaults("trials", "seconds", "trial_epochs")
    )

    trials: int = Field(
        1,
        ge=1,
        le=100_000,
        description="How many trials; not fewer than there are already.",
        examples=[80],
    )
    seconds: float | None = Field(
        None,
        gt=0,
        le=366 * 86_400,
        description="Wall-clock seconds from the first lease; more than have passed.",
        examples=[3600.0],
    )
    trial_epochs: int | None = Field(
        None,
        ge=1,
        le=10**12,
        description="Epochs of all trials; not fewer than were trained and open trials may take.",
        examples=[3000],
    )


class StudyChange(_SpecModel):
    """What is to change of a live study; what is left out stays."""

    model_config = ConfigDict(json_schema_extra=_with_computed_defaults("budget", "priority"))

    budget: BudgetChange = Field(
        default_factory=BudgetChange,
        description="Its limits.",
        examples=[{"trials": 80}],
    )
    priority: int = Field(
        1, ge=1, le=1000, description="Its weight among the studies.", examples=[3]
    )

    @validate_model(mode="after")
    def _check_given(self) -> Self:
        if not self.given:
            raise PydanticCustomError(
                "change",
                "names nothing to change; known: budget.trials, budget.seconds, "
                "budget.trial_epochs, priority",
            )
        return self

    @property
    def given(self) -> dict[str, Any]:
        """What was named, and nothing else."""
        changes = self.model_dump(exclude_unset=True)
        return {key: value for key, value in changes.items() if value != {}}


def grid_values(parameter: Searched) -> Sequence[float]:
    """Return the points of a parameter on a grid: its choices, or its whole numbers."""
    if isinstance(parameter, Choices):
        return parameter.root
    return range(int(parameter.low), int(parameter.high) + 1)


def parse_spec(data: Any) -> StudySpec:
    """Check a study that came as JSON or YAML data; raise InvalidSpec with every field at fault."""
    if not isinstance(data, Mapping):
        raise InvalidSpec((FieldError("", "a study must be a mapping of fields"),))
    try:
        return StudySpec.model_validate(data)
    except ValidationError as error:
        raise InvalidSpec(tuple(_field_error(detail) for detail in error.errors())) from None


def parse_change(data: Any) -> StudyChange:
    """Check what is to change of a study; raise InvalidSpec with every field at fault."""
    if not isinstance(data, Mapping):
        raise InvalidSpec((FieldError("", "a change must be a mapping of fields"),))
    try:
        return StudyChange.model_validate(data)
    except ValidationError as error:
        raise InvalidSpec(
            tuple(_field_error(detail, _FIELDS_OF_A_CHANGE) for detail in error.errors())
        ) from None


def changed(spec: StudySpec, change: Mapping[str, Any]) -> StudySpec:
    """Return a spec with other limits and another priority; raise InvalidSpec if it cannot be."""
    budget = spec.budget.model_dump() | dict(change.get("budget", {}))
    return parse_spec({**spec.canonical(), **change, "budget": budget})


def parse_text(text: str) -> StudySpec:
    """Check a study written as YAML, of which JSON is a part."""
    return parse_spec(load_yaml(text))


def load_yaml(text: str) -> Any:
    """Read YAML, with numbers as YAML 1.2 and JSON write them; raise InvalidSpec if it is broken.

    PyYAML follows YAML 1.1, where ``1e-4`` is a string.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError, *_BROKEN_TAGS) as error:
        raise InvalidSpec((FieldError("", f"not valid YAML: {_first_line(error)}"),)) from None


_BROKEN_TAGS = (ValueError, LookupError, AttributeError)
"""What PyYAML lets through when a tag such as ``!!int`` stands before something else."""


class _Loader(yaml.SafeLoader):
    """A safe loader that reads ``1e-4`` as a number, and knows no aliases and no field twice."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._values = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._values += 1
        if self._values > MAX_YAML_VALUES:
            raise yaml.YAMLError(f"more than {MAX_YAML_VALUES} values")
        # Nested aliases can make a few bytes stand for gigabytes; a study has no use for them.
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not supported")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            raise ConstructorError(problem="a field is given twice", problem_mark=node.start_mark)
        return mapping


_Loader.yaml_implicit_resolvers = {
    key: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for key, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def _first_line(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    what = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"{what}, line {mark.line + 1}, column {mark.column + 1}" if mark else what


_FIELDS_OF: Mapping[tuple[str, ...], type[BaseModel]] = {
    (): StudySpec,
    ("training",): Training,
    ("search",): Search,
    ("validation",): Validation,
    ("budget",): Budget,
    ("sampler",): Sampler,
    ("pruner",): Pruner,
    ("requires",): Requires,
}

_FIELDS_OF_A_CHANGE: Mapping[tuple[str, ...], type[BaseModel]] = {
    (): StudyChange,
    ("budget",): BudgetChange,
}


def _field_error(
    detail: ErrorDetails, fields_of: Mapping[tuple[str, ...], type[BaseModel]] = _FIELDS_OF
) -> FieldError:
    """Say in plain words what pydantic found, without the union tags that it puts in the way."""
    parts = [str(part) for part in detail["loc"] if part not in PARAMETER_KINDS]
    field = ".".join(parts)
    if detail["type"] == "extra_forbidden":
        return FieldError(field, f"unknown field; {_known_fields(tuple(parts[:-1]), fields_of)}")
    if detail["type"] == "missing":
        return FieldError(field, "is required")
    if detail["type"] == "string_pattern_mismatch":
        return FieldError(field, f"must match {NAME_PATTERN}")
    message = detail["msg"].removeprefix("Input ")
    given = detail.get("input")
    if isinstance(given, str | int | float) and len(str(given)) <= 100:
        message += f" (given: {json.dumps(given)})" if " is given" not in message else ""
    return FieldError(field, message)


def _known_fields(
    parent: tuple[str, ...], fields_of: Mapping[tuple[str, ...], type[BaseModel]]
) -> str:
    if parent[:1] == ("search",) and len(parent) > 1:
        model: type[BaseModel] = Range[float]
    elif parent == ("task", "data"):
        return "known for the data set table: " + ", ".join(TableSettings.model_fields)
    elif parent == ("task",):
        return "known for this model: " + ", ".join(
            [
                *TaskSpec.model_fields,
                *(name for s in MODEL_SETTINGS.values() for name in s.model_fields),
            ]
        )
    else:
        model = fields_of[parent]
    return "known: " + ", ".join(model.model_fields)
