"""What is trained: a data set and a model, with the settings that can be checked unseen."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationInfo
from pydantic import field_validator as validate_field
from pydantic import model_validator as validate_model

from regtune.spec.parts import SpecModel

ScoreName = Literal["accuracy", "balanced_accuracy", "log_loss", "r2", "rmse"]
CLASSIFICATION_SCORES: tuple[ScoreName, ...] = ("accuracy", "balanced_accuracy", "log_loss")
REGRESSION_SCORES: tuple[ScoreName, ...] = ("r2", "rmse")


class MlpSettings(SpecModel):
    """Settings of the model ``mlp``: linear, norm, ReLU and dropout per hidden layer."""

    hidden: Annotated[
        tuple[Annotated[int, Field(ge=1, le=65_536)], ...], Strict(False), Field(max_length=64)
    ] = Field((128,), description="Width of each hidden layer.", examples=[[128], [512, 512]])
    norm: Literal["batch", "layer", "none"] = Field(
        "batch", description="Normalization before each ReLU.", examples=["batch"]
    )


MODEL_SETTINGS: Mapping[str, type[BaseModel]] = {"mlp": MlpSettings}
"""The settings of models that can be checked without importing the model."""


class NoSettings(SpecModel):
    """Settings of a data set that has none."""


ColumnNames = Annotated[tuple[str, ...], Strict(False), Field(max_length=10_000)]


class TableSettings(SpecModel):
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

REGRESSION_DATASETS = frozenset({"diabetes"})
"""Those of them in which a number is predicted, whatever their settings."""


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
