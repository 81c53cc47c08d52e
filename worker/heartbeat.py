"""The heartbeat: renews the leases through a long epoch, and only while training makes progress.

A worker that hangs, in a model's code or in a driver, takes no step; then its leases run out and
its trials go to others. If it still hangs long after that, it will for ever: the process ends, so
that a new one can use its device.
"""

import faulthandler
import os
import threading
import time
from collections.abc import Callable

import structlog

log = structlog.get_logger()

BEATS_A_LEASE = 3

HUNG = 70
"""The exit code of a worker that hung: an internal error, as in sysexits.h."""


def end_process() -> None:
    """End this process at once, and say where all of its threads stand."""
    faulthandler.dump_traceback(all_threads=True)
    os._exit(HUNG)


class Heartbeat:
    """Calls ``renew`` several times a lease, whenever at least one step was taken since.

    Calls ``give_up`` when none was taken for ``hung_seconds``. What is ``between_steps`` counts as
    a step that goes on.
    """

    def __init__(
        self,
        renew: Callable[[], None],
        lease_seconds: float,
        hung_seconds: float,
        give_up: Callable[[], None] = end_process,
        between_steps: Callable[[], bool] = lambda: False,
    ) -> None:
        """``renew`` must not block."""
        self._between_steps = between_steps
        self._renew = renew
        self._give_up = give_up
        self._seconds = lease_seconds / BEATS_A_LEASE
        self._patience = hung_seconds
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
        seen, seen_at = self._steps, time.monotonic()
        while not self._stopping.wait(self._seconds):
            if self._steps != seen or self._between_steps():
                seen, seen_at = self._steps, time.monotonic()
                self._beat()
            elif time.monotonic() - seen_at > self._patience:
                log.error("hung", seconds=round(time.monotonic() - seen_at))
                self._give_up()
                return

    def _beat(self) -> None:
        try:
            self._renew()
        except Exception as error:  # noqa: BLE001 - whatever it is must not end the beat
            log.warning("renewal_failed", error=str(error).splitlines()[0])
