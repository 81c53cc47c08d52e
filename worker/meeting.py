"""Meetings with the database, held in a thread, so that training never waits for it.

A meeting is one transaction: it records epochs, ends what has ended, gives back and leases trials,
and says how many lanes still want one; it leases in a second one if the study is locked just then.
While the database is away it is tried again, ever more
slowly, and training goes on. All that it writes is fenced by leases and may be written twice, so a
meeting whose answer was lost does no harm.
"""

import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from math import inf
from typing import Any, TypeVar

import structlog
from sqlalchemy import Engine as Database
from sqlalchemy.orm import Session
from tenacity import RetryCallState

from regtune import database, leasing, reporting, shapes, workers
from regtune.leasing import Lease
from regtune.reporting import Epoch, Outcome, Pruned, Verdicts
from regtune.settings import Settings
from regtune.spec import NO_SHAPE
from regtune.studies import Study
from worker.checkpoints import CheckpointStore, CheckpointWriter, Saved
from worker.heartbeat import BEATS_A_LEASE
from worker.patience import transact_patiently
from worker.training.checkpoint import Checkpoint
from worker.training.memory import is_out_of_memory

log = structlog.get_logger()

MEETING_SECONDS = 1.0
"""Ample time for a meeting to end that has begun, if the database is there."""

FLUSH_SECONDS = 30.0
"""What checkpoints may take to be written before others may lease their trials."""

RESUME_SECONDS = 120.0
"""What checkpoints may take to be read; trials of which none has come by then start anew."""

READERS = 8
"""Checkpoints that are read at once: an object store takes longer to answer than to send."""

T = TypeVar("T")


@dataclass(frozen=True)
class Report:
    """What a stack brings to a meeting; mappings are by trial id.

    ``ending_soon`` are trials that may end before the scheduler could answer; ``all_end_soon``
    says that trials are so short that this holds for those yet to be leased.
    """

    leases: Sequence[Lease]
    epochs: Mapping[int, Sequence[Epoch]]
    outcomes: Mapping[int, Outcome]
    given_back: frozenset[int]
    ending_soon: frozenset[int]
    all_end_soon: bool
    slots: int
    occupancy: float | None
    capacity: Mapping[str, Any]


@dataclass(frozen=True)
class Turn:
    """A study that lanes should go to, and one of its shapes; None until the study is read."""

    study_id: int
    shape: str | None = None


@dataclass(frozen=True)
class Answer:
    """What a stack takes home; ``resumed`` are those of ``joining`` that need not start anew.

    ``turn`` is whose trials free lanes should go to, None if there is none for them. ``busy`` says
    that the study was locked, so that nothing could be leased yet.
    """

    held: frozenset[int]
    ended: frozenset[int]
    joining: Sequence[Lease]
    resumed: Mapping[int, Saved]
    turn: Turn | None
    more_to_come: bool
    busy: bool = False

    @property
    def staying(self) -> frozenset[int]:
        """The trials that the worker may train on."""
        return self.held - self.ended


class Meetings:
    """Holds the meetings of one stack, one at a time."""

    def __init__(
        self,
        engine: Database,
        settings: Settings,
        study: Study,
        shape: str,
        worker: str,
        store: CheckpointStore,
        writer: CheckpointWriter,
        fits: Callable[[Checkpoint], bool],
        refused: Collection[int] = (),
    ) -> None:
        """``fits`` says whether a trial can go on from a checkpoint.

        ``shape`` is what the stack trains of the study. ``refused`` are studies that the worker
        cannot train.
        """
        self._database = engine
        self._settings = settings
        self._study = study
        self._shape = shape
        self._stays_until = time.monotonic() + settings.stay_seconds
        self._worker = worker
        self._store = store
        self._writer = writer
        self._fits = fits
        self._refused = refused
        self._pool = ThreadPoolExecutor(2, "meetings")
        self._closing = threading.Event()
        self._report: Report | None = None
        self._answer: Future[Answer] | None = None
        self._leased: Sequence[Lease] = ()
        self._renewal: Future[None] | None = None
        self._said: tuple[int, int | None] | None = None
        self._beat_due = 0.0
        self._renewed_at = -inf
        self._wanted = 0

    @property
    def unanswered(self) -> Report | None:
        """The report of the meeting that is under way, if one is."""
        return self._report

    def begin(self, report: Report) -> None:
        """Begin a meeting."""
        self._report = report
        self._answer = self._pool.submit(self._hold, report)

    def answer(self, seconds: float) -> Answer | None:
        """Wait for the answer; return None if it has not come in time, and may be asked again.

        Raises what the database has refused for good, and what says that there was no memory for a
        checkpoint.
        """
        if self._answer is None or not wait([self._answer], seconds).done:
            return None
        held, self._report, self._answer = self._answer, None, None
        answer = held.result()
        self._leased = ()
        return answer

    @property
    def beat_is_due(self) -> bool:
        """Whether an idle worker must be heard of."""
        return self._said is None or time.monotonic() >= self._beat_due

    def beat(self, report: Report) -> bool:
        """Say that an idle worker lives and all its lanes are free; return whether it is known.

        Raises what the database may.
        """
        study_id = self._said[1] if self._said else None
        try:
            with database.transaction(self._database) as session:
                self._said = None
                return self._beat(session, report, report.slots, study_id)
        except database.FAULTS:
            self._said = None  # it may not have been heard
            raise

    def renew(self, leases: Sequence[Lease]) -> None:
        """Renew leases in the middle of an epoch; the verdicts wait for its end.

        Not if a meeting has just done so. What the worker wants is what it wanted then.
        """
        # Half a beat ago at the most: the next try is a whole beat later.
        if time.monotonic() < self._renewed_at + self._settings.lease_seconds / BEATS_A_LEASE / 2:
            return
        if self._renewal is None or self._renewal.done():
            self._renewal = self._pool.submit(self._renew, leases)

    def part(self, report: Report, seconds: float) -> int | None:
        """Report for the last time and give everything else back; return how many trials.

        That includes what was leased in a meeting whose answer has not been taken.
        None if the database could not be reached in time; then the leases run out.
        """
        self._closing.set()
        if self._answer is not None:  # what a meeting leases that is under way is given back too
            wait([self._answer], MEETING_SECONDS)
        given_up = threading.Event()
        pool = ThreadPoolExecutor(1, "parting")
        parting = pool.submit(
            self._transact, lambda session: self._leave(session, report), given_up
        )
        done = wait([parting], seconds).done
        given_up.set()
        pool.shutdown(wait=False)
        return parting.result() if done and parting.exception() is None else None

    def abandon(self) -> Sequence[Lease]:
        """Hold no meeting any more; return what was leased in one whose answer was not taken."""
        self._closing.set()
        if self._answer is not None:
            wait([self._answer], MEETING_SECONDS)
        return list(self._leased)

    def close(self) -> None:
        """Let go of the threads, and of a meeting that is under way."""
        self._closing.set()
        self._pool.shutdown(wait=False)

    def _hold(self, report: Report) -> Answer:
        if report.given_back:
            self._writer.wait(FLUSH_SECONDS)
        began = time.monotonic()
        answer = self._transact(lambda session: self._meet(session, report), self._closing)
        self._renewed_at = began
        if answer.busy:
            answer = self._lease_apart(report, answer)
        self._leased = answer.joining
        again = [lease for lease in answer.joining if lease.attempt > 1]
        return self._resume(answer, again) if again else answer

    def _lease_apart(self, report: Report, first: Answer) -> Answer:
        """Lease, holding nothing, once whoever has locked the study is done with it."""
        return self._transact(
            lambda session: self._lease(session, report, first.held, first.ended, waits=True),
            self._closing,
        )

    def _transact(self, work: Callable[[Session], T], stop: threading.Event) -> T:
        """Do work in a transaction, again and again until the database is there; or stop."""
        return transact_patiently(self._database, work, stop, self._say)

    def _say(self, state: RetryCallState) -> None:
        self._said = None  # what this beat said may not have been heard
        error = state.outcome.exception() if state.outcome else None
        said = str(error).splitlines()[0] if error else ""
        log.warning("meeting_failed", study=self._study.name, error=said)

    def _meet(self, session: Session, report: Report) -> Answer:
        if report.given_back:
            leasing.share_study(session, self._study.study_id)
        verdicts = self._flush(session, report)
        ended = self._finish(session, report, verdicts)
        given_back = [lease for lease in report.leases if lease.trial_id in report.given_back]
        leasing.release(session, given_back, self._worker)
        kept = verdicts.held - report.given_back
        return self._lease(session, report, kept, ended, waits=not report.leases)

    def _flush(self, session: Session, report: Report) -> Verdicts:
        return reporting.flush(session, report.leases, report.epochs, self._settings.lease_seconds)

    def _finish(self, session: Session, report: Report, verdicts: Verdicts) -> frozenset[int]:
        """End what has ended by itself, and what the scheduler wants stopped; return both."""
        stopped = {id_: Pruned(reason) for id_, reason in verdicts.stop.items()}
        outcomes = {**stopped, **report.outcomes}
        endings = [
            (lease, outcomes[lease.trial_id])
            for lease in report.leases
            if lease.trial_id in outcomes
        ]
        reporting.finish(session, endings, self._worker)
        return frozenset(outcomes)

    def _lease(
        self,
        session: Session,
        report: Report,
        held: frozenset[int],
        ended: frozenset[int],
        *,
        waits: bool,
    ) -> Answer:
        """Lease trials for the free slots, if it is this study's turn; say how many more it wants.

        Those are the slots that stay free, and those whose trials may end before the scheduler
        could answer. A worker that leaves leases nothing.
        """
        study_id = self._study.study_id
        staying = [lease for lease in report.leases if lease.trial_id in held - ended]
        free = max(0, report.slots - len(staying))
        if any(self._is_suspect(lease) for lease in staying) or self._closing.is_set():
            free = 0
        turn: Turn | None = self._own_turn
        taken = leasing.Taken(study_id, [], more_to_come=True)
        if free:
            turn, taken = self._take(session, free, report, alone=not staying, waits=waits)
        joining = taken.leases
        if any(self._is_suspect(lease) for lease in joining):
            free = len(joining)
        wanted = free - len(joining) + self._ending_soon(report, staying, len(joining))
        has_part = bool(staying or joining or taken.more_to_come)
        self._beat(session, report, wanted, study_id if has_part else None)
        if self._closing.is_set():  # meanwhile
            leasing.release(session, joining, self._worker)
            joining = []
        return Answer(held, ended, joining, {}, turn, taken.more_to_come, taken.busy)

    def _take(
        self, session: Session, free: int, report: Report, *, alone: bool, waits: bool
    ) -> tuple[Turn | None, leasing.Taken]:
        """Return whose turn it is, and trials for the free slots if it is its own.

        That is this study and shape, another shape of it, or another study.
        """
        study_id, shape = self._study.study_id, self._choose_shape(session)
        taken = leasing.take(
            session,
            study_id,
            self._worker,
            free if shape == self._shape else 0,
            self._settings.lease_seconds,
            shape=self._shape,
            slots=report.slots,
            suspect_from=self._settings.suspect_from,
            alone=alone,
            stay_seconds=self._settings.stay_seconds,
            refused=self._refused,
            waits=waits,
        )
        if taken.turn != study_id:
            turn = None if taken.turn is None else Turn(taken.turn)
        else:
            turn = None if shape is None else Turn(study_id, shape)
        return turn, taken

    def _choose_shape(self, session: Session) -> str | None:
        """Return the shape whose turn it is in this study; None if no trial waits."""
        if self._shape == NO_SHAPE:
            return NO_SHAPE
        return shapes.choose(
            session,
            self._study.study_id,
            self._worker,
            current=self._shape_to_keep,
            suspect_from=self._settings.suspect_from,
        )

    @property
    def _own_turn(self) -> Turn:
        return Turn(self._study.study_id, self._shape)

    @property
    def _shape_to_keep(self) -> str | None:
        """Its shape for as long as it may pass over trials of others that have waited longer."""
        return self._shape if time.monotonic() < self._stays_until else None

    def _beat(self, session: Session, report: Report, wanted: int, study_id: int | None) -> bool:
        """Say that the worker lives and how many lanes it wants filled, if that is news.

        Return whether the worker is known, as far as that has been asked.
        """
        if (wanted, study_id) == self._said and time.monotonic() < self._beat_due:
            return True
        self._said, self._wanted = (wanted, study_id), wanted
        self._beat_due = time.monotonic() + self._settings.lease_seconds / BEATS_A_LEASE
        return workers.beat(
            session,
            self._worker,
            wanted_lanes=wanted,
            study_id=study_id,
            lanes=report.slots,
            occupancy=report.occupancy,
            capacity=report.capacity,
        )

    def _ending_soon(self, report: Report, staying: Sequence[Lease], joining: int) -> int:
        """Where there is a pruner, at least one: nobody knows whom it will stop next."""
        soon = sum(lease.trial_id in report.ending_soon for lease in staying)
        return max(soon, int(self._judged and bool(staying))) + joining * report.all_end_soon

    def _resume(self, answer: Answer, again: Sequence[Lease]) -> Answer:
        """Find the checkpoints of trials that were trained before, and let the record follow."""
        found = self._read(again, answer.joining)
        if self._closing.is_set():
            return answer  # which nobody waits for any more
        resumed = {id_: saved for id_, saved in found.items() if self._fits(saved.checkpoint)}
        curves = [
            (lease, resumed[lease.trial_id].epochs if lease.trial_id in resumed else [])
            for lease in again
        ]
        held = self._transact(lambda session: reporting.resume(session, curves), self._closing)
        lost = {lease.trial_id for lease in again} - held
        anew = len(again) - len(resumed)
        log.info("resumed", study=self._study.name, trials=len(resumed), anew=anew)
        return replace(
            answer,
            joining=[lease for lease in answer.joining if lease.trial_id not in lost],
            resumed={id_: saved for id_, saved in resumed.items() if id_ not in lost},
        )

    def _read(self, again: Sequence[Lease], joining: Sequence[Lease]) -> dict[int, Saved]:
        """Read checkpoints, by trial id, and renew the leases meanwhile: the store may be slow."""
        pool = ThreadPoolExecutor(READERS, "checkpoint-readers")
        reading = {lease.trial_id: pool.submit(self._newest, lease) for lease in again}
        pool.shutdown(wait=False)
        due = time.monotonic() + RESUME_SECONDS
        while wait(reading.values(), self._settings.lease_seconds / BEATS_A_LEASE).not_done:
            if self._closing.is_set() or time.monotonic() > due:
                log.warning("checkpoints_unread", study=self._study.name, trials=len(again))
                break
            self._renew_those(joining)
        found = {id_: one.result() for id_, one in reading.items() if one.done()}
        return {id_: saved for id_, saved in found.items() if saved is not None}

    def _newest(self, lease: Lease) -> Saved | None:
        try:
            return self._store.newest(self._study, lease)
        except Exception as error:  # a file system may raise anything
            if is_out_of_memory(error):  # the trial is trained on where there is some
                raise
            log.warning("checkpoints_unreadable", study=self._study.name, error=str(error))
            return None

    def _renew_those(self, leases: Sequence[Lease]) -> None:
        seconds = self._settings.lease_seconds
        self._transact(lambda session: reporting.flush(session, leases, {}, seconds), self._closing)

    def _renew(self, leases: Sequence[Lease]) -> None:
        def work(session: Session) -> None:
            reporting.flush(session, leases, {}, self._settings.lease_seconds)
            self._said = None
            # Only now: a meeting that was under way may have said something else.
            wanted, study_id = self._wanted, self._study.study_id
            workers.beat(session, self._worker, wanted_lanes=wanted, study_id=study_id)

        self._transact(work, self._closing)

    def _leave(self, session: Session, report: Report) -> int:
        leasing.share_study(session, self._study.study_id)
        verdicts = self._flush(session, report)
        ended = self._finish(session, report, verdicts)
        left = [lease for lease in report.leases if lease.trial_id not in ended]
        return len(leasing.release(session, [*left, *self._leased], self._worker))

    def _is_suspect(self, lease: Lease) -> bool:
        return lease.lost_leases >= self._settings.suspect_from

    @property
    def _judged(self) -> bool:
        return self._study.spec.pruner.name != "none"
