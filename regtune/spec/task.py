"""What is trained: a task, or a data set and a model, as far as it can be checked unseen."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
)
from pydantic import field_validator as validate_field
from pydantic import model_validator as validate_model
from pydantic_core import PydanticCustomError

from regtune.spec.datasets import DATASET_SETTINGS
from regtune.spec.models import MODEL_SETTINGS
from regtune.spec.parts import PartlyUsed

ScoreName = Literal["accuracy", "balanced_accuracy", "log_loss", "auroc", "r2", "rmse"]
CLASSIFICATION_SCORES: tuple[ScoreName, ...] = (
    "accuracy",
    "balanced_accuracy",
    "log_loss",
    "auroc",
)
REGRESSION_SCORES: tuple[ScoreName, ...] = ("r2", "rmse")


class Measured(BaseModel):
    """What every task has in common; every further field is a setting of its model."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, allow_inf_nan=False)

    score: ScoreName | None = Field(
        None,
        description="The score beside the loss: accuracy, balanced_accuracy, log_loss or, of two "
        "classes, auroc of a classification, r2 or rmse of a regression. It chooses nothing. "
        "Default: accuracy or r2, or the task's own.",
        examples=["balanced_accuracy"],
    )
    class_weights: Literal["none", "balanced"] = Field(
        "none",
        description="balanced: each row's cross-entropy counts rows / (classes × rows of its "
        "class) times, in training and in the validation and test loss.",
        examples=["balanced"],
    )

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the model, or of the task that has one."""
        return dict(self.model_extra or {})

    @property
    def schema_of_settings(self) -> type[BaseModel] | None:
        """What its settings may be; None if only a worker knows that."""
        return None

    def with_settings(self, changes: Mapping[str, Any]) -> Self:
        """Return it with some settings changed, and without those that then have no meaning.

        Raises ValidationError where their schema is known and refuses them.
        """
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        settings = {**self.settings, **changes}
        schema = self.schema_of_settings
        unused = schema.unused_in(settings) if schema and issubclass(schema, PartlyUsed) else ()
        idle = set(unused) - changes.keys()
        return self.model_validate(
            fields | {name: value for name, value in settings.items() if name not in idle}
        )


class NamedTask(Measured):
    """What is trained: a task that has data and model; every further field is a setting of it."""

    name: str = Field(
        description="Name of the task, as a worker has it installed or configured.",
        examples=["waves"],
        max_length=100,
    )

    @validate_model(mode="after")
    def _check_is_alone(self) -> Self:
        """Refuse what is meant for a task of two parts: it would pass for a setting."""
        strange = [part for part in ("dataset", "data", "model") if part in self.settings]
        if strange:
            raise PydanticCustomError(
                "named_task",
                "the task {name} has data and model of its own; leave {strange} out",
                {"name": self.name, "strange": " and ".join(strange)},
            )
        return self

    def __str__(self) -> str:
        return f"the task {self.name!r}"


class TaskSpec(Measured):
    """What is trained: a data set and a model; every further field is a setting of the model."""

    dataset: str = Field(
        description="Name of the data set, as a worker has it installed.",
        examples=["digits", "mnist", "cifar10", "table", "image_folder"],
        max_length=100,
    )
    data: dict[str, Any] = Field(
        default_factory=dict,
        validate_default=True,
        description="The data set's own settings.",
        examples=[{"path": "adult.csv", "target": "income"}],
    )
    model: str = Field(
        description="Name of the model, as a worker has it installed.",
        examples=["mlp", "cnn", "resnet18", "tabular_resnet"],
        max_length=100,
    )

    def __str__(self) -> str:
        return f"the data set {self.dataset!r} with the model {self.model!r}"

    @property
    def schema_of_settings(self) -> type[BaseModel] | None:
        """What its model's settings may be; None if only a worker knows that."""
        return MODEL_SETTINGS.get(self.model)

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


NO_SETTINGS = frozenset({*NamedTask.model_fields, *TaskSpec.model_fields})
"""Names that mean something else in a task, so that no setting can be called by them."""

TASK_KINDS = ("named task", "pair")


def _kind(data: Any) -> str:
    named = isinstance(data, NamedTask) or (isinstance(data, Mapping) and "name" in data)
    return TASK_KINDS[0 if named else 1]


def from_name(data: Any) -> Any:
    """Return a task as it is when only its name was posted; anything else as it is."""
    return {"name": data} if isinstance(data, str) else data


AnyTask = Annotated[
    Annotated[NamedTask, Tag(TASK_KINDS[0])] | Annotated[TaskSpec, Tag(TASK_KINDS[1])],
    Discriminator(_kind),
    BeforeValidator(from_name),
]
"""A task by its name, or a data set and a model by theirs."""
