"""What is searched, and over which ranges where the person named none."""

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, Self, TypeVar

from pydantic import ConfigDict, Field
from pydantic import field_validator as validate_field
from pydantic import model_validator as validate_model
from pydantic_core import PydanticCustomError

from regtune.space import (
    ByOptimizer,
    Choices,
    Dimension,
    Fixed,
    IntegerParameter,
    LimitParameter,
    Optimizer,
    Options,
    Parameter,
    Plain,
    Range,
    Searched,
)
from regtune.spec.parts import PartlyUsed, with_computed_defaults
from regtune.spec.shape import MAX_SHAPE_CHARACTERS, MAX_SHAPES, MODEL_PREFIX, write_shape
from regtune.spec.training import (
    MAX_BATCH_SIZE,
    MAX_LEARNING_RATE,
    Decay,
    Training,
    default_learning_rate,
)

_P = TypeVar("_P", bound=Parameter | IntegerParameter | LimitParameter)

BatchSize = Annotated[int, Field(ge=1, le=MAX_BATCH_SIZE)]


class Search(PartlyUsed):
    """What is searched. A strength that is left out gets its default range or fixed value.

    Where `optimizer` is searched, a strength may be another one under each optimizer.
    """

    model_config = ConfigDict(
        # Not until a schema is asked for: the strengths are named by the fields below.
        json_schema_extra=lambda schema: with_computed_defaults(*STRENGTHS)(schema)
    )

    weight_decay: Parameter = Field(
        description="λ₂ ≥ 0. Default: zero or 1e-4…3 (log) if it is decoupled, where a decay below "
        "1 / (learning rate × steps) does nothing; zero or 1e-6…1e-2 (log) if it is coupled.",
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
    max_norm: LimitParameter = Field(
        description="c > 0, the largest norm of the weights that lead into a unit or make up a "
        "filter: larger ones are scaled back to it after each step. 0 is no limit. Default: fixed "
        "at 0.",
        examples=[{"low": 1.0, "high": 5.0, "log": True, "or_zero": True}],
    )
    max_gradient_norm: LimitParameter = Field(
        description="Largest norm of the training loss's gradient, of all parameters together: a "
        "larger one is scaled back to it, before decay and L1 are added. 0 is no limit. Default: "
        "fixed at 0.",
        examples=[{"low": 0.1, "high": 10.0, "log": True, "or_zero": True}],
    )

    input_dropout: Parameter = Field(
        description="Rate p of dropout on the inputs, 0 ≤ p < 1, before the model and apart from "
        "its own sites. Default: fixed at 0.",
        examples=[{"low": 0.0, "high": 0.3}],
    )

    augment_strength: Parameter = Field(
        description="s, 0 ≤ s ≤ 1: how far training images are changed in the ways that "
        "training.augment names. Default: 0…1 if it names any, else fixed at 0.",
        examples=[{"low": 0.0, "high": 1.0}],
    )
    mixup: Parameter = Field(
        description="m, 0 ≤ m ≤ 1: each training row is mixed with another one, inputs and loss, "
        "of which it gets a share that is uniform between 0 and m/2. Default: fixed at 0.",
        examples=[{"low": 0.0, "high": 1.0}],
    )

    optimizer: Options[Optimizer] | None = Field(
        None,
        description="A list of optimizers. Each is a shape of its own, see docs/studies.md. "
        "Default: training.optimizer for all.",
        examples=[["adamw", "sgd"]],
    )
    batch_size: Options[BatchSize] | None = Field(
        None,
        description="A list of batch sizes, each a shape of its own. Default: "
        "training.batch_size for all.",
        examples=[[64, 256]],
    )
    model: dict[str, Options[Any]] = Field(
        default_factory=dict,
        description="Lists of choices for settings of the model, each a shape of its own.",
        examples=[{"hidden": [[64], [256]], "norm": ["batch", "none"]}],
    )

    @validate_field("weight_decay", "l1_lambda", "input_noise", "weight_noise")
    @classmethod
    def _check_strength(cls, parameter: Parameter) -> Parameter:
        return _check_numbers(parameter, lambda value: value >= 0, "must not be negative")

    @validate_field("dropout", "label_smoothing", "input_dropout")
    @classmethod
    def _check_rate(cls, parameter: Parameter) -> Parameter:
        return _check_numbers(parameter, lambda value: 0 <= value < 1, "must be in [0, 1)")

    @validate_field("augment_strength", "mixup")
    @classmethod
    def _check_share(cls, parameter: Parameter) -> Parameter:
        return _check_numbers(parameter, lambda value: 0 <= value <= 1, "must be in [0, 1]")

    @validate_field("max_norm", "max_gradient_norm")
    @classmethod
    def _check_limit(cls, parameter: LimitParameter) -> LimitParameter:
        for part in _parts(parameter):
            if isinstance(part, Range) and part.low <= 0:
                raise PydanticCustomError(
                    "bounds",
                    "a range of limits must begin above 0, but low is {value}; 0 means no limit: "
                    "or_zero: true on a log range adds it",
                    {"value": part.low},
                )
        return _check_numbers(parameter, lambda value: value >= 0, "must not be negative")

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

    @validate_field("model")
    @classmethod
    def _check_settings(cls, settings: dict[str, Options[Any]]) -> dict[str, Options[Any]]:
        for name in settings:
            if not re.fullmatch(SETTING_PATTERN, name):
                raise PydanticCustomError(
                    "setting", "{name} cannot be a setting of a model", {"name": json.dumps(name)}
                )
        return settings

    @validate_model(mode="after")
    def _check_conditions(self) -> Self:
        """Let a strength that differs by optimizer name exactly those that are searched."""
        known = self.optimizer.root if self.optimizer else ()
        for name, parameter in self.parameters().items():
            if isinstance(parameter, ByOptimizer) and set(parameter.root) != set(known):
                raise PydanticCustomError(
                    "condition",
                    "search.{name} is given for {given}, but {known}; name each of them once, or "
                    "one range for all",
                    {
                        "name": name,
                        "given": ", ".join(parameter.root),
                        "known": "search.optimizer has " + ", ".join(known)
                        if known
                        else "search.optimizer has no list",
                    },
                )
        return self

    @validate_model(mode="after")
    def _check_shapes(self) -> Self:
        shapes = math.prod(len(options.root) for options in self.shaping().values())
        if shapes > MAX_SHAPES:
            raise PydanticCustomError(
                "shapes",
                "optimizer, batch_size and model make {shapes} different shapes, each of which "
                "is built by itself; {most} are the most",
                {"shapes": shapes, "most": MAX_SHAPES},
            )
        longest = {
            name: max(options.root, key=lambda value: len(json.dumps(value)))
            for name, options in self.shaping().items()
        }
        if len(write_shape(longest)) > MAX_SHAPE_CHARACTERS:
            raise PydanticCustomError(
                "shapes",
                "the choices of optimizer, batch_size and model take more than {most} characters "
                "together",
                {"most": MAX_SHAPE_CHARACTERS},
            )
        return self

    @validate_model(mode="after")
    def _check_not_empty(self) -> Self:
        if not self.searched():
            raise PydanticCustomError(
                "empty", "nothing to search: make a range or a list of at least one parameter"
            )
        return self

    def parameters(self) -> dict[str, Parameter | IntegerParameter | LimitParameter]:
        """All strengths by name, in the order in which they are shown."""
        return {name: getattr(self, name) for name in STRENGTHS}

    def shaping(self) -> dict[str, Options[Any]]:
        """What is searched and makes shapes, by name; a model's settings as ``model.…``."""
        named = {"optimizer": self.optimizer, "batch_size": self.batch_size}
        return {name: options for name, options in named.items() if options is not None} | {
            f"{MODEL_PREFIX}{name}": options for name, options in self.model.items()
        }

    def searched(self) -> tuple[str, ...]:
        """The names of all that is searched, in the order in which they are shown."""
        return tuple(dict.fromkeys(dimension.name for dimension in self.dimensions()))

    def dimensions(self) -> tuple[Dimension, ...]:
        """What is searched, as Optuna sees it; the optimizer before what depends on it."""
        made = [Dimension(name, options) for name, options in self.shaping().items()]
        for name, parameter in self.parameters().items():
            if isinstance(parameter, ByOptimizer):
                made += [
                    Dimension(name, part, optimizer)
                    for optimizer, part in parameter.root.items()
                    if not isinstance(part, Fixed)
                ]
            elif not isinstance(parameter, Fixed):
                made.append(Dimension(name, parameter))
        return tuple(made)

    @property
    def conditional(self) -> tuple[str, ...]:
        """The names of the strengths that differ by optimizer and are searched."""
        return tuple(dict.fromkeys(d.name for d in self.dimensions() if d.optimizer is not None))

    def under(self, optimizer: str) -> dict[str, Plain]:
        """All strengths by name, as the trials of an optimizer see them."""
        return {
            name: parameter.root[optimizer] if isinstance(parameter, ByOptimizer) else parameter
            for name, parameter in self.parameters().items()
        }

    def _unused(self) -> tuple[str, ...]:
        return tuple(name for name in SHAPING if not getattr(self, name))


SHAPING = ("optimizer", "batch_size", "model")
"""The fields of a search that make shapes."""

STRENGTHS: tuple[str, ...] = tuple(name for name in Search.model_fields if name not in SHAPING)
"""The fields of a search that change no shape."""

SETTING_PATTERN = r"[A-Za-z_][A-Za-z0-9_]{0,99}"


def _check_numbers(parameter: _P, is_right: Callable[[float], bool], what_is_right: str) -> _P:
    for value in parameter.numbers():
        if not is_right(value):
            raise PydanticCustomError(
                "bounds", "{what}, but {value} is given", {"what": what_is_right, "value": value}
            )
    return parameter


def _parts(parameter: Parameter | IntegerParameter | LimitParameter) -> Iterable[Plain]:
    return parameter.root.values() if isinstance(parameter, ByOptimizer) else (parameter,)


def _check_has_no_zero(parameter: Parameter | IntegerParameter, name: str) -> None:
    if any(isinstance(part, Range) and part.or_zero for part in _parts(parameter)):
        raise PydanticCustomError(
            "parameter", "{name} has no zero; leave or_zero out", {"name": name}
        )


def default_search(training: Training, optimizers: Sequence[str] = ()) -> dict[str, Any]:
    """Return the default ranges and fixed values for a training.

    Where several ``optimizers`` are searched, what differs between them is given for each.

    A decoupled decay λ acts over 1 / (η·λ) steps (Wang & Aitchison 2024, arXiv 2405.13698), so one
    below 1 / (η · steps of the whole training) does nothing; the range 1e-6…1e-2 that is usual
    for coupled decay would mostly be off on small data. Proximal L1 shrinks by η·λ₁ each step
    whatever the optimizer; the subgradient is rescaled by Adam and needs λ₁ far smaller.
    """
    known = optimizers or (training.optimizer,)
    proximal = training.l1 == "proximal"
    own_rate = "learning_rate" in training.model_fields_set
    return {
        "weight_decay": for_each(known, lambda name: _decay_range(training.decay_of(name))),
        "dropout": {"low": 0.0, "high": 0.7},
        "l1_lambda": zero_or(1e-4, 0.3) if proximal else zero_or(1e-7, 1e-3),
        "patience": _patience_range(training.max_epochs),
        "learning_rate": training.learning_rate
        if own_rate
        else for_each(known, default_learning_rate),
        "label_smoothing": 0.0,
        "input_noise": 0.0,
        "weight_noise": 0.0,
        "max_norm": 0.0,
        "max_gradient_norm": 0.0,
        "input_dropout": 0.0,
        "augment_strength": {"low": 0.0, "high": 1.0} if training.augment else 0.0,
        "mixup": 0.0,
    }


def for_each(optimizers: Sequence[str], default: Callable[[str], Any]) -> Any:
    """Return the default of each optimizer, or of all where it is the same."""
    of_each = {optimizer: default(optimizer) for optimizer in optimizers}
    first, *others = of_each.values()
    return of_each if any(other != first for other in others) else first


def _decay_range(form: Decay) -> dict[str, Any]:
    return zero_or(1e-4, 3.0) if form == "decoupled" else zero_or(1e-6, 1e-2)


def zero_or(low: float, high: float) -> dict[str, Any]:
    """Return a log range with a real zero."""
    return {"low": low, "high": high, "log": True, "or_zero": True}


def _patience_range(max_epochs: int) -> dict[str, Any]:
    low = max(1, max_epochs // 10)
    return {"low": low, "high": max(low + 1, max_epochs // 2)}


def grid_values(parameter: Searched | Options[Any]) -> Sequence[Any]:
    """Return the points of a parameter on a grid: its choices, or its whole numbers."""
    if isinstance(parameter, Options):
        return parameter.labels
    if isinstance(parameter, Choices):
        return parameter.root
    return range(int(parameter.low), int(parameter.high) + 1)
