"""Reading a stream of server-sent events, and what is said of a refusal."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest

from regtune import client
from regtune.client import Client, Refused, ServiceUnreachable, server_sent_events
from regtune.errors import FieldError

STREAM = """\
id: 7-1
event: trial_started
data: {"kind":
data: "trial_started"}

: ping

id: 7-2
data:{}

id: 7-3
data: cut off
"""


def test_events_are_read_from_their_lines_and_pings_and_what_is_cut_off_are_left_out() -> None:
    events = list(server_sent_events(STREAM.splitlines()))
    assert events == [("7-1", '{"kind":\n"trial_started"}'), ("7-2", "{}")]


def test_a_refusal_names_every_field() -> None:
    wrong = FieldError("budget.trials", "must be at least 1"), FieldError("name", "is required")
    refusal = Refused(422, "The study cannot be run.", "both; again", wrong)
    assert str(refusal) == (
        "The study cannot be run.\n  budget.trials: must be at least 1\n  name: is required"
    )


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1", "http://no.such.host.invalid", "127.0.0.1:1"]
)
def test_a_service_that_is_not_there_is_unreachable(url: str) -> None:
    with Client(url) as api:
        with pytest.raises(ServiceUnreachable, match=url):
            api.study("digits")
        with pytest.raises(ServiceUnreachable, match=url):
            next(api.events("digits"))


def test_a_proxy_that_this_machine_cannot_use_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1")
    with pytest.raises(ServiceUnreachable, match=r"tuner\.example.*socks"):
        Client("http://tuner.example")


def test_a_name_that_is_no_text_is_nobodys(monkeypatch: pytest.MonkeyPatch) -> None:
    with Client("http://127.0.0.1:1") as api, pytest.raises(ServiceUnreachable):
        api.study("\udcff")


@contextmanager
def answered_by(handler: type[BaseHTTPRequestHandler], requests: int = 1) -> Iterator[Client]:
    """A client of something else, which answers so many requests."""
    with HTTPServer(("127.0.0.1", 0), handler) as server:

        def serve() -> None:
            for _ in range(requests):
                server.handle_request()

        Thread(target=serve, daemon=True).start()
        host, port = server.server_address[:2]
        with Client(f"http://{host!s}:{port}") as api:
            yield api


def test_an_answer_that_is_no_problem_document_is_still_a_refusal() -> None:
    with answered_by(BaseHTTPRequestHandler) as api, pytest.raises(Refused, match="501"):
        api.study("digits")


class Portal(BaseHTTPRequestHandler):
    """Answers whatever is asked with a page for people."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<h1>Welcome</h1>")

    do_POST = do_GET  # noqa: N815 - as the base class wants it


def test_a_page_of_something_else_is_no_answer() -> None:
    with answered_by(Portal, requests=2) as api:
        with pytest.raises(Refused, match=r"'text/html'.*REGTUNE_URL"):
            api.study("digits")
        with pytest.raises(Refused, match="'text/html'"):
            api.submit({"name": "digits"})


class Elsewhere(BaseHTTPRequestHandler):
    def do_DELETE(self) -> None:
        self.send_response(307)
        self.send_header("Location", "https://elsewhere.invalid/")
        self.end_headers()


def test_what_is_redirected_is_not_done() -> None:
    """As by a proxy that wants another scheme."""
    with answered_by(Elsewhere) as api, pytest.raises(Refused, match="307"):
        api.delete("digits")


class Shaky(BaseHTTPRequestHandler):
    """Answers a request after another: busy, an event, half of one, the last one, no more."""

    seen: list[str | None]
    answers = (
        (503, b""),
        (200, b'id: 7-1\ndata: {"kind": "study_created"}\n\n'),
        (200, b"id: 7-2\nda"),
        (200, b'id: 7-2\ndata: {"kind": "study_ended"}\n\n'),
        (204, b""),
    )

    def do_GET(self) -> None:
        seen = type(self).seen
        status, body = self.answers[len(seen)]
        seen.append(self.headers.get("Last-Event-ID"))
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)


def test_events_are_read_to_the_end_however_often_the_stream_breaks_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client, "_RECONNECT_SECONDS", 0)
    handler = type("Shaky", (Shaky,), {"seen": []})
    with answered_by(handler, len(Shaky.answers)) as api:
        assert [event["kind"] for event in api.events("x")] == ["study_created", "study_ended"]
    assert handler.seen == [None, None, "7-1", "7-1", "7-2"]


class Recovering(BaseHTTPRequestHandler):
    """Shows a study that trains, is away for two looks, and shows that it has ended."""

    answers = iter([(200, None), (502, None), (503, None), (200, "now")])

    def do_GET(self) -> None:
        status, finished_at = next(self.answers)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps({"finished_at": finished_at}).encode())


def test_whoever_waits_bears_a_service_that_is_away_for_a_moment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client, "_RECONNECT_SECONDS", 0)
    with answered_by(Recovering, 4) as api:
        assert api.wait("x", lambda: None)["finished_at"] == "now"


class Gone(Shaky):
    """Tells of a study's end, and does not know it any more."""

    answers = ((200, b'id: 7-1\ndata: {"kind": "study_ended"}\n\n'), (404, b""))


class Busy(Shaky):
    answers = ((200, b'{"finished_at": null}'), (503, b""))


def test_a_study_that_is_deleted_once_it_has_ended_has_told_everything() -> None:
    handler = type("Gone", (Gone,), {"seen": []})
    with answered_by(handler, 2) as api:
        assert [event["kind"] for event in api.events("x")] == ["study_ended"]
    assert len(handler.seen) == 2


def test_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_PATIENCE_SECONDS", 0)
    handler = type("Busy", (Busy,), {"seen": []})
    with answered_by(handler, 2) as api, pytest.raises(Refused, match="503"):
        api.wait("x", lambda: None)


def test_what_is_refused_for_good_is_not_asked_again() -> None:
    handler = type("Away", (Busy,), {"seen": [], "answers": ((422, b""), (204, b""))})
    with answered_by(handler, 2) as api, pytest.raises(Refused, match="422"):
        next(api.events("x"))
    assert len(handler.seen) == 1
