"""How each trial is trained."""

from typing import Any, Literal, Self

from pydantic import ConfigDict, Field, ValidationInfo
from pydantic import field_validator as validate_field
from pydantic import model_validator as validate_model
from pydantic_core import PydanticCustomError

from regtune.space import Optimizer
from regtune.spec.parts import PartlyUsed, with_computed_defaults

MAX_LEARNING_RATE = 100
MAX_BATCH_SIZE = 1_000_000


def default_learning_rate(optimizer: str) -> float:
    """Return the step size of an optimizer for which none is named."""
    return 0.01 if optimizer == "sgd" else 0.001


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """Return how many steps an epoch takes.

    No batch is of a single row, on which batch norm cannot train, unless single rows are asked for.
    """
    steps = -(-rows // batch_size)
    return max(1, min(steps, rows // 2)) if batch_size > 1 else steps


class Training(PartlyUsed):
    """How each trial is trained; the same for all, but for what `search` says."""

    model_config = ConfigDict(json_schema_extra=with_computed_defaults("learning_rate"))

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
    batch_size: int = Field(
        128, ge=1, le=MAX_BATCH_SIZE, description="Rows per step.", examples=[128]
    )
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
            self.__dict__["learning_rate"] = default_learning_rate(self.optimizer)
        return self

    def _unused(self) -> tuple[str, ...]:
        return () if self.optimizer == "sgd" else ("momentum", "nesterov")
