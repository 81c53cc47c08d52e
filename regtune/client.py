"""A client of the REST API.

    with Client() as client:
        study, _ = client.submit(Path("digits.yaml"))
        client.wait(study["name"])
        print(client.best(study["name"]))

Answers are the service's JSON documents; every field is described in its OpenAPI pages, ``/docs``.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import quote

import httpx
from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_fixed

from regtune.errors import FieldError, RegtuneError
from regtune.settings import Settings

Document = dict[str, Any]
Verb = Literal["pause", "resume", "stop", "cancel"]

_TIMEOUT = httpx.Timeout(30.0, connect=5.0)
_STREAM_TIMEOUT = httpx.Timeout(30.0, connect=5.0, read=60.0)
"""A stream of events that says nothing for so long, not even a ping, is opened again."""

_RECONNECT_SECONDS = 1.0

_PATIENCE_SECONDS = 30.0
"""How long a watched study's service may be away, as while another replica takes over."""

_COME_AGAIN = (
    httpx.codes.TOO_MANY_REQUESTS,
    httpx.codes.BAD_GATEWAY,
    httpx.codes.SERVICE_UNAVAILABLE,
    httpx.codes.GATEWAY_TIMEOUT,
)
"""What a service says, or a proxy before it, that may answer a moment later."""


class ServiceUnreachable(RegtuneError):
    """The service cannot be reached."""


class Refused(RegtuneError):
    """The service refused a request; it says why, field by field where it can."""

    def __init__(
        self, status: int, title: str, detail: str = "", errors: tuple[FieldError, ...] = ()
    ) -> None:
        """Keep the members of an RFC 9457 problem document."""
        self.status = status
        self.title = title
        self.detail = detail
        self.errors = errors
        headline = title if errors or not detail else detail
        super().__init__("\n".join([headline, *(f"  {error}" for error in errors)]))

    @property
    def is_temporary(self) -> bool:
        """Whether the same request may be answered a moment later."""
        return self.status in _COME_AGAIN


class Client:
    """Talks to a service; ``url`` is its address, by default ``REGTUNE_URL``.

    Every method raises ServiceUnreachable or Refused, and an address that is none the former.
    """

    def __init__(self, url: str | None = None) -> None:
        self.url = (url or Settings().url).rstrip("/")
        # A proxy that is set for the outside world has no way to this machine itself.
        try:
            local = httpx.URL(self.url).host in ("127.0.0.1", "::1", "localhost")
            self._http = httpx.Client(base_url=self.url, timeout=_TIMEOUT, trust_env=not local)
        except (httpx.InvalidURL, ImportError, ValueError) as error:  # the latter of a proxy
            raise self._unreachable(error) from None

    def submit(self, spec: Mapping[str, Any] | Path | str) -> tuple[Document, bool]:
        """Submit a study: a mapping, a YAML file or YAML text; return it and whether it is new.

        Raise OSError for a file that cannot be read.
        """
        if isinstance(spec, Mapping):
            body, media_type = json.dumps(spec).encode(), "application/json"
        else:
            # As it came, if it came from a terminal or a pipe that Python could not decode.
            escaped = "surrogateescape"
            body = spec.read_bytes() if isinstance(spec, Path) else spec.encode(errors=escaped)
            media_type = "application/yaml"
        headers = {"Content-Type": media_type}
        response = self._request("POST", "/v1/studies", content=body, headers=headers)
        return _document(response), response.status_code == httpx.codes.CREATED

    def study(self, name: str) -> Document:
        """Return a study: its spec, state, progress and best trial so far."""
        return self._get(_path(name))

    def study_patiently(self, name: str, pause: Callable[[float], None] = time.sleep) -> Document:
        """Return a study; try again for a while if the service is away, or asks to come again.

        ``pause`` lets so many seconds pass between two tries.
        """
        tries = Retrying(
            retry=retry_if_exception(_is_temporary),
            wait=wait_fixed(_RECONNECT_SECONDS),
            stop=stop_after_delay(_PATIENCE_SECONDS),
            sleep=pause,
            reraise=True,
        )
        return tries(self.study, name)

    def studies(self, state: str | None = None) -> Iterator[Document]:
        """Yield all studies, or those of one state, newest first."""
        return self._pages("/v1/studies", state=state)

    def trials(
        self, name: str, state: str | None = None, order_by: str | None = None
    ) -> Iterator[Document]:
        """Yield a study's trials, by number or, with ``order_by="value"``, the best first."""
        return self._pages(f"{_path(name)}/trials", state=state, order_by=order_by)

    def trial(self, name: str, number: int) -> Document:
        """Return one trial with its epochs."""
        return self._get(f"{_path(name)}/trials/{number}")

    def best(self, name: str) -> Document:
        """Return the best trial and the reference points; Refused, 404, until there is one."""
        return self._get(f"{_path(name)}/best")

    def act(self, name: str, verb: Verb) -> Document:
        """Pause, resume, stop or cancel a study; return how it stands then."""
        return _document(self._request("POST", f"{_path(name)}/{verb}"))

    def change(self, name: str, changes: Mapping[str, Any]) -> Document:
        """Change a live study, as ``{"budget": {"trials": 80}, "priority": 3}``; return it.

        What is left out stays; None takes a limit of the budget away.
        """
        return _document(self._request("PATCH", _path(name), json=dict(changes)))

    def delete(self, name: str) -> None:
        """Delete a study that is over, with all its trials; its history stays."""
        self._request("DELETE", _path(name))

    def history(self, name: str, trials: bool = False) -> Iterator[Document]:
        """Yield who did what to a study, oldest first; ``trials``: also what happened to those.

        A deleted study's history stays under its name.
        """
        return self._pages(f"{_path(name)}/history", trials="true" if trials else None)

    def workers(self) -> Iterator[Document]:
        """Yield the workers, living ones first."""
        return self._pages("/v1/workers")

    def ready(self) -> bool:
        """Say whether the service is up and its database as it should be."""
        try:
            self._get("/readyz")
        except RegtuneError:
            return False
        return True

    def events(self, name: str, after: str | None = None) -> Iterator[Document]:
        """Yield what happens to a study and its trials, from its beginning until it has ended.

        ``after`` is the ``cursor`` of the last event that is known already. A stream that breaks
        off is taken up again where it broke, for as long as it takes.
        """
        is_over = has_answered = False
        while True:
            known = after
            try:
                with self._streaming(f"{_path(name)}/events", after) as response:
                    has_answered = True
                    if response.status_code == httpx.codes.NO_CONTENT:
                        return
                    for after, data in server_sent_events(response.iter_lines()):
                        event = {"cursor": after, **json.loads(data)}
                        yield event
                        is_over |= event["kind"] == "study_ended"
                        if event["kind"] == "study_deleted":  # its name may be another's by now
                            return
            except (httpx.TransportError, Refused) as error:
                if is_over:  # deleted since, or the service has gone with it
                    return
                if isinstance(error, Refused):
                    if not error.is_temporary:
                        raise
                elif not has_answered:
                    raise self._unreachable(error) from None
            if after == known:
                time.sleep(_RECONNECT_SECONDS)

    def wait(self, name: str, pause: Callable[[], None] = lambda: time.sleep(1)) -> Document:
        """Wait until a study is over; return it.

        ``pause`` is called between two looks, and may raise to give up.
        """
        study = self.study(name)
        while is_live(study):
            pause()
            study = self.study_patiently(name, lambda _: pause())
        return study

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _pages(self, path: str, **parameters: str | None) -> Iterator[Document]:
        query = {name: value for name, value in parameters.items() if value is not None}
        while True:
            page = self._get(path, query)
            yield from page["items"]
            if page.get("next") is None:
                return
            query["cursor"] = page["next"]

    @contextmanager
    def _streaming(self, path: str, after: str | None) -> Iterator[httpx.Response]:
        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": after} if after else {})
        with self._http.stream("GET", path, headers=headers, timeout=_STREAM_TIMEOUT) as response:
            if not response.is_success:  # a redirection is none either
                response.read()
                raise _refused(response)
            yield response

    def _get(self, path: str, query: Mapping[str, str] | None = None) -> Document:
        return _document(self._request("GET", path, params=query))

    def _request(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            response = self._http.request(method, path, **options)
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise self._unreachable(error) from None
        if not response.is_success:  # a redirection is none either
            raise _refused(response)
        return response

    def _unreachable(self, error: Exception) -> ServiceUnreachable:
        return ServiceUnreachable(
            f"the service cannot be reached at {self.url} ({error}); "
            "is it running (`regtune up`), and is REGTUNE_URL right?"
        )


def is_live(study: Mapping[str, Any]) -> bool:
    """Say whether a study may still change by itself."""
    return study["finished_at"] is None


def server_sent_events(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield id and data of each event in a stream's lines; pings have no data.

    As the WHATWG's HTML standard, section 9.2.6, has it, for the fields that are used here.
    """
    last_id, data = "", list[str]()
    for line in lines:
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "id":
            last_id = value
        elif field == "data":
            data.append(value)
        elif not line and data:
            yield last_id, "\n".join(data)
            data = []


def _is_temporary(error: BaseException) -> bool:
    return isinstance(error, ServiceUnreachable) or (
        isinstance(error, Refused) and error.is_temporary
    )


def _path(name: str) -> str:
    return f"/v1/studies/{quote(name, safe='', errors='replace')}"


def _document(response: httpx.Response) -> Document:
    """Read what the service has answered; Refused if it is something else that listens there."""
    with suppress(ValueError):
        if isinstance(document := response.json(), dict):
            return document
    raise Refused(
        response.status_code,
        f"unexpected answer of the type {response.headers.get('content-type', 'none')!r}: "
        "is this the address of a regtune service, and is REGTUNE_URL right?",
    )


def _refused(response: httpx.Response) -> Refused:
    """Read a problem document; what is none comes from something else that listens there."""
    try:
        problem = response.json()
        return Refused(
            response.status_code,
            problem["title"],
            problem.get("detail", ""),
            tuple(FieldError(e["field"], e["message"]) for e in problem.get("errors", ())),
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return Refused(response.status_code, f"unexpected answer {response.status_code}")
