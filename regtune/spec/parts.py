"""What the parts of a spec have in common."""

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler
from pydantic import model_serializer as serialize_model
from pydantic_core import ErrorDetails


class SpecModel(BaseModel):
    """Frozen, of the exact types that are written, and without unknown fields."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def with_computed_defaults(*names: str) -> Callable[[dict[str, Any]], None]:
    """Let a JSON schema say that fields may be left out whose defaults depend on other fields."""

    def change(schema: dict[str, Any]) -> None:
        schema["required"] = [name for name in schema.get("required", ()) if name not in names]
        for name in names:
            schema["properties"][name].pop("default", None)

    return change


class PartlyUsed(SpecModel):
    """A part of a spec in which some fields have no meaning, depending on the others.

    Such a field is not written: it may not be named either, and what is shown can be posted again.
    """

    def _unused(self) -> tuple[str, ...]:
        """Return the names of the fields without a meaning; every part says its own."""
        raise NotImplementedError

    @classmethod
    def unused_in(cls, values: Mapping[str, Any]) -> tuple[str, ...]:
        """Return which fields have no meaning beside such values, which may be wrong as well."""
        return cls.model_construct(**values)._unused()

    @serialize_model(mode="wrap")
    def _write_what_is_used(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        unused = self._unused()
        return {name: value for name, value in write(self).items() if name not in unused}


def in_plain_words(detail: ErrorDetails) -> str:
    """Return what is wrong with a value, without pydantic's own terms."""
    if detail["type"] == "too_long":
        return "must have at most {max_length} values, but {actual_length} are given".format(
            **detail["ctx"]
        )
    return _WORDS.get(detail["type"]) or detail["msg"].removeprefix("Input ")


_WORDS = {
    "too_short": "must name at least one value, but the list is empty",
    "model_type": "must be a mapping of fields",
    "model_attributes_type": "must be a mapping of fields",
    "dict_type": "must be a mapping",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
}
