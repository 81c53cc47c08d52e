"""The service, for tests that talk to it over HTTP."""

from collections.abc import Iterator

import httpx
import pytest

from regtune import logs
from regtune.settings import Settings
from tests.serving import app, serving


@pytest.fixture
def client(database_url: str) -> Iterator[httpx.Client]:
    """A client of a service on a fresh database, without a scheduler."""
    with serving(app(database_url)) as client:
        yield client


@pytest.fixture(scope="session", autouse=True)
def _logs() -> None:
    """Logs as a program writes them; structlog would draw all variables of a traceback."""
    logs.configure(Settings())
