"""What a study may hold so that PostgreSQL keeps it, and every reader of JSON reads the same."""

import math
from collections.abc import Iterator
from typing import Any

from regtune.errors import FieldError, InvalidSpec

MAX_DEPTH = 20
"""Deepest nesting of a study; its own fields need 4."""

_MAX_INTEGER = 2**53
"""Largest whole number that every JSON reader keeps exactly (RFC 8259, section 6)."""


def plain_data(data: Any) -> Any:
    """Return what was read as JSON or YAML; InvalidSpec names each fault."""
    errors = tuple(_unstorable(data, (), 0))
    if errors:
        raise InvalidSpec(errors)
    return data


def _unstorable(value: Any, path: tuple[str, ...], depth: int) -> Iterator[FieldError]:
    """Yield what PostgreSQL or JSON could not hold, or a reader would not read back the same."""
    field = ".".join(path)
    match value:
        case _ if depth > MAX_DEPTH:
            yield FieldError(field, f"is nested more than {MAX_DEPTH} levels deep")
        case dict():
            for key, item in value.items():
                if isinstance(key, str) and not _text_fault(key):
                    yield from _unstorable(item, (*path, key), depth + 1)
                else:
                    yield FieldError(field, f"the name of a field is not plain text: {key!a}")
        case list():
            for index, item in enumerate(value):
                yield from _unstorable(item, (*path, str(index)), depth + 1)
        case str():
            if fault := _text_fault(value):
                yield FieldError(field, fault)
        case bool() | None:
            pass
        case int():
            if abs(value) > _MAX_INTEGER:
                yield FieldError(field, "a whole number must be within ±2^53")
        case float():
            if not math.isfinite(value):
                yield FieldError(field, "must be a finite number")
        case _:
            yield FieldError(field, f"is a {type(value).__name__}, which JSON has no way to write")


def _text_fault(text: str) -> str | None:
    if "\0" in text:
        return "must not contain the character U+0000"
    if any("\ud800" <= character <= "\udfff" for character in text):
        return "must not contain half of a surrogate pair"
    return None
