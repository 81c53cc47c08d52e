"""What is trained: tasks, data sets and models, the built-in ones and a user's own, by one door.

A package offers them through entry points of three groups: ``regtune.datasets`` and
``regtune.models``, of which a study names a pair, and ``regtune.tasks``, which are both in one
class. Names are listed without importing anything, so that a service without torch knows them; only
a worker loads what is behind a name.
"""

import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, is_dataclass
from dataclasses import fields as fields_of
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic_core import ErrorDetails

from regtune.errors import FieldError, InvalidSpec, NotFound
from regtune.spec.task import NO_SETTINGS

DATASETS = "regtune.datasets"
MODELS = "regtune.models"
TASKS = "regtune.tasks"

RowFunction = Callable[[Any, Any], Any]
"""A function of a model's outputs ``(B, …)`` and targets ``(B, …)``, to one number a row: ``(B,)``.

All are tensors of torch. It must not branch on their values: it runs under ``vmap``.
"""


@dataclass(frozen=True)
class Columns:
    """Rows of a table, of which some columns are categories.

    ``numbers`` is ``(rows, columns)``, float32, or float64 where that is too coarse, and NaN where
    a value is missing. ``categories`` is ``(rows, columns)``, int32: numbers of values, counted
    from 0 in each column, -1 where missing.
    """

    numbers: NDArray[np.float32 | np.float64]
    categories: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, rows: NDArray[np.int64] | slice) -> "Columns":
        return Columns(self.numbers[rows], self.categories[rows])


Inputs = NDArray[Any] | Columns


@dataclass(frozen=True)
class Data:
    """A data set in memory, for classification or for regression.

    ``train_x`` and ``test_x`` are ``(rows, *features)``, or the columns of a table; neither
    normalized nor imputed nor encoded, since that depends on which rows are trained on, so that
    only the worker can. With ``standardize=False`` arrays are left as they are. A model gets them
    as float32 either way; whole numbers up to 2^24, such as token ids, stay exact in it.

    With ``classes``, ``train_y`` and ``test_y`` are ``(rows,)``, int64, from 0 to ``classes - 1``;
    with ``classes=None`` they are numbers to predict, floating, and standardized as well. A task
    with a loss of its own gets them as they are, and they may then be of any type and have any
    shape ``(rows, …)``.

    Validation rows are taken from the training rows; test rows are looked at once, at the best
    weights.
    """

    train_x: Inputs
    train_y: NDArray[Any]
    test_x: Inputs
    test_y: NDArray[Any]
    classes: int | None
    standardize: bool = True

    @property
    def outputs(self) -> int:
        """How many numbers a model has to return for a row: one for each class, or one."""
        return self.classes or 1

    def content_hash(self) -> str:
        """Return a hash of all rows: the same for the same rows in the same order, everywhere."""
        digest = hashlib.sha256(repr(self.classes).encode())
        for part in (self.train_x, self.train_y, self.test_x, self.test_y):
            arrays = (part.numbers, part.categories) if isinstance(part, Columns) else (part,)
            for array in arrays:
                digest.update(f"{array.dtype.str}{array.shape}".encode())
                digest.update(np.ascontiguousarray(array).data)
        return f"sha256:{digest.hexdigest()}"


@dataclass(frozen=True)
class Storage:
    """Where a worker lets data sets read from, by its own configuration.

    ``data_dir`` is where data sets are kept and downloaded. ``roots`` are the only folders and
    addresses under which a study may name a file.
    """

    data_dir: Path
    roots: tuple[str, ...] = ()


class DatasetLoader(Protocol):
    """Loads a data set, from ``storage`` where it needs files, by the study's settings of it."""

    def __call__(self, storage: Storage, **settings: Any) -> Data:
        """Return the data set.

        Raise ``regtune.errors.DataMissing``, or any OSError, for what this machine lacks and others
        may have; ``InvalidData`` for what is wrong with the rows, and so the same everywhere.
        """


class ModelBuilder(Protocol):
    """Builds a model, as a ``torch.nn.Module`` from ``(batch, *features)`` to ``outputs``."""

    def __call__(
        self, settings: Mapping[str, Any], input_shape: tuple[int, ...], outputs: int
    ) -> Any:
        """Return a new model for these settings; it is built under the study's seed."""


class Task(Protocol):
    """Data, model, and what is measured, in one class; a study's settings are its arguments.

    They must be annotated, by name, so that they can be checked and shown: ``width: int = 32``. A
    dataclass or a model of pydantic will do. The methods ``loss(output, target)`` and
    ``score(output, target)``, both RowFunctions, may be left out; the built-in ones then take their
    place.
    """

    def data(self, storage: Storage) -> Data:
        """Return the data set: the same rows at every call, and on every machine."""

    def model(self, input_shape: tuple[int, ...], outputs: int) -> Any:
        """Return a new ``torch.nn.Module`` from ``(batch, *input_shape)`` to ``(batch, …)``.

        It is built under the study's seed. ``outputs`` is the number of classes, or 1.
        """


@dataclass(frozen=True)
class Pair:
    """A data set and a model as a task; it measures what is usual for their kind."""

    load: DatasetLoader
    data_settings: Mapping[str, Any]
    build: ModelBuilder
    model_settings: Mapping[str, Any]

    def data(self, storage: Storage) -> Data:
        """Load the data set."""
        return self.load(storage, **self.data_settings)

    def model(self, input_shape: tuple[int, ...], outputs: int) -> Any:
        """Build a model."""
        return self.build(self.model_settings, input_shape, outputs)


@dataclass(frozen=True)
class Offer:
    """The names of the data sets, models and tasks that a program has installed."""

    datasets: frozenset[str]
    models: frozenset[str]
    tasks: frozenset[str] = field(default=frozenset())


def installed(configured: Mapping[str, str]) -> Offer:
    """Return what is installed or configured here, without importing any of it."""
    return Offer(
        datasets=frozenset(entry_points(group=DATASETS).names),
        models=frozenset(entry_points(group=MODELS).names),
        tasks=frozenset(points(TASKS, configured)),
    )


def points(group: str, configured: Mapping[str, str]) -> dict[str, EntryPoint]:
    """Return where everything of a group is found, by name, without importing any of it.

    ``configured`` are tasks that this program's own configuration names, by name, each as
    ``package.module:Class``; they come before those that are installed.
    """
    own = configured if group == TASKS else {}
    return {point.name: point for point in entry_points(group=group)} | {
        name: EntryPoint(name, where, group) for name, where in own.items()
    }


def find_dataset(name: str) -> DatasetLoader:
    """Import the loader of a data set; raise NotFound, listing the known ones."""
    loader: DatasetLoader = _find(DATASETS, name).load()
    return loader


def find_model(name: str) -> ModelBuilder:
    """Import the builder of a model; raise NotFound, listing the known ones."""
    builder: ModelBuilder = _find(MODELS, name).load()
    return builder


def find_task(name: str, configured: Mapping[str, str]) -> Callable[..., Task]:
    """Import the class of a task; raise NotFound, listing the known ones."""
    factory: Callable[..., Task] = _find(TASKS, name, configured).load()
    return factory


def make_task(factory: Callable[..., Task], settings: Mapping[str, Any]) -> Task:
    """Return a task with a study's settings; raise InvalidSpec with those that are wrong."""
    schema = settings_schema(factory)
    if taken := NO_SETTINGS & schema.model_fields.keys():
        says = "the task has an argument of this name, which is a field of every task"
        raise InvalidSpec(tuple(FieldError(f"task.{name}", says) for name in sorted(taken)))
    try:
        checked = schema.model_validate(settings)
    except ValidationError as error:
        raise InvalidSpec(
            tuple(_wrong_setting(detail, schema) for detail in error.errors())
        ) from None
    return factory(**{name: getattr(checked, name) for name in schema.model_fields})


def settings_schema(factory: Callable[..., Any]) -> type[BaseModel]:
    """Return what may be set of a task or a data set, by the annotated arguments of its making."""
    arguments = inspect.signature(factory, eval_str=True).parameters.values()
    made = {name: Field(default_factory=make) for name, make in _default_factories(factory)}

    def default(argument: inspect.Parameter) -> Any:
        given = ... if argument.default is argument.empty else argument.default
        return made.get(argument.name, given)

    fields: dict[str, Any] = {
        argument.name: (
            Any if argument.annotation is argument.empty else argument.annotation,
            default(argument),
        )
        for argument in arguments
        if argument.kind in (argument.POSITIONAL_OR_KEYWORD, argument.KEYWORD_ONLY)
        and argument.annotation is not Storage
    }
    config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())
    return create_model("Settings", __config__=config, **fields)


def _default_factories(factory: Callable[..., Any]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield what makes the defaults of a dataclass's or a pydantic model's fields, by name.

    A signature has something in their place that says no more than that there is one.
    """
    for plain in fields_of(factory) if is_dataclass(factory) else ():
        if plain.default_factory is not MISSING:
            yield plain.name, plain.default_factory
    for name, own in getattr(factory, "__pydantic_fields__", {}).items():
        if own.default_factory is not None:
            yield name, own.default_factory


def _wrong_setting(detail: ErrorDetails, schema: type[BaseModel]) -> FieldError:
    field = ".".join(["task", *map(str, detail["loc"])])
    match detail["type"]:
        case "extra_forbidden":
            known = ", ".join(schema.model_fields) or "none"
            return FieldError(field, f"unknown setting; known: {known}")
        case "missing":
            return FieldError(field, "is required")
    return FieldError(field, detail["msg"].removeprefix("Input "))


def _find(group: str, name: str, configured: Mapping[str, str] | None = None) -> EntryPoint:
    known = points(group, configured or {})
    if name not in known:
        raise NotFound(f"no {group} entry point {name!r}; installed: {sorted(known)}")
    return known[name]
