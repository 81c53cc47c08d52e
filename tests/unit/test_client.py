"""Reading a stream of server-sent events, and what is said of a refusal."""

from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest

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


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://no.such.host.invalid"])
def test_a_service_that_is_not_there_is_unreachable(url: str) -> None:
    with Client(url) as api, pytest.raises(ServiceUnreachable, match=url):
        api.study("digits")


@contextmanager
def answered_by(handler: type[BaseHTTPRequestHandler]) -> Iterator[Client]:
    """A client of something else, which answers one request."""
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.handle_request).start()
        host, port = server.server_address[:2]
        with Client(f"http://{host!s}:{port}") as api:
            yield api


def test_an_answer_that_is_no_problem_document_is_still_a_refusal() -> None:
    with answered_by(BaseHTTPRequestHandler) as api, pytest.raises(Refused, match="501"):
        api.study("digits")


class Elsewhere(BaseHTTPRequestHandler):
    def do_DELETE(self) -> None:
        self.send_response(307)
        self.send_header("Location", "https://elsewhere.invalid/")
        self.end_headers()


def test_what_is_redirected_is_not_done() -> None:
    """As by a proxy that wants another scheme."""
    with answered_by(Elsewhere) as api, pytest.raises(Refused, match="307"):
        api.delete("digits")
