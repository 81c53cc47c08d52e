"""Looks for new events once for all who watch, and wakes those whom they concern.

One thread a process and one statement a look, however many streams are open; none before the first.
Nobody notifies it: events come all the time, and with each notification PostgreSQL would wake every
session that listens in the database.
"""

import asyncio
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from sqlalchemy import Engine

from regtune import database, events

_PAUSE_SECONDS = 0.25
"""Between two looks."""


@dataclass(eq=False)
class Watch:
    """Somebody who waits for events of one study, on an event loop."""

    study_id: int
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    def wake(self) -> None:
        """Say that there are events; from any thread."""
        self._loop.call_soon_threadsafe(self._news.set)

    async def wait(self, seconds: float) -> None:
        """Wait for events since the last call, or until so many seconds are over."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._news.wait(), seconds)
        self._news.clear()


class Newsroom:
    """Looks from the first watch to ``stop()``."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._watches: dict[Watch, str | None] = {}
        """The newest event at the last look, by who watches; None before the first."""
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def stop(self) -> None:
        """Stop looking."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()

    @contextmanager
    def watch(self, study_id: int) -> Iterator[Watch]:
        """Watch one study for as long as the block lasts."""
        watch = Watch(study_id)
        with self._lock:
            self._watches[watch] = None
            if self._thread is None:
                self._thread = threading.Thread(target=self._look, name="newsroom", daemon=True)
                self._thread.start()
        try:
            yield watch
        finally:
            with self._lock:
                del self._watches[watch]

    def _look(self) -> None:
        while not self._stopping.wait(_PAUSE_SECONDS):
            with self._lock:
                watched = {watch.study_id for watch in self._watches}
            # A look that fails is left out: those who watch read for themselves, and find out.
            with suppress(*database.FAULTS):
                self._wake(self._newest(watched) if watched else {})

    def _newest(self, study_ids: Iterable[int]) -> Mapping[int, str]:
        with database.transaction(self._engine) as session:
            return events.newest(session, study_ids)

    def _wake(self, newest: Mapping[int, str]) -> None:
        # Under the lock, so that no watch ends, and its loop with it, while it is being woken.
        with self._lock:
            for watch, seen in self._watches.items():
                last = newest.get(watch.study_id)
                if last != seen:
                    self._watches[watch] = last
                    watch.wake()
