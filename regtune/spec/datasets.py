"""The settings of the built-in data sets, checked where no data set is installed."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, Strict, ValidationInfo
from pydantic import field_validator as validate_field
from pydantic_core import PydanticCustomError

from regtune.spec.parts import PartlyUsed, SpecModel


class NoSettings(SpecModel):
    """Settings of a data set that has none."""


def _test_fraction() -> Any:
    return Field(
        0.2,
        gt=0,
        lt=1,
        description="Share of the rows in path that are the test rows: stratified, the same for "
        "every study.",
        examples=[0.2],
    )


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
    test_fraction: float = _test_fraction()
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

    def faults(self) -> Iterator[tuple[str, str]]:
        """Yield the settings by which no table can be read; a stored study may have some."""
        if not self.delimiter.isascii() or self.delimiter in '\0\r\n"':
            yield "delimiter", "must be an ASCII character, but no quotation mark or end of a line"
        if self.target in self.ignore:
            yield "ignore", f"{self.target!r} is the target"

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """Yield the settings that nobody can mean so, ``faults`` included."""
        yield from self.faults()
        for name in self.categorical:
            if name in self.numeric:
                yield "categorical", f"{name!r} is named under numeric as well"


class ImageFolderSettings(SpecModel):
    """Settings of ``image_folder``: a folder with a folder of images for each class."""

    path: str = Field(
        max_length=2000,
        description="Folder of the training rows, with a folder for each class: under a root that "
        "the worker's own REGTUNE_DATA_ROOTS names, or relative to its data folder.",
        examples=["flowers/train"],
    )
    test_path: str | None = Field(
        None,
        max_length=2000,
        description="Folder of the test rows, with the same classes. Default: test_fraction of the "
        "rows in path.",
        examples=["flowers/test"],
    )
    test_fraction: float = _test_fraction()
    size: int = Field(
        32,
        ge=1,
        le=1024,
        description="Height and width to which images are brought: the shorter side is resized to "
        "it, and the middle is cut out.",
        examples=[32],
    )
    channels: Literal[1, 3] = Field(
        3, description="3 for colour, 1 for brightness alone.", examples=[3]
    )


class SyntheticSettings(PartlyUsed):
    """Settings of ``synthetic``: rows drawn from a linear model, whose best ridge is known."""

    kind: Literal["classification", "regression"] = Field(
        "regression", description="What is predicted.", examples=["regression"]
    )
    rows: int = Field(
        250,
        ge=2,
        le=1_000_000,
        description="Training rows; the validation rows are taken from them.",
        examples=[250],
    )
    test_rows: int = Field(2000, ge=1, le=1_000_000, description="Test rows.", examples=[2000])
    features: int = Field(50, ge=1, le=100_000, description="Features of a row.", examples=[50])
    classes: int = Field(2, ge=2, le=1000, description="Classes of a classification.", examples=[2])
    signal: float = Field(
        1.0,
        gt=0,
        description="Standard deviation of the linear function of the features that is to be "
        "learned: of the target without noise, or of each class's logit.",
        examples=[1.0],
    )
    noise: float = Field(
        1.0,
        ge=0,
        description="Standard deviation of the noise on the target of a regression.",
        examples=[1.0],
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of all draws.", examples=[0])

    # Only what is named comes here: a default is not validated.
    @validate_field("classes", "noise")
    @classmethod
    def _check_kind_has_it(cls, value: float, info: ValidationInfo) -> float:
        kind = info.data.get("kind")
        owner = "classification" if info.field_name == "classes" else "regression"
        if kind is not None and kind != owner:
            raise PydanticCustomError(
                "kind",
                "{field} is a setting of a {owner} alone, and the kind is {kind}; leave it out",
                {"field": info.field_name, "owner": owner, "kind": kind},
            )
        return value

    def _unused(self) -> tuple[str, ...]:
        return ("classes",) if self.kind == "regression" else ("noise",)


DATASET_SETTINGS: Mapping[str, type[BaseModel]] = {
    "digits": NoSettings,
    "mnist": NoSettings,
    "fashion_mnist": NoSettings,
    "kmnist": NoSettings,
    "cifar10": NoSettings,
    "cifar100": NoSettings,
    "svhn": NoSettings,
    "image_folder": ImageFolderSettings,
    "breast_cancer": NoSettings,
    "wine": NoSettings,
    "diabetes": NoSettings,
    "synthetic": SyntheticSettings,
    "table": TableSettings,
}
"""The settings of data sets that can be checked without importing the data set."""

REGRESSION_DATASETS = frozenset({"diabetes"})
"""Those of them in which a number is predicted, whatever their settings."""

TABULAR = frozenset({"breast_cancer", "wine", "diabetes", "synthetic", "table"})
"""Data sets whose rows are known to be no images."""
