"""Hears of news once for all who watch, and wakes those whom it concerns.

One connection and one thread a process, however many streams are open; none before the first.
"""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from regtune.database import NEWS, Listener

_SLICE_SECONDS = 0.5
"""How long ``stop()`` may have to wait."""


@dataclass(eq=False)
class Watch:
    """Somebody who waits for news of one study, on an event loop."""

    study_id: int
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    def wake(self) -> None:
        """Say that there is news; from any thread."""
        self._loop.call_soon_threadsafe(self._news.set)

    async def wait(self, seconds: float) -> None:
        """Wait for news since the last call, or until so many seconds are over."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._news.wait(), seconds)
        self._news.clear()


class Newsroom:
    """Listens from the first watch to ``stop()``."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._watches: set[Watch] = set()
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def stop(self) -> None:
        """Stop listening."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()

    @contextmanager
    def watch(self, study_id: int) -> Iterator[Watch]:
        """Watch one study for as long as the block lasts."""
        watch = Watch(study_id)
        with self._lock:
            self._watches.add(watch)
            if self._thread is None:
                self._thread = threading.Thread(target=self._listen, name="newsroom", daemon=True)
                self._thread.start()
        try:
            yield watch
        finally:
            with self._lock:
                self._watches.remove(watch)

    def _listen(self) -> None:
        with Listener(self._url, NEWS) as listener:
            while not self._stopping.is_set():
                self._wake(listener.wait(_SLICE_SECONDS))

    def _wake(self, study_ids: set[int]) -> None:
        # Under the lock, so that no watch ends, and its loop with it, while it is being woken.
        with self._lock:
            for watch in self._watches:
                if watch.study_id in study_ids:
                    watch.wake()
