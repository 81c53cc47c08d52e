"""The scheduler: one thread a service process; it leads what no other replica leads."""

import threading
import time
from collections.abc import Collection, Mapping, Set

import structlog
from sqlalchemy import Engine

from regtune import database, shares, studies
from regtune.errors import NotFound, StaleView, StudyUnreadable, storable
from regtune.settings import Settings
from service.scheduler import glances
from service.scheduler.conductor import Conductor
from service.scheduler.glances import Glance
from service.scheduler.leadership import SILENT_SECONDS, Leadership

log = structlog.get_logger()

MAX_ERRORS = 5
"""A study whose sampler raises so many times in a row fails; the others go on."""

_LONGEST_PAUSE_SECONDS = 0.25
"""Between two glances: epochs wait at most so long to be judged, about as often as one worker
reports them, and an ended trial for its successor."""

_SHORTEST_PAUSE_SECONDS = 0.005
"""Less than a trial takes that hardly trains; a glance at a few of them takes 0.7 ms."""

_PAUSE_SECONDS_PER_TRIAL = 0.0003
"""Where trials have ended or are wanted, the next glance is the sooner the fewer are open: of many,
several end even in a longer pause, and of few, none may be trained any more."""

_LEAVE_SECONDS = 60.0
"""How long a study that this version cannot read is left to replicas of another one."""

_PAUSE_FOR_GLANCE = 2
"""A pause is at least so many times as long as the glance before it took."""


_SILENT_POLLS = 4
"""Polls that a replica may miss before it leads nothing any more."""


class Scheduler:
    """Conducts studies from ``start()`` to ``stop()``; any number of replicas may run.

    ``url`` is the address of the database itself, with no proxy in between: notifications and the
    locks of the studies that it leads need sessions of their own.
    """

    def __init__(self, engine: Engine, url: str, settings: Settings) -> None:
        self._engine = engine
        self._url = url
        self._settings = settings
        self._leadership = Leadership(
            database.connect(url, pool_size=1, program="scheduler-locks"),
            max(SILENT_SECONDS, _SILENT_POLLS * settings.poll_seconds),
        )
        self._conductors: dict[int, Conductor] = {}
        self._errors: dict[int, int] = {}
        self._unfinished: set[int] = set()
        self._stale: set[int] = set()
        self._left_until: dict[int, float] = {}
        self._pause = _LONGEST_PAUSE_SECONDS
        self._glance_due = 0.0
        self._settling_due = 0.0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop, let go of all studies, and wait for the thread to end."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        """Conduct until told to stop; what nobody has foreseen costs a pause and what is known."""
        try:
            while not self._stopping.is_set():
                try:
                    self._conduct_until_stopped()
                except Exception:
                    log.exception("scheduler_failed")
                    self._let_go()
                    self._stopping.wait(self._settings.poll_seconds)
        finally:
            self._leadership.give_up()

    def _conduct_until_stopped(self) -> None:
        with database.Listener(self._url, database.NEWS, program="scheduler") as listener:
            due = 0.0
            news = listener.wait(0)  # listening before anything is read
            while not self._stopping.is_set():
                everyone = time.monotonic() >= due
                if everyone:
                    due = time.monotonic() + self._settings.poll_seconds
                if everyone or news:
                    self._attend(None if everyone else news)
                patience = max(0.0, min(due, self._glance_due) - time.monotonic())
                news = listener.wait(0 if self._unfinished else patience) | self._unfinished
                news |= self._glance()

    def _glance(self) -> set[int]:
        """Return which of the studies that it leads want a round, if it is time for a glance."""
        began = time.monotonic()
        if began < self._glance_due:
            return set()
        seen = self._seen_now() if self._conductors else {}
        busy = {id_ for id_, one in seen.items() if self._conductors[id_].has_ends_or_wants(one)}
        judged = {id_ for id_, one in seen.items() if self._conductors[id_].has_epochs(one)}
        took = time.monotonic() - began
        pause = sum(one.open for one in seen.values()) * _PAUSE_SECONDS_PER_TRIAL
        pause = max(pause if busy else 2 * self._pause, _PAUSE_FOR_GLANCE * took)
        self._pause = min(max(pause, _SHORTEST_PAUSE_SECONDS), _LONGEST_PAUSE_SECONDS)
        self._glance_due = time.monotonic() + self._pause
        return busy | judged

    def _seen_now(self) -> Mapping[int, Glance]:
        try:
            with database.transaction(self._engine) as session:
                return glances.of_each(
                    session,
                    self._conductors,
                    self._settings.lease_seconds,
                    self._settings.suspect_from,
                )
        except database.FAULTS as error:
            self._lose_touch(error)
            return {}

    def _attend(self, news: set[int] | None) -> None:
        """Conduct the studies of which there is news, all of them if None."""
        self._unfinished.clear()
        try:
            if news is not None and news <= self._conductors.keys():
                self._conduct_each(news)
                return
            if news is None or time.monotonic() >= self._settling_due:
                self._settling_due = time.monotonic() + self._settings.poll_seconds
                with database.transaction(self._engine) as session:
                    shares.settle(session)
            with database.transaction(self._engine) as session:
                live = studies.live_ids(session)
            self._forget_all_but(live)
            self._leadership.claim(id_ for id_ in live if not self._is_left(id_))
        except database.FAULTS as error:
            self._lose_touch(error)
            return
        led = self._leadership.led
        self._conductors = {id_: c for id_, c in self._conductors.items() if id_ in led}
        self._conduct_each(led if news is None else led & news)

    def _conduct_each(self, study_ids: Set[int]) -> None:
        for study_id in sorted(study_ids):
            if self._stopping.is_set():
                return
            try:
                self._leadership.stay()
            except database.FAULTS as error:
                self._lose_touch(error)
                return
            if study_id in self._leadership.led:  # none, once the connection has been lost
                self._conduct(study_id)

    def _forget_all_but(self, live: Collection[int]) -> None:
        self._stale.intersection_update(live)
        self._left_until = {id_: end for id_, end in self._left_until.items() if id_ in live}

    def _is_left(self, study_id: int) -> bool:
        return time.monotonic() < self._left_until.get(study_id, 0.0)

    def _conduct(self, study_id: int) -> None:
        """Give one study a round; whatever goes wrong with it stays with it."""
        try:
            if study_id not in self._conductors:
                self._conductors[study_id] = Conductor(self._engine, self._settings, study_id)
            if self._conductors[study_id].round():
                self._unfinished.add(study_id)
            self._errors.pop(study_id, None)
            self._stale.discard(study_id)
        except (StaleView, NotFound) as error:
            log.info("mirror_stale", study_id=study_id, reason=str(error))
            self._conductors.pop(study_id, None)
            # At once, but for one that is stale when it has just been read: that takes its time.
            if study_id not in self._stale:
                self._unfinished.add(study_id)
            self._stale ^= {study_id}
        except StudyUnreadable as error:  # a replica of that version may lead it
            log.error("study_unread", study_id=study_id, reason=str(error))
            self._conductors.pop(study_id, None)
            self._left_until[study_id] = time.monotonic() + _LEAVE_SECONDS
        except Exception as error:  # noqa: BLE001 - a sampler may raise anything
            if database.is_outage(error):
                self._lose_touch(error)
                return
            self._conductors.pop(study_id, None)
            self._count_error(study_id, error)

    def _count_error(self, study_id: int, error: Exception) -> None:
        log.exception("round_failed", study_id=study_id)
        count = self._errors[study_id] = self._errors.get(study_id, 0) + 1
        if count < MAX_ERRORS:
            return
        reason = f"the scheduler failed {count} times: {type(error).__name__}: {error}"
        try:
            with database.transaction(self._engine) as session:
                studies.fail(session, study_id, storable(reason), "scheduler")
        except Exception:
            # It may be its very row that cannot be read; the other studies go on.
            log.exception("study_not_failed", study_id=study_id)

    def _lose_touch(self, error: Exception) -> None:
        """Forget everything that rested on the database connection; the next poll starts anew."""
        log.warning("database_lost", error=str(error).splitlines()[0])
        self._let_go()

    def _let_go(self) -> None:
        self._leadership.give_up()
        self._conductors.clear()
