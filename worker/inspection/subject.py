"""What is looked at: a task, a data set or a model by its name, or the task of a study."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from regtune.errors import FieldError, InvalidSpec, NotFound
from regtune.settings import Settings
from regtune.spec import AnyTask, StudySpec, load_yaml, parse_spec, parse_text
from regtune.task import DATASETS, MODELS, TASKS, points

Kind = Literal["task", "data set", "model", "study"]

DATA_FOR_MODELS = "digits"
MODEL_FOR_DATA = "mlp"
"""What a model is built for, and what is trained on a data set, unless one says otherwise."""

_NAMES = ("name", "dataset", "data", "model")
"""What says of a task which one it is; the arguments do."""

_STUDIES = (".yaml", ".yml", ".json")


@dataclass(frozen=True)
class Subject:
    """Something to look at, and a study in which it would be trained."""

    kind: Kind
    name: str
    spec: StudySpec

    @property
    def task(self) -> AnyTask:
        """What that study trains."""
        return self.spec.task


def find_subject(
    name: str,
    sets: Sequence[str],
    settings: Settings,
    *,
    data: str | None = None,
    model: str | None = None,
) -> Subject:
    """Return what a name stands for: a study's file, or what is installed or configured here.

    ``sets`` are settings of it, as ``name=value``; ``data`` is what a model is built for, and
    ``model`` what is trained on a data set. Raises NotFound for a name that stands for nothing, and
    InvalidSpec for what cannot be read or does not go with such a name.
    """
    given = [
        option for option, value in (("--set", sets), ("--data", data), ("--model", model)) if value
    ]
    if name.endswith(_STUDIES):
        _refuse(given, "a study's file, which says it all")
        return Subject("study", name, parse_text(_read(name)))
    own = dict(_setting(text) for text in sets)
    task: dict[str, Any]
    if name in points(TASKS, settings.tasks):
        _refuse([option for option in given if option != "--set"], "a task")
        kind, task = "task", {"name": name, **_without_names(own)}
    elif name in points(DATASETS, {}):
        _refuse([option for option in given if option == "--data"], "a data set")
        model = _known(model or MODEL_FOR_DATA, MODELS, "model")
        kind, task = "data set", {"dataset": name, "data": own, "model": model}
    elif name in points(MODELS, {}):
        _refuse([option for option in given if option == "--model"], "a model")
        data = _known(data or DATA_FOR_MODELS, DATASETS, "data set")
        kind, task = "model", {"dataset": data, "model": name, **_without_names(own)}
    else:
        raise _unknown(name, "task, data set or model")
    return Subject(kind, name, parse_spec({"name": "task", "task": task, "budget": {"trials": 2}}))  # type: ignore[arg-type]


def _without_names(own: Mapping[str, Any]) -> Mapping[str, Any]:
    _refuse([f"--set {taken}" for taken in _NAMES if taken in own], "what has a name already")
    return own


def _refuse(options: Sequence[str], kind: str) -> None:
    if options:
        raise InvalidSpec(
            tuple(FieldError(option, f"means nothing for {kind}") for option in options)
        )


def _known(name: str, group: str, kind: str) -> str:
    if name not in points(group, {}):
        raise _unknown(name, kind)
    return name


def _unknown(name: str, kind: str) -> NotFound:
    return NotFound(f"there is no {kind} {name!r}; `regtune task list` shows those that there are")


def _setting(text: str) -> tuple[str, Any]:
    name, sign, value = text.partition("=")
    if not sign or not name:
        raise InvalidSpec((FieldError("--set", f"name=value, not {text!r}"),))
    return name, load_yaml(value)


def _read(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidSpec((FieldError(file, f"cannot be read: {error}"),)) from None
