"""What goes wrong, told to the client as RFC 9457 problem documents.

Neither a traceback nor SQL ever leaves the service: an internal error is known to the client by an
id alone, under which the log has the rest.
"""

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any
from uuid import uuid4

import psycopg
import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from regtune.errors import (
    BudgetSpent,
    DatabaseUnavailable,
    InvalidSpec,
    NotFound,
    RegtuneError,
    RightsMissing,
    StaleView,
    StudyActive,
    StudyDiffers,
    StudyOver,
    StudyUnreadable,
    UnknownSchema,
)

log = structlog.get_logger()

MEDIA_TYPE = "application/problem+json"

RETRY_AFTER_SECONDS = 2

_MOST_ERRORS = 100
"""Wrong fields that are told of; a body can hold tens of thousands."""

_STATUS: Mapping[type[RegtuneError], HTTPStatus] = {
    InvalidSpec: HTTPStatus.UNPROCESSABLE_ENTITY,
    NotFound: HTTPStatus.NOT_FOUND,
    StudyDiffers: HTTPStatus.CONFLICT,
    StudyActive: HTTPStatus.CONFLICT,
    StudyOver: HTTPStatus.CONFLICT,
    BudgetSpent: HTTPStatus.CONFLICT,
    StaleView: HTTPStatus.SERVICE_UNAVAILABLE,
    UnknownSchema: HTTPStatus.SERVICE_UNAVAILABLE,
    StudyUnreadable: HTTPStatus.SERVICE_UNAVAILABLE,
    DatabaseUnavailable: HTTPStatus.SERVICE_UNAVAILABLE,
    RightsMissing: HTTPStatus.SERVICE_UNAVAILABLE,
    RegtuneError: HTTPStatus.INTERNAL_SERVER_ERROR,
}


class WrongField(BaseModel):
    """One field that is wrong, and what would be right."""

    field: str = Field(
        description="Where it stands, from the outside in; empty for the whole.",
        examples=["search.dropout.high"],
    )
    message: str = Field(
        description="What is wrong, and what would be right.", examples=["must be in [0, 1)"]
    )


class Problem(BaseModel):
    """A problem document, as RFC 9457 has it."""

    model_config = ConfigDict(extra="allow")

    type: str = Field(
        description="What kind of problem: a URN of its own, or about:blank if the status says it.",
        examples=["urn:regtune:problem:study-differs"],
    )
    title: str = Field(
        description="The kind of problem in words.",
        examples=["A study of this name exists already, with another spec."],
    )
    status: int = Field(description="The HTTP status again.", examples=[409])
    detail: str = Field(
        description="What went wrong this time.",
        examples=["a study 'digits' exists already, with another spec"],
    )
    instance: str | None = Field(
        None,
        description="Of an internal error: the id under which the service's log has the rest.",
        examples=["urn:uuid:6d3f9a52-0d5c-4c0e-9c76-5d0f0b1f2a34"],
    )
    errors: list[WrongField] | None = Field(
        None,
        description="Of status 422: every field that is wrong.",
        examples=[[{"field": "search.dropout.high", "message": "must be in [0, 1)"}]],
    )


def install(app: FastAPI) -> None:
    """Let an app answer everything that goes wrong with a problem document."""
    app.add_exception_handler(RegtuneError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(DBAPIError, _database)
    app.add_exception_handler(PoolTimeout, _overloaded)
    app.add_exception_handler(Exception, _internal)


def problem(
    status: int,
    detail: str,
    *,
    kind: str | None = None,
    title: str | None = None,
    headers: Mapping[str, str] | None = None,
    **members: Any,
) -> Response:
    """Return a problem document; ``kind`` names a type of our own, else the status says it all."""
    document = {
        "type": f"urn:regtune:problem:{kind}" if kind else "about:blank",
        "title": title or HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        **members,
    }
    # Escaped to ASCII: what is quoted from a request may be no valid Unicode.
    return Response(json.dumps(document), status, headers, MEDIA_TYPE)


def invalid_query(name: str, message: str, value: str) -> RequestValidationError:
    """Return what to raise for a query parameter that only its endpoint can judge."""
    return RequestValidationError([{"loc": ("query", name), "msg": message, "input": value}])


def _refused(_: Request, error: Exception) -> Response:
    kind = type(error)
    status = next(_STATUS[ancestor] for ancestor in kind.__mro__ if ancestor in _STATUS)
    members = {"errors": _wrong_fields(error)} if isinstance(error, InvalidSpec) else {}
    return problem(
        status,
        _abridged(error),
        kind=_kebab(kind.__name__),
        title=(kind.__doc__ or "").splitlines()[0],
        headers=_retry_after(status),
        **members,
    )


def _wrong_fields(error: InvalidSpec) -> list[dict[str, str]]:
    return [
        {"field": wrong.field, "message": wrong.message} for wrong in error.errors[:_MOST_ERRORS]
    ]


def _abridged(error: Exception) -> str:
    """Return an error's message; of one with very many wrong fields, the first of them."""
    if isinstance(error, InvalidSpec) and len(error.errors) > _MOST_ERRORS:
        return f"{len(error.errors)} fields are wrong, the first {_MOST_ERRORS} are listed"
    return str(error)


def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    errors = [
        {"field": ".".join(map(str, detail["loc"][1:])), "message": detail["msg"]}
        for detail in error.errors()
    ]
    return problem(
        HTTPStatus.UNPROCESSABLE_ENTITY,
        "; ".join(f"{wrong['field']}: {wrong['message']}" for wrong in errors),
        kind="invalid-request",
        title="The request has parameters that are wrong.",
        errors=errors,
    )


def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    detail, headers = error.detail, error.headers
    if detail == HTTPStatus(error.status_code).phrase:
        detail = f"{request.method} {request.url.path}: {detail}"
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        headers = {"Allow": ", ".join(_allowed(request))}
    return problem(error.status_code, detail, headers=headers)


def _allowed(request: Request) -> list[str]:
    """Return the methods that some route has for a path; Starlette tells those of one route."""
    return [
        method
        for method in ("GET", "HEAD", "POST", "PATCH", "DELETE")
        if any(
            route.matches({**request.scope, "method": method})[0] is Match.FULL
            for route in request.app.routes
        )
    ]


def _gone(_: Request, __: Exception) -> Response:
    return problem(HTTPStatus.BAD_REQUEST, "the connection closed before the body was complete")


def _database(request: Request, error: Exception) -> Response:
    assert isinstance(error, DBAPIError)
    if error.connection_invalidated or isinstance(error.orig, psycopg.OperationalError):
        log.warning("database_lost", error=str(error.orig).splitlines()[0])
        return _refused(request, DatabaseUnavailable())
    return _internal(request, error)


def _overloaded(_: Request, __: Exception) -> Response:
    status = HTTPStatus.SERVICE_UNAVAILABLE
    return problem(status, "all database connections are in use", headers=_retry_after(status))


def _internal(request: Request, error: Exception) -> Response:
    error_id = uuid4().urn
    log.error(
        "internal_error",
        id=error_id,
        method=request.method,
        path=request.url.path,
        exc_info=error,
    )
    return problem(
        HTTPStatus.INTERNAL_SERVER_ERROR,
        "something went wrong inside the service; its log has more under this instance's id",
        instance=error_id,
    )


def _retry_after(status: int) -> Mapping[str, str] | None:
    if status != HTTPStatus.SERVICE_UNAVAILABLE:
        return None
    return {"Retry-After": str(RETRY_AFTER_SECONDS)}


def _kebab(name: str) -> str:
    return "".join(f"-{c.lower()}" if c.isupper() else c for c in name).lstrip("-")
