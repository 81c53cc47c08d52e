"""Where a page of a list ended, as text that means nothing to a client."""

import base64
import binascii

from fastapi.exceptions import RequestValidationError

from service.problems import invalid_query


def write(*parts: str) -> str:
    """Return a cursor that holds these parts."""
    return base64.urlsafe_b64encode("\n".join(parts).encode()).decode().rstrip("=")


def read(cursor: str, count: int) -> list[str]:
    """Return the ``count`` parts of a cursor; raise RequestValidationError if it has others."""
    try:
        padded = cursor.encode("ascii") + b"=" * (-len(cursor) % 4)
        parts = base64.b64decode(padded, altchars=b"-_", validate=True).decode().split("\n")
    except (binascii.Error, UnicodeError):
        raise invalid(cursor) from None
    if len(parts) != count:
        raise invalid(cursor)
    return parts


def whole(cursor: str, part: str, limit: int) -> int:
    """Return a part of a cursor as a number from 0 to below ``limit``; raise as ``read`` does."""
    digits = part.isascii() and part.isdigit() and len(part) <= len(str(limit))
    if not digits or int(part) >= limit:
        raise invalid(cursor)
    return int(part)


def invalid(cursor: str) -> RequestValidationError:
    """Return what to raise for a cursor that did not come from the list that it is given to."""
    return invalid_query("cursor", "is not the `next` of a page of this very list", cursor)
