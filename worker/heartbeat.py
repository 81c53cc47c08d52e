"""The heartbeat: renews the leases through a long epoch, and only while training makes progress.

A worker that hangs, in a model's code or in a driver, takes no step; then its leases run out and
its trials go to others.
"""

import threading
from collections.abc import Callable

import structlog

log = structlog.get_logger()


class Heartbeat:
    """Calls ``renew`` every ``seconds`` in which at least one step was taken."""

    def __init__(self, renew: Callable[[], None], seconds: float) -> None:
        self._renew = renew
        self._seconds = seconds
        self._steps = 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Start beating."""
        self._thread.start()

    def stop(self) -> None:
        """Stop beating, and wait for the last beat to end."""
        self._stopping.set()
        self._thread.join()

    def step(self) -> None:
        """Note that training has made progress."""
        self._steps += 1

    def _run(self) -> None:
        seen = self._steps
        while not self._stopping.wait(self._seconds):
            steps = self._steps
            if steps == seen:
                continue
            seen = steps
            try:
                self._renew()
            except Exception as error:  # noqa: BLE001 - a lost connection must not end the beat
                log.warning("renewal_failed", error=str(error).splitlines()[0])
