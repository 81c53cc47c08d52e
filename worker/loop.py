"""The worker's loop: choose a study, build its engine, train its trials, until told to stop."""

import gc
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Sequence

import structlog
import torch
from sqlalchemy import Engine as Database
from sqlalchemy.orm import Session

from regtune import database, events, leasing, reporting, shapes, shares, studies, task, workers
from regtune.database import transaction
from regtune.errors import (
    DatabaseUnavailable,
    DataMissing,
    InvalidData,
    InvalidSpec,
    NotFound,
    RegtuneError,
    StudyUnreadable,
    storable,
)
from regtune.leasing import Lease
from regtune.reporting import Failed
from regtune.settings import Settings
from regtune.spec import NO_SHAPE
from regtune.studies import Study
from worker.building import Building
from worker.checkpoints import CheckpointStore
from worker.devices import describe
from worker.errors import DataDiffer, NoRoom, NoRoomForModel
from worker.heartbeat import BEATS_A_LEASE, Heartbeat
from worker.meeting import Turn
from worker.refusals import Refusals
from worker.shutdown import Interrupted, Shutdown
from worker.stack import Stack
from worker.training import capacity
from worker.training.compiling import first_line, is_between_steps
from worker.training.engine import Engine, check_device
from worker.training.memory import is_out_of_memory
from worker.training.model import UnsupportedModel

log = structlog.get_logger()

_SLICE_SECONDS = 0.5

_POLLS_A_LOOK = 8
"""An idle worker looks for itself so seldom: schedulers, which poll, call again where a trial was
left over. It is for when none runs."""


class Worker:
    """One process that trains on one device; any number may share a database.

    ``make_engine`` builds what trains a study; a benchmark of everything else passes its own.
    """

    def __init__(
        self,
        url: str,
        settings: Settings,
        device: torch.device,
        name: str | None = None,
        shutdown: Shutdown | None = None,
        make_engine: Callable[..., Engine] = Engine,
    ) -> None:
        self.name = name or f"{socket.gethostname()}-{os.getpid()}"
        self._url = url
        self._settings = settings
        self._device = device
        self._lanes = settings.lanes or capacity.provisional(device)
        self._offer = task.installed(settings.tasks)
        self._shutdown = shutdown or Shutdown()
        self._make_engine = make_engine
        self._database: Database = database.connect(
            url,
            pool_size=min(2, settings.pool_size),
            program="worker",
            proxied=settings.proxied,
            trust_seconds=database.TRUST_SECONDS,
        )
        direct = settings.direct_database_url or url
        self._listener = database.Listener(
            direct, database.WORK, database.work_for(self.name), program="worker"
        )
        self._checkpoints = CheckpointStore(
            settings.checkpoints or str(settings.data_dir / "checkpoints")
        )
        self._stack: Stack | None = None
        self._idle_beat = 0.0
        self._waiting: int | None = None
        # Not all workers of a fleet at once.
        self._sweep_due = time.monotonic() + random.uniform(0, settings.sweep_seconds)
        self._sweeping: threading.Thread | None = None
        self._refused = Refusals()
        self._lacked_room = set[int]()

    def run(self) -> None:
        """Train until told to stop; then give back what is not finished.

        Raise DatabaseUnavailable or UnknownSchema if the database is not there at the start.
        """
        database.check(self._database)
        with database.reachable(), transaction(self._database) as session:
            self._register(session)
        self._shutdown.say_last(self._say_last)
        log.info("worker_started", worker=self.name, device=str(self._device), lanes=self._lanes)
        with self._listener:
            while not self._shutdown.requested:
                self._sweep_in_time()
                if not self._train_next():
                    self._wait()
        self._drop_stack()
        self._leave([])
        self._database.dispose()
        log.info("worker_stopped", worker=self.name)

    def _say_last(self) -> bool:
        """Give back what the stack holds, unless it is at that itself; return if it is not."""
        stack = self._stack
        if stack is not None and stack.leaving:
            return False
        self._leave(stack.abandon() if stack else [])
        return True

    def _leave(self, leases: Sequence[Lease]) -> None:
        """Say that this worker stops, and give back what it still holds."""
        try:
            with transaction(self._database) as session:
                leasing.release(session, leases, self.name)
                workers.leave(session, self.name, socket.gethostname(), os.getpid())
        except database.FAULTS as error:
            log.warning("database_lost", worker=self.name, error=str(error).splitlines()[0])

    def _register(self, session: Session) -> None:
        workers.register(
            session,
            name=self.name,
            host=socket.gethostname(),
            pid=os.getpid(),
            device=describe(self._device),
            device_kind=self._device.type,
            memory_bytes=capacity.total_bytes(self._device),
            lanes=self._lanes,
            offer=self._offer,
        )

    def _train_next(self) -> bool:
        """Train the study whose turn it is for as long as it has trials; say if another's came.

        A stack that is there asks whose turn it is as it meets, and leases in the same transaction.
        One whose meeting was refused for good gives its trials back: nobody would train them here.
        """
        try:
            if self._stack is None:
                turn = self._choose()
            else:
                self._train(self._stack)
                turn = self._stack.turn
                if self._stack.leaving:  # nothing of it is left here
                    self._drop_stack()
                    return False
                if turn == self._stack.own_turn:
                    return False
            if turn is None or self._shutdown.requested:
                return False
            self._drop_stack()
            return self._begin(turn)
        except (*database.FAULTS, DatabaseUnavailable, NotFound) as error:
            event = "study_gone" if isinstance(error, NotFound) else "database_lost"
            log.warning(event, worker=self.name, error=str(error).splitlines()[0])
            if self._stack is not None and not self._stack.leaving:
                self._stack.release()
            self._drop_stack()
            return False

    def _begin(self, turn: Turn) -> bool:
        """Build the stack of what is to be trained next, if that can be; say if it is there."""
        try:
            study, shape, leases = self._read(turn)
        except StudyUnreadable as unread:  # others may know that version
            with transaction(self._database) as session:
                self._postpone(session, turn.study_id, NO_SHAPE, unread)
            return False
        self._stack = None if shape is None else self._build_stack(study, shape, leases)
        if self._stack is not None and self._shutdown.requested:
            self._stack.release()
        return self._stack is not None

    def _drop_stack(self) -> None:
        if self._stack is not None:
            self._stack.close()
        self._stack = None
        gc.collect()  # an engine's tensors hang in cycles; the next one asks what memory is free

    def _sweep_in_time(self) -> None:
        """Remove, now and then, checkpoints that whoever wrote them has not lived to remove.

        In a thread of its own: a store that does not answer must not keep the device waiting.
        """
        if time.monotonic() < self._sweep_due or self._sweeping:
            return
        self._sweeping = threading.Thread(target=self._sweep, name="sweep", daemon=True)
        self._sweeping.start()

    def _sweep(self) -> None:
        try:
            self._remove_what_is_over()
        except Exception as error:  # noqa: BLE001 - a file system may raise anything
            log.warning("sweep_failed", error=str(error) or type(error).__name__)
        self._sweep_due = time.monotonic() + self._settings.sweep_seconds
        self._sweeping = None

    def _remove_what_is_over(self) -> None:
        kept = self._checkpoints.studies()
        with transaction(self._database) as session:
            over = studies.over(session, kept)
        for study in over:
            self._checkpoints.remove_study(study)
            log.info("swept", study_id=study.study_id)
        for study in kept - over:
            if self._shutdown.requested:
                return
            trials = self._checkpoints.trials(study)
            with transaction(self._database) as session:
                ended = studies.trials_over(session, study, trials)
            self._checkpoints.remove(study, ended)

    def _choose(self) -> Turn | None:
        """Return the study whose turn it is; where there is none, say that all lanes are free.

        Not at each try: of many workers that a few new trials wake, most find none left.
        """
        with transaction(self._database) as session:
            study_id = shares.choose(
                session,
                self.name,
                stay_seconds=self._settings.stay_seconds,
                refused=self._refused,
            )
            if study_id is not None:
                self._idle_beat = 0.0
                return Turn(study_id)
            if time.monotonic() >= self._idle_beat:
                self._beat(session)
            return None

    def _read(self, turn: Turn) -> tuple[Study, str | None, Sequence[Lease]]:
        """Return a study, which of its shapes to train, and the leases to build that under.

        The shape is None if no trial waits any more. What nobody has built yet is built for a trial
        that is leased, so that code that kills whoever builds it, or never ends, costs the trial
        its leases, as it would in training.
        """
        with transaction(self._database) as session:
            study, shape = studies.by_id(session, turn.study_id), turn.shape or NO_SHAPE
            if turn.shape is None and study.spec.search.shaping():
                chosen = shapes.choose(
                    session, study.study_id, self.name, suspect_from=self._settings.suspect_from
                )
                if chosen is None:
                    return study, None, []
                shape = chosen
            if _is_built(session, study, shape):
                return study, shape, []
            leases = self._lease_one(session, study, shape)
            return study, shape if leases else None, leases

    def _lease_one(self, session: Session, study: Study, shape: str) -> Sequence[Lease]:
        return leasing.lease(
            session,
            study.study_id,
            self.name,
            1,
            self._settings.lease_seconds,
            shape=shape,
            slots=self._lanes,
            suspect_from=self._settings.suspect_from,
            alone=True,
        )

    def _build_stack(self, study: Study, shape: str, leases: Sequence[Lease] = ()) -> Stack | None:
        """Build a study's stack; None if it cannot be built here."""
        try:
            with Building(
                self._database, self._settings, self.name, self._lanes, leases, self._shutdown
            ):
                return Stack(
                    self._database,
                    self._settings,
                    study,
                    shape,
                    self.name,
                    self._device,
                    self._listener,
                    self._checkpoints,
                    self._make_engine,
                    self._refused,
                    leases,
                    self._lacked_room,
                )
        except DataDiffer as difference:
            self._refused.add(study.study_id)
            with transaction(self._database) as session:
                self._record_refusal(session, study.study_id, difference)
            self._give_back(leases)
        except (*database.FAULTS, NotFound):  # the database
            raise
        except Exception as error:  # noqa: BLE001 - a user's crash is data
            if is_out_of_memory(error):
                error = NoRoomForModel(first_line(error))
            else:
                check_device(self._device, error)
            if self._leaves_to_others(study, shape, error):
                self._give_back(leases)
            else:
                log.error("task_failed", study=study.name, error=str(error))
                self._fail_one(study, shape, error, leases)
        return None

    def _leaves_to_others(self, study: Study, shape: str, error: Exception) -> bool:
        """Refuse a study for a while, rather than fail a trial by an error; say if that is right.

        Of workers that find out at once that they lack the same, one sees that the others have.
        """
        with transaction(self._database) as session:
            study = studies.lock(session, study.study_id)  # it may have been built meanwhile
            if not self._is_for_others(session, study, shape, error):
                return False
            self._postpone(session, study.study_id, shape, error)
            return True

    def _is_for_others(self, session: Session, study: Study, shape: str, error: Exception) -> bool:
        """Say whether others may train a study, or this worker itself a while later.

        What others have built can be trained, and its data can be had: whatever is wrong is wrong
        here alone. Room may be there later. What is missing on this machine, others may have,
        unless all lack it. But one shape of many that nobody has built, and that still cannot be at
        the second try, fails a trial: else nobody would train the others.
        """
        if _is_built(session, study, shape):
            return True
        first_try = shape == NO_SHAPE or not self._refused.postponed(study.study_id, shape)
        match error:
            case NoRoomForModel():
                return first_try
            case NoRoom():
                return True
            case DataMissing() if study.model is not None:
                return True
            case DataMissing() | ImportError() | OSError():  # no file, right, package or network
                return first_try and workers.others_may_train(
                    session, study.study_id, self.name, self._settings.lease_seconds
                )
        return False

    def _give_back(self, leases: Sequence[Lease]) -> None:
        """Give back what a study was to be built for."""
        if leases:
            with transaction(self._database) as session:
                leasing.release(session, leases, self.name)

    def _postpone(self, session: Session, study_id: int, shape: str, error: Exception) -> None:
        """Leave a study to others for a while, and say so in its history."""
        seconds = self._refused.postpone(study_id, shape)
        self._record_refusal(session, study_id, error, tries_again_in_seconds=seconds)

    def _record_refusal(
        self, session: Session, study_id: int, error: Exception, **detail: float
    ) -> None:
        """Say in a study's history why this worker leaves it to others."""
        reason = str(error) if isinstance(error, RegtuneError) else first_line(error)
        log.error("study_refused", study_id=study_id, reason=reason, **detail)
        lack = "room" if isinstance(error, NoRoom) else "what it takes"
        events.record(
            session,
            study_id,
            "study_refused",
            self.name,
            detail={"reason": storable(reason), "lacks": lack, **detail},
        )

    def _fail_one(
        self, study: Study, shape: str, error: Exception, leases: Sequence[Lease]
    ) -> None:
        """Fail one trial alone: the next one may go better.

        Data that cannot be trained on, and wrong settings, are the same for all of them, and end
        the study, unless another shape of it was built before; so is the only shape's model.
        """
        failed = Failed.by(error)
        only_shape = shape == NO_SHAPE and isinstance(error, UnsupportedModel)
        with transaction(self._database) as session:
            study = studies.lock(session, study.study_id)
            reporting.finish(session, [(lease, failed) for lease in leases], self.name)
            the_same = only_shape or isinstance(error, InvalidData | InvalidSpec)
            if the_same and study.model is None:
                studies.fail(session, study.study_id, storable(str(error)), self.name)

    def _train(self, stack: Stack) -> None:
        """Train until the study has no trial left for this worker, or it has no room for one."""
        keeping = True
        try:
            stack.meet()
            if not stack.idle:
                self._train_all(stack)
            return
        except NoRoomForModel as error:
            lack = str(error)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            # Between epochs: as lanes were put in or copied, and may stand anywhere.
            lack, keeping = first_line(error), False
        stack.release(keeping=keeping)
        with transaction(self._database) as session:
            self._postpone(session, stack.study.study_id, stack.shape, NoRoomForModel(lack))

    def _train_all(self, stack: Stack) -> None:
        heartbeat = Heartbeat(
            stack.renew,
            self._settings.lease_seconds,
            self._settings.hung_seconds,
            between_steps=is_between_steps,
        )

        def progress() -> None:
            heartbeat.step()
            self._shutdown.check()

        heartbeat.start()
        try:
            while not stack.idle:
                progress()
                if stack.training:
                    stack.train_epoch(progress)
                    if stack.has_trained:
                        self._refused.forget(stack.study.study_id, stack.shape)
                if not stack.meet() and not stack.training:
                    time.sleep(_SLICE_SECONDS)
        except Interrupted:
            stack.release()
        finally:
            heartbeat.stop()

    def _wait(self) -> None:
        """Wait until there may be something to train; beat meanwhile, and sweep now and then.

        Whoever is not called looks now and then whether some trial is left over: one that waited
        at the look before as well. To ask whose turn it is costs several times as much, and in a
        busy study some trial waits at any moment. For the same reason a beat that is due is a beat
        and no more.
        """
        look_due = time.monotonic() + _POLLS_A_LOOK * self._settings.poll_seconds
        while not self._shutdown.requested:
            if self._listener.wait(min(_SLICE_SECONDS, self._settings.poll_seconds)):
                return
            try:
                self._beat_in_time()
                if time.monotonic() >= look_due:
                    look_due = time.monotonic() + _POLLS_A_LOOK * self._settings.poll_seconds
                    self._sweep_in_time()
                    if self._sees_left_over():
                        return
            except database.FAULTS:
                return  # whoever asks next waits for the database as it should be waited for

    def _sees_left_over(self) -> bool:
        """Say whether the same trial waits for a worker as at the last look."""
        before = self._waiting
        with transaction(self._database) as session:
            self._waiting = shares.longest_waiting(session)
        return self._waiting is not None and self._waiting == before

    def _beat_in_time(self) -> None:
        """Say that the worker lives and that all its lanes are free, if it must be heard of.

        Nobody gives trials to a worker that was silent for so long, by the database's clock, that
        it has been forgotten: such a one is idle, and registers again.
        """
        if self._stack:
            if not self._stack.beat_in_time():
                with transaction(self._database) as session:
                    self._register(session)
        elif time.monotonic() >= self._idle_beat:
            self._idle_beat = time.monotonic() + self._settings.poll_seconds  # if it fails
            with transaction(self._database) as session:
                self._beat(session)

    def _beat(self, session: Session) -> None:
        """Say that a worker without a stack lives."""
        if not workers.beat(session, self.name, wanted_lanes=self._lanes, study_id=None):
            self._register(session)
        self._idle_beat = time.monotonic() + self._settings.lease_seconds / BEATS_A_LEASE


def _is_built(session: Session, study: Study, shape: str) -> bool:
    """Say whether some worker has loaded a study's data and built its model of that shape."""
    if shape == NO_SHAPE:
        return study.model is not None
    return shape in shapes.known(session, study.study_id)
