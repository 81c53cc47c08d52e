"""What several answers of the API have in common."""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from service.records import Result

Measure = float | None
"""A figure that was measured; null where it is not a finite number, which JSON cannot write."""

StudyState = Literal["active", "paused", "stopping", "completed", "stopped", "cancelled", "failed"]
TrialState = Literal["waiting", "running", "complete", "pruned", "failed", "cancelled"]
TrialKind = Literal["baseline", "default", "suggested"]

PARAMS_EXAMPLE = {
    "weight_decay": 0.31,
    "dropout": 0.22,
    "l1_lambda": 0.0,
    "patience": 12,
    "learning_rate": 0.001,
    "label_smoothing": 0.0,
    "input_noise": 0.0,
    "weight_noise": 0.0,
    "max_norm": 0.0,
    "max_gradient_norm": 0.0,
    "input_dropout": 0.0,
    "augment_strength": 0.0,
    "mixup": 0.0,
}

Params = dict[str, Any]
"""Of JSON's values; to ask pydantic whether they are costs a page of trials a fifth of its time."""


class Document(BaseModel):
    """An answer, or a part of one."""

    model_config = ConfigDict(frozen=True, from_attributes=True, ser_json_inf_nan="null")


SPREAD = (
    "Standard deviation of the validation loss over the trial's members; null where it has only "
    "one."
)
TIMESCALE = (
    "Epochs over which a decoupled decay acts on a weight: 1 / (learning rate × weight decay × "
    "steps per epoch). Unlike the decay it carries over to other set-ups (Wang & Aitchison 2024, "
    "arXiv 2405.13698). Null without decay, where it is coupled, and until a worker has built the "
    "model."
)


class TrialResult(Document):
    """What a complete trial measured, all at its best weights.

    Where a trial has several members (folds × repeats), each figure is their mean.
    """

    number: int = Field(description="The trial's number, from 0.", examples=[17])
    kind: TrialKind = Field(
        description="baseline: everything off; default: common strengths; suggested: by the "
        "sampler.",
        examples=["suggested"],
    )
    params: Params = Field(
        description="The values that were trained with, zeros and fixed ones included.",
        examples=[PARAMS_EXAMPLE],
    )
    decay_timescale_epochs: Measure = Field(description=TIMESCALE, examples=[89.6])
    validation_loss: Measure = Field(
        description="Loss on the validation rows, no penalty in it; the mean over the trial's "
        "members where it has several. It alone decides which trial is best. Null if it is not a "
        "finite number.",
        examples=[0.0731],
    )
    validation_loss_spread: Measure = Field(description=SPREAD, examples=[0.0042])
    validation_score: Measure = Field(
        description="Score on the validation rows; `model.score` of the study says which.",
        examples=[0.981],
    )
    test_loss: Measure = Field(
        description="Loss on the test rows, computed once and never used for choosing; null if it "
        "is not a finite number.",
        examples=[0.0912],
    )
    test_score: Measure = Field(
        description="Score on the test rows, computed once and never used for choosing.",
        examples=[0.9787],
    )
    epoch: int = Field(description="Epoch of the best weights, from 1.", examples=[31])

    @classmethod
    def of(cls, result: Result) -> Self:
        """Return the document of a result."""
        return cls.model_validate(result)

    @classmethod
    def maybe(cls, result: Result | None) -> Self | None:
        """Return the document of a result, if there is one."""
        return None if result is None else cls.of(result)
