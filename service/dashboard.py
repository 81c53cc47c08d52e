"""The Optuna dashboard, inside the service: everything to look at, notes to write, no more.

Most of what it can write would corrupt a running study: trials that no worker trains, a second
study under a number of ours, results that no lease has earned. Only what is named here passes.
"""

import asyncio
import re
from collections.abc import Iterable
from typing import cast

import optuna
from a2wsgi import WSGIMiddleware
from fastapi import Request
from optuna.exceptions import StorageInternalError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from regtune import database
from regtune.errors import DatabaseUnavailable
from service.bodies import read_within
from service.problems import problem

_PAGES = re.compile(r"/(dashboard|api|static|csv|artifacts)(/.*)?|/|/favicon\.ico")
"""What the dashboard answers; anything else is nobody's."""

_NOTES = re.compile(r"/api/studies/\d+(/\d+)?/note")
"""A note on a study or on a trial is an attribute of the study that regtune never reads."""

_INSTEAD = (
    ("POST", r"/api/studies", "post a study with POST /v1/studies"),
    ("POST", r"/api/studies/\d+/rename", "post it under another name with POST /v1/studies"),
    ("DELETE", r"/api/studies/\d+", "delete a study that is over with DELETE /v1/studies/{name}"),
    (
        "POST",
        r"/api/trials/\d+/tell",
        "a trial is ended by its worker alone; end the whole study with "
        "POST /v1/studies/{name}/stop or POST /v1/studies/{name}/cancel",
    ),
)


class Dashboard:
    """An ASGI app that lets through what only reads, and notes."""

    def __init__(
        self, url: str, connections: int, max_body_bytes: int, *, proxied: bool = False
    ) -> None:
        self._url = url
        self._proxied = proxied
        self._connections = connections
        self._max_body_bytes = max_body_bytes
        self._made: ASGIApp | None = None
        self._making = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http" or not _PAGES.fullmatch(scope["path"]):
            raise HTTPException(404)
        if scope["method"] in ("GET", "HEAD"):
            await (await self._app())(scope, receive, send)
        elif scope["method"] == "PUT" and _NOTES.fullmatch(scope["path"]):
            body = await read_within(Request(scope, receive), self._max_body_bytes)
            await (await self._app())(scope, _again(body, receive), send)
        else:
            detail = f"the dashboard only looks on: {_instead(scope['method'], scope['path'])}"
            # The dashboard's pages show the member `reason`.
            await problem(403, detail, kind="dashboard-looks-on", reason=detail)(
                scope, receive, send
            )

    async def _app(self) -> ASGIApp:
        """Return the dashboard, made when it is first asked for: it connects as it is made."""
        async with self._making:
            if self._made is None:
                self._made = await run_in_threadpool(
                    _dashboard, self._url, self._connections, self._proxied
                )
        return self._made


def _dashboard(url: str, connections: int, proxied: bool) -> ASGIApp:
    # Imported late: it brings scikit-learn along, which takes as long as all the rest together.
    from optuna_dashboard import wsgi

    # A storage that caches: with a bare RDBStorage each poll reads every trial anew.
    try:
        storage = optuna.storages.get_storage(
            optuna.storages.RDBStorage(
                database.address(url),
                engine_kwargs={
                    "pool_size": connections,
                    "max_overflow": 0,
                    "pool_pre_ping": True,
                    "connect_args": database.connect_args(
                        database.normalized(url), "dashboard", proxied
                    ),
                },
                skip_table_creation=True,
            )
        )
    except StorageInternalError as error:
        raise DatabaseUnavailable from error
    return cast("ASGIApp", WSGIMiddleware(wsgi(storage), workers=connections))


def _again(body: bytes, receive: Receive) -> Receive:
    """Return a ``receive`` that gives a body that was read already."""
    messages: Iterable[Message] = iter(
        ({"type": "http.request", "body": body, "more_body": False},)
    )

    async def receive_again() -> Message:
        for message in messages:
            return message
        return await receive()

    return receive_again


def _instead(method: str, path: str) -> str:
    for known_method, pattern, instead in _INSTEAD:
        if method == known_method and re.fullmatch(pattern, path):
            return instead
    return "what changes a study goes through the REST API, see /docs"
