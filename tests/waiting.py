"""Waiting for what must come, as long as it takes within reason."""

import socket
import time
from collections.abc import Callable


def wait_until(condition: Callable[[], object], seconds: float = 30) -> None:
    """Return once a condition holds; fail if it does not in time."""
    due = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < due, "waited in vain"
        time.sleep(0.01)


def free_port() -> int:
    """A port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
