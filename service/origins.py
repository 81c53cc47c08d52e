"""Keeps pages of other sites, which a browser may show beside, from acting on studies."""

from http import HTTPStatus
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from service.problems import problem

_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")


class SameOrigin:
    """Refuses what a page of another site asks for, unless it only looks.

    Browsers name the page's origin in ``Origin`` whenever more than that is asked for (Fetch
    standard, section 3.1); other clients send none. A verb has no body, so a browser does not ask
    first whether the page may send it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or let the app answer."""
        if scope["type"] == "http" and scope["method"] not in _SAFE_METHODS:
            headers = Headers(scope=scope)
            origin, host = headers.get("origin"), headers.get("host", "")
            if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
                refusal = problem(
                    HTTPStatus.FORBIDDEN,
                    f"a page of {origin!a} may not change what is at {host!a}; a proxy between "
                    "must pass the header Host on as it is",
                    kind="foreign-origin",
                    title="The request comes from a page of another site.",
                )
                await refusal(scope, receive, send)
                return
        await self._app(scope, receive, send)
