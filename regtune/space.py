"""The search space: what a parameter may be, and how Optuna's samplers see it.

A parameter is a range, a list of choices, or a fixed value. A range with ``or_zero`` holds a real
zero beside its log-uniform values. To a sampler it is one parameter still: the log range is
extended by one decade below ``low``, and whatever falls there is trained as exactly zero.

Where the optimizer is searched, a parameter may be another one under each: Optuna sees as many
parameters, ``weight_decay[adamw]`` and ``weight_decay[sgd]``, of which a trial has one.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, isfinite
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar, get_args

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from pydantic import BaseModel, ConfigDict, Discriminator, Field, RootModel, Strict, Tag
from pydantic import model_validator as validate_model
from pydantic_core import PydanticCustomError

Number = TypeVar("Number", int, float)
Value = TypeVar("Value")

Optimizer = Literal["adam", "adamw", "sgd", "rmsprop"]

OR_ZERO_DECADES = 1
"""How many decades below ``low`` stand for zero."""

MAX_CHOICES = 1000

MAX_OPTIONS = 64
MAX_OPTION_CHARACTERS = 500
"""Of the JSON text of a choice."""


class Range(BaseModel, Generic[Number]):
    """From ``low`` to ``high``, both included."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    _instead: ClassVar[str] = "a linear range can start at 0"

    low: Number = Field(description="Smallest value, included.", examples=[5])
    high: Number = Field(description="Largest value, included.", examples=[25])
    log: bool = Field(
        False, description="Search on a logarithmic scale; needs low > 0.", examples=[False]
    )
    or_zero: bool = Field(
        False,
        description="Also try exactly 0, which switches the parameter off; needs log: true "
        "(a linear range can simply start at 0).",
        examples=[False],
    )

    @validate_model(mode="after")
    def _check(self) -> "Range[Number]":
        if self.low >= self.high:
            raise _invalid(f"low must be below high, but {self.low:g} ≥ {self.high:g}")
        if self.log and self.low <= 0:
            raise _invalid(f"log: true needs low > 0, but low is {self.low:g}")
        if self.or_zero and not self.log:
            raise _invalid(f"or_zero: true needs log: true; {self._instead}")
        if self.or_zero and not (self._bottom > 0 and isfinite(self._top)):
            raise _invalid("low or high is too extreme: a decade beyond stands for zero")
        return self

    def numbers(self) -> tuple[float, ...]:
        """All the bounds, for checking them against what the parameter may be."""
        return (self.low, self.high)

    def distribution(self) -> BaseDistribution:
        """How Optuna sees it."""
        if isinstance(self.low, int):
            return IntDistribution(self.low, int(self.high), log=self.log)
        return FloatDistribution(self._bottom, self.high, log=self.log)

    def used(self, suggested: float) -> float:
        """The value that is trained when a sampler suggests ``suggested``."""
        return 0.0 if self.or_zero and suggested < self.low else suggested

    def lowest(self) -> float:
        """What to suggest for as little as this range allows: its zero where it has one."""
        return self._bottom

    def highest(self) -> float:
        """What to suggest for as much as this range allows."""
        return self.high

    def nearest(self, value: float) -> float:
        """What to suggest to come as near to ``value`` as this range allows."""
        if self.or_zero and value == 0:
            return self._bottom
        return min(max(value, self.low), self.high)

    @property
    def _bottom(self) -> float:
        return self.low / 10**OR_ZERO_DECADES if self.or_zero else self.low

    @property
    def _top(self) -> float:
        return self.high


class Choices(RootModel[tuple[Number, ...]], Generic[Number]):
    """One of these values."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)

    root: Annotated[tuple[Number, ...], Strict(False), Field(min_length=1, max_length=MAX_CHOICES)]

    @validate_model(mode="after")
    def _check(self) -> "Choices[Number]":
        if len(set(self.root)) < len(self.root):
            raise _invalid("each choice may stand in the list only once")
        return self

    def numbers(self) -> tuple[float, ...]:
        """All the choices, for checking them against what the parameter may be."""
        return self.root

    def distribution(self) -> BaseDistribution:
        """How Optuna sees it."""
        return CategoricalDistribution(self.root)

    def used(self, suggested: float) -> float:
        """The value that is trained when a sampler suggests ``suggested``: the same."""
        return suggested

    def lowest(self) -> float:
        """The smallest choice."""
        return min(self.root)

    def highest(self) -> float:
        """The largest choice."""
        return max(self.root)

    def nearest(self, value: float) -> float:
        """The choice nearest to ``value``."""
        return min(self.root, key=lambda choice: abs(choice - value))


class LimitRange(Range[float]):
    """A range of a limit, which does the less the higher it is, and of which 0 means none at all.

    To a sampler no limit therefore lies above ``high``: with ``or_zero`` the log range is extended
    by one decade there.
    """

    _instead = "or a list of limits, in which 0 means none"

    def distribution(self) -> BaseDistribution:
        """How Optuna sees it."""
        return FloatDistribution(self.low, self._top, log=self.log)

    def used(self, suggested: float) -> float:
        """The limit that is trained with when a sampler suggests ``suggested``."""
        return 0.0 if self.or_zero and suggested > self.high else suggested

    def lowest(self) -> float:
        """What to suggest for as little as this range allows: its highest limit, or none."""
        return self._top

    def highest(self) -> float:
        """What to suggest for as much as this range allows."""
        return self.low

    def nearest(self, value: float) -> float:
        """What to suggest to come as near to ``value`` as this range allows."""
        return self._top if value == 0 else min(max(value, self.low), self.high)

    @property
    def _top(self) -> float:
        return self.high * 10**OR_ZERO_DECADES if self.or_zero else self.high


class LimitChoices(Choices[float]):
    """One of these limits, of which 0 means none."""

    def lowest(self) -> float:
        """No limit if that is a choice, the largest otherwise."""
        return 0.0 if 0 in self.root else max(self.root)

    def highest(self) -> float:
        """The smallest limit."""
        return min(self.root, key=lambda choice: choice or inf)

    def nearest(self, value: float) -> float:
        """The choice nearest to ``value``."""
        return self.lowest() if value == 0 else super().nearest(value)


class Fixed(RootModel[Number], Generic[Number]):
    """Always this value: not searched, and no parameter to Optuna."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)

    def numbers(self) -> tuple[float, ...]:
        """The value, for checking it against what the parameter may be."""
        return (self.root,)


class Options(RootModel[tuple[Value, ...]], Generic[Value]):
    """One of these values, of which none is more or less than another."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)

    root: Annotated[tuple[Value, ...], Strict(False), Field(min_length=1, max_length=MAX_OPTIONS)]

    @validate_model(mode="before")
    @classmethod
    def _check_is_list(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple | Options):
            raise _invalid("must be a list of choices")
        return value

    @validate_model(mode="after")
    def _check(self) -> "Options[Value]":
        try:
            texts = [json.dumps(value, allow_nan=False) for value in self.root]
        except (ValueError, TypeError, RecursionError):
            raise _invalid("each choice must be something that JSON can write") from None
        if any(len(text) > MAX_OPTION_CHARACTERS for text in texts):
            raise _invalid(f"a choice may have {MAX_OPTION_CHARACTERS} characters at most")
        if len(set(self.labels)) < len(self.root):
            raise _invalid("each choice may stand in the list only once")
        return self

    @property
    def labels(self) -> tuple[Any, ...]:
        """What Optuna calls the values: itself each, or its JSON text where Optuna has no such."""
        return tuple(_label(value) for value in self.root)

    def distribution(self) -> BaseDistribution:
        """How Optuna sees it."""
        return CategoricalDistribution(self.labels)

    def label(self, value: Value) -> Any:
        """What to suggest for ``value``."""
        return self.labels[self.root.index(value)]

    def used(self, suggested: Any) -> Value:
        """The value that is trained when a sampler suggests ``suggested``."""
        return self.root[self.labels.index(suggested)]


def _label(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return json.dumps(value, separators=(",", ":"), sort_keys=True)


def _kind(value: Any) -> str | None:
    if isinstance(value, Mapping | Range):
        return "range"
    if isinstance(value, list | tuple | Choices):
        return "choices"
    if isinstance(value, int | float | Fixed) and not isinstance(value, bool):
        return "fixed"
    return None


def _kind_or_conditional(value: Any) -> str | None:
    by_optimizer = isinstance(value, Mapping) and not value.keys().isdisjoint(get_args(Optimizer))
    return "by_optimizer" if by_optimizer or isinstance(value, ByOptimizer) else _kind(value)


PARAMETER_KINDS = ("range", "choices", "fixed", "by_optimizer")

_KINDS = {
    "custom_error_type": "parameter",
    "custom_error_message": "must be a range like {low: 0.1, high: 0.5}, a list of choices, "
    "or one number",
}

_Float = Annotated[
    Annotated[Range[float], Tag("range")]
    | Annotated[Choices[float], Tag("choices")]
    | Annotated[Fixed[float], Tag("fixed")],
    Discriminator(_kind, **_KINDS),
]
_Integer = Annotated[
    Annotated[Range[int], Tag("range")]
    | Annotated[Choices[int], Tag("choices")]
    | Annotated[Fixed[int], Tag("fixed")],
    Discriminator(_kind, **_KINDS),
]
_Limit = Annotated[
    Annotated[LimitRange, Tag("range")]
    | Annotated[LimitChoices, Tag("choices")]
    | Annotated[Fixed[float], Tag("fixed")],
    Discriminator(_kind, **_KINDS),
]


class ByOptimizer(RootModel[dict[str, Value]], Generic[Value]):
    """A parameter of its own for each optimizer that is searched."""

    model_config = ConfigDict(frozen=True, strict=True)

    def numbers(self) -> tuple[float, ...]:
        """All the numbers of all of them, for checking them against what the parameter may be."""
        # Value is bound by no class, but by unions of parameters, all of which have numbers.
        return tuple(number for part in self.root.values() for number in part.numbers())  # type: ignore[attr-defined]


Parameter = Annotated[
    Annotated[Range[float], Tag("range")]
    | Annotated[Choices[float], Tag("choices")]
    | Annotated[Fixed[float], Tag("fixed")]
    | Annotated[ByOptimizer[_Float], Tag("by_optimizer")],
    Discriminator(_kind_or_conditional, **_KINDS),
]
"""A parameter that takes real values."""

IntegerParameter = Annotated[
    Annotated[Range[int], Tag("range")]
    | Annotated[Choices[int], Tag("choices")]
    | Annotated[Fixed[int], Tag("fixed")]
    | Annotated[ByOptimizer[_Integer], Tag("by_optimizer")],
    Discriminator(_kind_or_conditional, **_KINDS),
]
"""A parameter that takes whole numbers."""

LimitParameter = Annotated[
    Annotated[LimitRange, Tag("range")]
    | Annotated[LimitChoices, Tag("choices")]
    | Annotated[Fixed[float], Tag("fixed")]
    | Annotated[ByOptimizer[_Limit], Tag("by_optimizer")],
    Discriminator(_kind_or_conditional, **_KINDS),
]
"""A parameter that takes limits, of which 0 means none."""

Searched = Range[float] | Range[int] | Choices[float] | Choices[int]
"""A strength that is not fixed."""

Plain = Searched | Fixed[float] | Fixed[int]
"""A strength as the trials of one optimizer see it."""


@dataclass(frozen=True)
class Dimension:
    """A parameter as Optuna sees it; with ``optimizer``, only that optimizer's trials have it."""

    name: str
    parameter: Searched | Options[Any]
    optimizer: str | None = None

    @property
    def label(self) -> str:
        """Its name in Optuna's tables."""
        return self.name if self.optimizer is None else f"{self.name}[{self.optimizer}]"

    def belongs_to(self, optimizer: str) -> bool:
        """Whether the trials of an optimizer have it."""
        return self.optimizer in (None, optimizer)


def plain_name(label: str) -> str:
    """Return the name of a parameter that Optuna's tables know by ``label``."""
    return label.partition("[")[0]


def _invalid(message: str) -> PydanticCustomError:
    # Braces in a message would be read as fields of a template.
    return PydanticCustomError("parameter", "{message}", {"message": message})
