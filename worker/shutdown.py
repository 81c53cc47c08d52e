"""Polite stops: the first SIGTERM or Ctrl-C gives the trials back, the second one kills.

So does the first one, should giving back take too long: a machine that is about to be taken away
does not wait, and a database that is gone would not come back for it. Whoever has not noticed by
then, as in a step that takes a minute, has its last words said for it before.
"""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

GRACE_SECONDS = 10.0
LAST_WORDS_SECONDS = 8.5

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(Exception):
    """The worker was told to stop in the middle of an epoch."""


class Shutdown:
    """Whether this process was told to stop."""

    def __init__(self) -> None:
        self._requested = threading.Event()
        self._number: int | None = None
        self._last_words: Callable[[], bool] = lambda: False

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self._requested.is_set()

    def install(self) -> None:
        """Listen to signals from here on; only the main thread can."""
        for number in _SIGNALS:
            signal.signal(number, self._on_signal)

    def request(self) -> None:
        """Ask for a stop, as the first signal does."""
        self._requested.set()

    def say_last(self, words: Callable[[], bool]) -> None:
        """Let ``words`` be called, from a thread of its own, if the process is still there then.

        They return whether it has nothing more to say, so that it may be ended.
        """
        self._last_words = words

    def check(self) -> None:
        """Raise Interrupted once a stop was asked for."""
        if self.requested:
            raise Interrupted

    def part(self) -> None:
        """Say the last words; end the process unless it has more to say itself."""
        if self._last_words():
            self.end_process()

    def end_process(self) -> None:
        """End this process at once, as one that the signal ended, if it was a signal."""
        if self._number is not None:
            os._exit(128 + self._number)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._number = number
        if self.requested:
            self.end_process()
        self.request()
        for seconds, act in ((LAST_WORDS_SECONDS, self.part), (GRACE_SECONDS, self.end_process)):
            timer = threading.Timer(seconds, act)
            timer.daemon = True
            timer.start()
