"""A study as it arrives: read within a limit, decoded, and rid of what no database could hold."""

import json
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

from fastapi import Request
from starlette.exceptions import HTTPException

from regtune.errors import FieldError, InvalidSpec
from regtune.spec import StudyChange, StudySpec, load_yaml, parse_change, parse_spec

JSON_TYPES = ("application/json",)
MERGE_PATCH = "application/merge-patch+json"
"""RFC 7396: what is left out stays, null takes away."""
YAML_TYPES = ("application/yaml", "application/x-yaml", "text/yaml", "text/x-yaml")

MAX_DEPTH = 20
"""Deepest nesting of a study; its own fields need 4."""

_MAX_INTEGER = 2**53
"""Largest whole number that every JSON reader keeps exactly (RFC 8259, section 6)."""

_TIMES_DRAINED = 16
"""A body up to so many times too large is read to its end, so that its sender hears why."""


async def read_within(request: Request, limit: int) -> bytes:
    """Return a request's body; raise InvalidSpec if it is larger than ``limit`` bytes.

    No more than that is ever kept, and an endless body is cut off.
    """
    kept = bytearray()
    size = int(request.headers.get("content-length", "0"))
    if size <= limit * _TIMES_DRAINED:
        size = 0
        async for chunk in request.stream():
            size += len(chunk)
            if size <= limit:
                kept += chunk
            elif size > limit * _TIMES_DRAINED:
                break
    if size > limit:
        raise InvalidSpec((FieldError("", f"the body is larger than {limit} bytes"),))
    return bytes(kept)


def parse_study(body: bytes, content_type: str) -> StudySpec:
    """Check a study that came as JSON or YAML; raise InvalidSpec with every field at fault."""
    return parse_spec(_storable(_decode(body, _media_type(content_type))))


def parse_change_of_study(body: bytes, content_type: str) -> StudyChange:
    """Check what is to change of a study; raise InvalidSpec with every field at fault."""
    media_type = _media_type(content_type)
    if media_type == MERGE_PATCH:
        media_type = JSON_TYPES[0]
    return parse_change(_storable(_decode(body, media_type)))


def _media_type(content_type: str) -> str:
    return content_type.partition(";")[0].strip().lower()


def _storable(data: Any) -> Any:
    errors = tuple(_unstorable(data, (), 0))
    if errors:
        raise InvalidSpec(errors)
    return data


def _decode(body: bytes, media_type: str) -> Any:
    if media_type not in JSON_TYPES + YAML_TYPES:
        raise HTTPException(
            415,
            f"a study comes as application/json or application/yaml, not as {media_type!r}"
            if media_type
            else "name the body's type: Content-Type: application/json or application/yaml",
            {"Accept-Post": ", ".join(JSON_TYPES + YAML_TYPES)},
        )
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _broken(f"not valid UTF-8 at byte {error.start}") from None
    return _load_json(text) if media_type in JSON_TYPES else load_yaml(text)


def _load_json(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates)
    except json.JSONDecodeError as error:
        raise _broken(
            f"not valid JSON: {error.msg}, line {error.lineno}, column {error.colno}"
        ) from None
    except RecursionError:
        raise _broken("not valid JSON: nested too deeply") from None
    except ValueError:
        raise _broken("not valid JSON: a number has too many digits") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    times = Counter(name for name, _ in pairs)
    if len(times) < len(pairs):
        twice = [_printable(name) for name, count in times.items() if count > 1]
        raise InvalidSpec(tuple(FieldError(name, "is given more than once") for name in twice))
    return dict(pairs)


def _broken(message: str) -> InvalidSpec:
    return InvalidSpec((FieldError("", message),))


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


def _printable(text: str) -> str:
    return text.encode("ascii", "backslashreplace").decode("ascii")
