"""How each trial is trained."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import ConfigDict, Field, PrivateAttr, Strict, ValidationInfo
from pydantic import field_validator as validate_field
from pydantic import model_validator as validate_model
from pydantic_core import PydanticCustomError

from regtune.space import Optimizer
from regtune.spec.parts import PartlyUsed, with_computed_defaults

MAX_LEARNING_RATE = 100
MAX_BATCH_SIZE = 1_000_000

Decay = Literal["coupled", "decoupled"]
Precision = Literal["float32", "tf32", "bf16"]
Augmentation = Literal["shift", "flip", "rotation", "erasing"]

AUGMENTATIONS: tuple[str, ...] = get_args(Augmentation)


def default_decay(optimizer: str) -> Decay:
    """Return how weight decay acts in an optimizer for which it is not said."""
    return "decoupled" if optimizer == "adamw" else "coupled"


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

    model_config = ConfigDict(json_schema_extra=with_computed_defaults("decay", "learning_rate"))

    optimizer: Optimizer = Field(
        "adamw",
        description="How gradients move the weights; adamw is adam with a decoupled decay.",
        examples=["adamw"],
    )
    decay: Decay = Field(
        "coupled",
        description="coupled: λ₂·w is added to the gradient, as (λ₂/2)·‖w‖² in the loss would; "
        "decoupled: each step first shrinks the weights by the factor 1 - η·λ₂, apart from the "
        "gradient. Default: decoupled for adamw, which knows no other, coupled for the others; "
        "each its own where search.optimizer has several.",
        examples=["decoupled"],
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
    averaging: Literal["none", "swa"] = Field(
        "none",
        description="swa (stochastic weight averaging): validated and tested is the equal mean of "
        "the weights at the ends of the epochs since averaging_start, with the statistics of batch "
        "norms found anew in the training rows.",
        examples=["swa"],
    )
    averaging_start: float = Field(
        0.75,
        ge=0,
        lt=1,
        description="Share of max_epochs after which averaging begins; until then the weights "
        "themselves are validated. Needs averaging: swa.",
        examples=[0.75],
    )
    penalized: Literal["weights", "all"] = Field(
        "weights",
        description="What weight decay and L1 act on. weights: parameters of two or more "
        "dimensions outside normalization layers; all: biases and normalization parameters too.",
        examples=["weights"],
    )
    augment: Annotated[tuple[Augmentation, ...], Strict(False)] = Field(
        (),
        description="How training images are changed at random, each by search.augment_strength: "
        "shift, flip (left to right), rotation, erasing (of a rectangle).",
        examples=[["shift", "rotation"]],
    )
    precision: Precision = Field(
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

    _leaves_decay: bool = PrivateAttr(False)

    # Only what is named comes here: a default is not validated.
    @validate_field("averaging_start")
    @classmethod
    def _check_averages(cls, value: float, info: ValidationInfo) -> float:
        if info.data.get("averaging") == "none":
            raise PydanticCustomError(
                "averaging",
                "says when averaging begins, and there is none; leave it out, or take "
                "averaging: swa",
            )
        return value

    @validate_field("augment")
    @classmethod
    def _check_each_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            raise PydanticCustomError("augment", "each may stand in the list only once")
        return value

    @validate_field("decay")
    @classmethod
    def _check_adamw_decays_apart(cls, value: str, info: ValidationInfo) -> str:
        if value == "coupled" and info.data.get("optimizer") == "adamw":
            raise PydanticCustomError(
                "decay",
                "the decay of adamw is decoupled; leave decay out, or take optimizer: adam for a "
                "coupled one",
            )
        return value

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
    def _fill_in_what_the_optimizer_decides(self) -> Self:
        self.__dict__["decay"] = self.decay_of(self.optimizer)
        if "learning_rate" not in self.model_fields_set:
            self.__dict__["learning_rate"] = default_learning_rate(self.optimizer)
        return self

    def decay_of(self, optimizer: str) -> Decay:
        """Return how weight decay acts under an optimizer: as is said, or as is usual for it."""
        return self.decay if "decay" in self.model_fields_set else default_decay(optimizer)

    def with_searched_optimizer(self) -> Self:
        """Return it as it is written where the optimizer is searched.

        A decay that is not named is each optimizer's own then, so it is not written: read again,
        it would be that of all.
        """
        copy = self.model_copy()
        copy._leaves_decay = "decay" not in self.model_fields_set
        return copy

    def shaped(self, values: Mapping[str, Any]) -> Self:
        """Return it with the optimizer and the batch size of a shape."""
        copy = self.model_copy(update=values)
        copy.__dict__["decay"] = self.decay_of(copy.optimizer)
        return copy

    def _unused(self) -> tuple[str, ...]:
        of_sgd = () if self.optimizer == "sgd" else ("momentum", "nesterov")
        of_swa = () if self.averaging == "swa" else ("averaging_start",)
        return of_sgd + of_swa + (("decay",) if self._leaves_decay else ())
