"""What a data set, a model or a task is, before anything is trained."""

import inspect
from collections.abc import Callable, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import torch
from pydantic import BaseModel, Field
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from regtune.settings import Settings
from regtune.spec import NamedTask, SyntheticSettings
from regtune.spec.datasets import DATASET_SETTINGS
from regtune.spec.models import MODEL_SETTINGS
from regtune.task import (
    DATASETS,
    MODELS,
    TASKS,
    Columns,
    Data,
    Storage,
    Task,
    find_dataset,
    find_model,
    find_task,
    points,
    settings_schema,
)
from worker.inspection.subject import Subject
from worker.tasks.preparation import prepare
from worker.tasks.synthetic import best_decay
from worker.training.dropout import install_dropout_sites
from worker.training.engine import load_task
from worker.training.noise import initial_weights
from worker.training.regularizers import penalized

SYNTHETIC = "synthetic"
"""The data set whose best strength is known."""


class Setting(BaseModel):
    """One setting; without a default, it must be given."""

    name: str
    type: str
    required: bool
    default: Any = None
    description: str | None = None


class Rows(BaseModel):
    """A data set as it was loaded; ``classes`` is None for a regression."""

    training_rows: int
    test_rows: int
    input_shape: list[int] = Field(description="Of one row, as a model gets it.")
    classes: int | None
    standardized: bool
    content_hash: str


class Network(BaseModel):
    """A model as it was built; shapes by name."""

    parameters: int
    penalized: dict[str, list[int]]
    spared: dict[str, list[int]]
    frozen: dict[str, list[int]]
    dropout_sites: list[str]


class Description(BaseModel):
    """What there is to say of a subject; its model was built for the data set ``built_for``."""

    name: str
    kind: str
    defined_in: str | None = None
    summary: str | None = None
    settings: list[Setting] | None = None
    built_for: str | None = None
    data: Rows | None = None
    model: Network | None = None
    own_loss: bool = False
    own_score: bool = False
    best_decay: float | None = Field(
        None,
        description="Of synthetic rows: the best coupled weight decay of the model linear, trained "
        "on all but the validation rows.",
    )


def describe(subject: Subject, settings: Settings) -> Description:
    """Return what can be said without loading data or building a model."""
    if subject.kind == "study":
        return Description(name=subject.name, kind=subject.kind)
    group = {"task": TASKS, "data set": DATASETS, "model": MODELS}[subject.kind]
    factory, schema = _settings_of(subject, settings)
    return Description(
        name=subject.name,
        kind=subject.kind,
        defined_in=points(group, settings.tasks)[subject.name].value,
        summary=(inspect.getdoc(factory) or "").partition("\n\n")[0].replace("\n", " ") or None,
        settings=None if schema is None else _as_settings(schema),
    )


def build(subject: Subject, settings: Settings) -> dict[str, Any]:
    """Load the data, build the model, and return what that adds to the description.

    Raises whatever the task's own code raises.
    """
    task = load_task(subject.task, settings.tasks)
    own_loss = getattr(task, "loss", None) is not None
    spec = subject.spec
    data = task.data(Storage(settings.data_dir, settings.data_roots))
    prepared = prepare(
        data,
        spec.validation,
        spec.training.seed,
        torch.float32,
        own_loss=own_loss,
    )
    shape = prepared.rows.input_shape
    found: dict[str, Any] = {
        "own_loss": own_loss,
        "own_score": getattr(task, "score", None) is not None,
    }
    if subject.kind != "model":
        found["data"] = _as_rows(data, shape)
    if subject.kind != "data set":
        found["model"] = _as_network(task, shape, prepared.outputs, spec.training.seed)
        if not isinstance(spec.task, NamedTask):
            found["built_for"] = spec.task.dataset
    if not isinstance(spec.task, NamedTask) and spec.task.dataset == SYNTHETIC:
        trained_on = min(len(split.training) for split in prepared.splits)
        asked = SyntheticSettings.model_validate(spec.task.data)
        found["best_decay"] = best_decay(asked, trained_on)
    return found


def _settings_of(
    subject: Subject, settings: Settings
) -> tuple[Callable[..., Any], type[BaseModel] | None]:
    """Return what makes the subject, and the schema of its settings, where it has one."""
    match subject.kind:
        case "data set":
            loader = find_dataset(subject.name)
            return loader, DATASET_SETTINGS.get(subject.name) or settings_schema(loader)
        case "model":
            return find_model(subject.name), MODEL_SETTINGS.get(subject.name)
        case _:
            factory = find_task(subject.name, settings.tasks)
            return factory, settings_schema(factory)


def _as_settings(schema: type[BaseModel]) -> list[Setting]:
    return [
        Setting(
            name=name,
            type=_in_words(field.annotation),
            required=field.is_required(),
            default=None if field.is_required() else _as_json(field),
            description=field.description,
        )
        for name, field in schema.model_fields.items()
    ]


def _as_json(field: FieldInfo) -> Any:
    """Return a default as JSON has it, or in words where JSON has no such thing."""
    default = field.get_default(call_default_factory=True)
    return to_jsonable_python(default, fallback=str)


def _in_words(annotation: Any) -> str:
    """Return a type as it is written, without what is only for checking it."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _in_words(arguments[0])
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (Union, UnionType):
        return " | ".join(map(_in_words, arguments))
    if origin is not None:
        return f"{_in_words(origin)}[{', '.join(map(_in_words, arguments))}]"
    names: dict[Any, str] = {NoneType: "null", Ellipsis: "..."}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _as_rows(data: Data, shape: Sequence[int]) -> Rows:
    return Rows(
        training_rows=len(data.train_y),
        test_rows=len(data.test_y),
        input_shape=list(shape),
        classes=data.classes,
        standardized=data.standardize or isinstance(data.train_x, Columns),
        content_hash=data.content_hash(),
    )


def _as_network(task: Task, shape: tuple[int, ...], outputs: int, seed: int) -> Network:
    with initial_weights(seed):
        model: torch.nn.Module = task.model(shape, outputs)
    sites = install_dropout_sites(model)
    decayed = set(penalized(model, "weights"))
    learned: dict[str, dict[str, list[int]]] = {"penalized": {}, "spared": {}, "frozen": {}}
    for name, parameter in model.named_parameters():
        kind = "penalized" if name in decayed else "spared"
        learned[kind if parameter.requires_grad else "frozen"][name] = list(parameter.shape)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Network(parameters=count, dropout_sites=list(sites), **learned)
