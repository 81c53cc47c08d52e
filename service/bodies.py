"""A study as it arrives: read within a limit, decoded, and rid of what no database could hold."""

import json
from collections import Counter
from typing import Any

from fastapi import Request
from starlette.exceptions import HTTPException

from regtune.errors import FieldError, InvalidSpec
from regtune.spec import StudyChange, StudySpec, load_yaml, parse_change, parse_spec, plain_data

JSON_TYPES = ("application/json",)
MERGE_PATCH = "application/merge-patch+json"
"""RFC 7396: what is left out stays, null takes away."""
YAML_TYPES = ("application/yaml", "application/x-yaml", "text/yaml", "text/x-yaml")

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
    return parse_spec(plain_data(_decode(body, _media_type(content_type))))


def parse_change_of_study(body: bytes, content_type: str) -> StudyChange:
    """Check what is to change of a study; raise InvalidSpec with every field at fault."""
    media_type = _media_type(content_type)
    if media_type == MERGE_PATCH:
        media_type = JSON_TYPES[0]
    return parse_change(plain_data(_decode(body, media_type)))


def _media_type(content_type: str) -> str:
    return content_type.partition(";")[0].strip().lower()


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


def _printable(text: str) -> str:
    return text.encode("ascii", "backslashreplace").decode("ascii")
