"""From JSON or YAML to a checked study, or to every field at fault in plain words."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from pydantic import (
    BaseModel,
    ValidationError,
)
from pydantic_core import ErrorDetails
from yaml.constructor import ConstructorError

from regtune.errors import FieldError, InvalidSpec, StudyUnreadable
from regtune.space import (
    PARAMETER_KINDS,
    Range,
)
from regtune.spec.change import BudgetChange, StudyChange
from regtune.spec.datasets import DATASET_SETTINGS
from regtune.spec.models import MODEL_SETTINGS
from regtune.spec.parts import in_plain_words
from regtune.spec.plain import plain_data
from regtune.spec.search import Search
from regtune.spec.study import (
    FAULTS,
    NAME_PATTERN,
    Budget,
    Pruner,
    Requires,
    Sampler,
    StudySpec,
    Validation,
)
from regtune.spec.task import TASK_KINDS, TaskSpec
from regtune.spec.training import Training

MAX_BODY_BYTES = 256 * 1024
MAX_YAML_VALUES = 10_000
"""Most values in a YAML text, which takes a few hundred times longer to read than JSON."""


def parse_spec(data: Any) -> StudySpec:
    """Check a study that came as JSON or YAML data; raise InvalidSpec with every field at fault."""
    if not isinstance(data, Mapping):
        raise InvalidSpec((FieldError("", "a study must be a mapping of fields"),))
    try:
        return StudySpec.model_validate(data)
    except ValidationError as error:
        raise InvalidSpec(_field_errors(error, data, _FIELDS_OF)) from None


def read_spec(stored: Mapping[str, Any]) -> StudySpec:
    """Return a study as it was stored; raise StudyUnreadable if another version has done that."""
    try:
        return StudySpec.model_validate(stored)
    except ValidationError as error:
        raise StudyUnreadable(_field_errors(error, stored, _FIELDS_OF)) from None


def parse_change(data: Any) -> StudyChange:
    """Check what is to change of a study; raise InvalidSpec with every field at fault."""
    if not isinstance(data, Mapping):
        raise InvalidSpec((FieldError("", "a change must be a mapping of fields"),))
    try:
        return StudyChange.model_validate(data)
    except ValidationError as error:
        raise InvalidSpec(_field_errors(error, data, _FIELDS_OF_A_CHANGE)) from None


def changed(spec: StudySpec, change: Mapping[str, Any]) -> StudySpec:
    """Return a spec with other limits and another priority; raise InvalidSpec if it cannot be."""
    budget = spec.budget.model_dump() | dict(change.get("budget", {}))
    return parse_spec({**spec.canonical(), **change, "budget": budget})


def parse_text(text: str) -> StudySpec:
    """Check a study written as YAML, of which JSON is a part."""
    return parse_spec(plain_data(load_yaml(text)))


def load_yaml(text: str) -> Any:
    """Read YAML, with numbers as YAML 1.2 and JSON write them; raise InvalidSpec if it is broken.

    PyYAML follows YAML 1.1, where ``1e-4`` is a string, 040 is 32 and 1:30 is 90.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError, *_BROKEN_TAGS) as error:
        raise InvalidSpec((FieldError("", f"not valid YAML: {_first_line(error)}"),)) from None


_BROKEN_TAGS = (ValueError, LookupError, AttributeError)
"""What PyYAML lets through when a tag such as ``!!int`` stands before something else."""


class _Loader(yaml.SafeLoader):
    """A safe loader that reads numbers as YAML 1.2 does, and no aliases and no field twice."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._values = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._values += 1
        if self._values > MAX_YAML_VALUES:
            raise yaml.YAMLError(f"more than {MAX_YAML_VALUES} values")
        # Nested aliases can make a few bytes stand for gigabytes; a study has no use for them.
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not supported")
        return super().compose_node(parent, index)

    def construct_whole_number(self, node: Any) -> int:
        """Read it as YAML 1.2 does, where 040 is forty; in YAML 1.1 it is thirty-two."""
        text = self.construct_scalar(node)
        return int(text, 0 if text[:2] in ("0o", "0x") else 10)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            raise ConstructorError(problem="a field is given twice", problem_mark=node.start_mark)
        return mapping


_INT, _FLOAT, _TIMESTAMP = (f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "timestamp"))

_Loader.yaml_implicit_resolvers = {
    key: [(tag, pattern) for tag, pattern in resolvers if tag not in (_INT, _FLOAT, _TIMESTAMP)]
    for key, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in (
    (_INT, r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"),
    (_FLOAT, r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"),
    (_FLOAT, r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
):
    _Loader.add_implicit_resolver(_tag, re.compile(f"^({_pattern})$"), list("-+0123456789."))
_Loader.add_constructor(_INT, _Loader.construct_whole_number)


def _first_line(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    what = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"{what}, line {mark.line + 1}, column {mark.column + 1}" if mark else what


_FIELDS_OF: Mapping[tuple[str, ...], type[BaseModel]] = {
    (): StudySpec,
    ("training",): Training,
    ("search",): Search,
    ("validation",): Validation,
    ("budget",): Budget,
    ("sampler",): Sampler,
    ("pruner",): Pruner,
    ("requires",): Requires,
}

_FIELDS_OF_A_CHANGE: Mapping[tuple[str, ...], type[BaseModel]] = {
    (): StudyChange,
    ("budget",): BudgetChange,
}


def _field_errors(
    error: ValidationError,
    posted: Mapping[str, Any],
    fields_of: Mapping[tuple[str, ...], type[BaseModel]],
) -> tuple[FieldError, ...]:
    """Return every field at fault; a list of wrong values alone passes for an empty one besides."""
    return tuple(
        told
        for detail in error.errors()
        if detail["type"] != "too_short" or not detail["input"]
        for told in (
            [FieldError("", fault) for fault in detail["ctx"]["faults"]]
            if detail["type"] == FAULTS
            else [_field_error(detail, posted, fields_of)]
        )
    )


def _field_error(
    detail: ErrorDetails,
    posted: Mapping[str, Any],
    fields_of: Mapping[tuple[str, ...], type[BaseModel]],
) -> FieldError:
    """Say in plain words what pydantic found, without the union tags that it puts in the way."""
    parts = list(_without_tags(detail))
    field = ".".join(parts)
    if detail["type"] == "extra_forbidden":
        return FieldError(
            field, f"unknown field; {_known_fields(tuple(parts[:-1]), posted, fields_of)}"
        )
    if detail["type"] == "missing":
        return FieldError(field, "is required")
    if detail["type"] == "string_pattern_mismatch":
        return FieldError(field, f"must match {NAME_PATTERN}")
    message = in_plain_words(detail)
    given = detail.get("input")
    if isinstance(given, str | int | float) and len(str(given)) <= 100:
        message += f" (given: {json.dumps(given)})" if " is given" not in message else ""
    return FieldError(field, message)


def _without_tags(detail: ErrorDetails) -> Iterator[str]:
    """Yield the parts of a field's address; a field may have the name of a tag."""
    loc = list(map(str, detail["loc"]))
    is_own_name = detail["type"] == "extra_forbidden"
    for place, part in enumerate(loc):
        is_tag = (loc[0] == "search" and place >= 2 and part in PARAMETER_KINDS) or (
            loc[0] == "task" and place == 1 and part in TASK_KINDS
        )
        if not is_tag or (is_own_name and place == len(loc) - 1):
            yield part


def _known_fields(
    parent: tuple[str, ...],
    posted: Mapping[str, Any],
    fields_of: Mapping[tuple[str, ...], type[BaseModel]],
) -> str:
    if parent[:1] == ("search",) and len(parent) > 1:
        model: type[BaseModel] = Range[float]
    elif parent[:1] == ("task",):
        return _known_settings(parent, posted["task"])
    else:
        model = fields_of[parent]
    return "known: " + ", ".join(model.model_fields)


def _known_settings(parent: tuple[str, ...], task: Mapping[str, Any]) -> str:
    """Say which settings the data set or the model has that was posted."""
    if parent == ("task", "data"):
        dataset = task["dataset"]
        names = DATASET_SETTINGS[dataset].model_fields
        return f"known for the data set {dataset}: {', '.join(names) or 'none'}"
    names = MODEL_SETTINGS[task["model"]].model_fields
    return f"known for the model {task['model']}: {', '.join([*TaskSpec.model_fields, *names])}"
