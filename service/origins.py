"""Keeps pages of other sites, which a browser may show beside, from acting on studies."""

from collections.abc import Collection
from http import HTTPStatus
from ipaddress import ip_address
from urllib.parse import urlsplit

from fastapi import Response
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from service.health import PROBES
from service.problems import problem

_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")


class SameOrigin:
    """Refuses what a page of another site asks for, unless it only looks.

    Browsers name the page's origin in ``Origin`` whenever more than that is asked for (Fetch
    standard, section 3.1); other clients send none. A verb has no body, so a browser does not ask
    first whether the page may send it.

    A site may also let its own name lead to the address of the visitor's machine (DNS rebinding):
    then its pages are of the same origin, and could read as well. So a service that listens on its
    own machine alone, or has been told its names, answers to those and to names of that machine.
    Whoever asks for its health is told nothing that a page could use.
    """

    def __init__(self, app: ASGIApp, address: str, names: Collection[str]) -> None:
        """``address`` is where the service listens; ``names`` are those that it has elsewhere."""
        self._app = app
        self._names = set(names) if names or _is_own_machine(address.lower()) else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or let the app answer."""
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        await (refusal or self._app)(scope, receive, send)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        origin, host = headers.get("origin"), headers.get("host", "")
        if host and scope["path"] not in PROBES and not self._is_called(host):
            return problem(
                HTTPStatus.MISDIRECTED_REQUEST,
                f"the service has not been told that it is {_name_in(host)!a}; ask it by localhost "
                "on its own machine, or start it with that name in REGTUNE_HOSTS if it is its own "
                "or that of a proxy in front of it",
                kind="unknown-host",
                title="The service is not known by this name.",
            )
        if (
            scope["method"] not in _SAFE_METHODS
            and origin is not None
            and urlsplit(origin).netloc.lower() != host.lower()
        ):
            return problem(
                HTTPStatus.FORBIDDEN,
                f"a page of {origin!a} may not change what is at {host!a}; a proxy between "
                "must pass the header Host on as it is",
                kind="foreign-origin",
                title="The request comes from a page of another site.",
            )
        return None

    def _is_called(self, host: str) -> bool:
        name = _name_in(host)
        return self._names is None or name in self._names or _is_own_machine(name)


def _name_in(host: str) -> str:
    """Return the name in a header ``Host``, without port, brackets and the dot of the root."""
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return host


def _is_own_machine(name: str) -> bool:
    """Say whether a name or an address is one that leads nowhere else, wherever it is asked."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return False
