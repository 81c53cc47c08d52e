"""What may change of a live study."""

from typing import Any, Self

from pydantic import ConfigDict, Field
from pydantic import model_validator as validate_model
from pydantic_core import PydanticCustomError

from regtune.spec.parts import SpecModel, with_computed_defaults
from regtune.spec.study import MOST_TRIALS


class BudgetChange(SpecModel):
    """What is to change of a budget; null takes the limit of seconds or trial-epochs away."""

    model_config = ConfigDict(
        json_schema_extra=with_computed_defaults("trials", "seconds", "trial_epochs")
    )

    trials: int = Field(
        1,
        ge=1,
        le=MOST_TRIALS,
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


class StudyChange(SpecModel):
    """What is to change of a live study; what is left out stays."""

    model_config = ConfigDict(json_schema_extra=with_computed_defaults("budget", "priority"))

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
