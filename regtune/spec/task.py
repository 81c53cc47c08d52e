"""What is trained: a data set and a model, with the settings that can be checked unseen."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo
from pydantic import field_validator as validate_field
from pydantic import model_validator as validate_model

from regtune.spec.datasets import DATASET_SETTINGS
from regtune.spec.models import MODEL_SETTINGS

ScoreName = Literal["accuracy", "balanced_accuracy", "log_loss", "auroc", "r2", "rmse"]
CLASSIFICATION_SCORES: tuple[ScoreName, ...] = (
    "accuracy",
    "balanced_accuracy",
    "log_loss",
    "auroc",
)
REGRESSION_SCORES: tuple[ScoreName, ...] = ("r2", "rmse")


class TaskSpec(BaseModel):
    """What is trained: a data set and a model; every further field is a setting of the model."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, allow_inf_nan=False)

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
    model: str = Field(
        description="Name of the model, as a worker has it installed.",
        examples=["mlp", "cnn", "resnet18", "tabular_resnet"],
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
