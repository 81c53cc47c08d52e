"""The stack: the trials of one study and one shape that train together, and their leases.

Between two epochs it meets the database: it reports what was trained, and lets its lanes follow the
answer. While that does not come, it trains on, and brings everything along the next time.
"""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from math import ceil, inf, prod

import structlog
import torch
from sqlalchemy import Engine as Database
from sqlalchemy.orm import Session

from regtune import shapes, studies
from regtune.database import FAULTS, Listener, transaction
from regtune.errors import NotFound
from regtune.leasing import Lease
from regtune.reporting import Completed, Epoch, Failed, Outcome, Pruned
from regtune.settings import Settings
from regtune.spec import NO_SHAPE, StudySpec, read_shape
from regtune.studies import ModelFacts, Study
from regtune.task import Storage
from worker.checkpoints import CheckpointStore, CheckpointWriter, Saved
from worker.devices import describe
from worker.errors import DataDiffer, NoRoomForModel, TaskFailed
from worker.meeting import Answer, Meetings, Report, Turn
from worker.patience import transact_patiently
from worker.shutdown import Interrupted
from worker.training import capacity
from worker.training.capacity import Capacity
from worker.training.checkpoint import Checkpoint
from worker.training.compiling import first_line
from worker.training.engine import KNOBS, DeviceLost, Engine
from worker.training.lanes import Ended, LaneEpoch, LaneResult, LaneTrial
from worker.training.memory import is_out_of_memory

log = structlog.get_logger()

SUGGESTION_SECONDS = 1.0
"""Ample time for a scheduler to see that a worker wants a trial, and to append one."""

ANSWER_SECONDS = 0.5
"""Ample time for the database to answer; after that, training goes on without."""

CHECKPOINT_SECONDS, PARTING_SECONDS = 5.0, 3.0
"""What writing the last checkpoints and giving the trials back may take, once told to stop."""


class Occupancy:
    """Which share of its slots a worker kept in training while there were trials to be had."""

    def __init__(self) -> None:
        self._trained = 0.0
        self._offered = 0.0
        self.epoch_seconds: float | None = None

    @property
    def share(self) -> float | None:
        """The share so far, by time; None before the first epoch."""
        return self._trained / self._offered if self._offered else None

    def note(self, epochs: Sequence[LaneEpoch], slots: int, more_to_come: bool) -> None:
        """Take in one epoch of all lanes; at the end of a study, idle slots are no fault."""
        if not epochs:
            return
        self.epoch_seconds = seconds = epochs[0].seconds
        if more_to_come or len(epochs) == slots:
            self._trained += len(epochs) * seconds
            self._offered += slots * seconds


class Stack:
    """One study's trials in one engine, on behalf of a worker."""

    def __init__(
        self,
        database: Database,
        settings: Settings,
        study: Study,
        shape: str,
        worker: str,
        device: torch.device,
        listener: Listener,
        store: CheckpointStore,
        make_engine: Callable[..., Engine],
        refused: Collection[int],
        leases: Sequence[Lease],
        lacked_room: set[int],
    ) -> None:
        """Load the data, build the model and see how many lanes the device takes.

        ``shape`` is the one of the study's shapes that it trains. ``refused`` are studies that this
        worker cannot train. ``leases`` are trials that it has already; nobody has trained them.
        ``lacked_room`` are trials for which there was no memory once; it adds to them.
        Raises InvalidData for data that cannot be trained on, DataDiffer for other data than the
        study began with, TaskFailed for an error of a database of the task's own, and whatever else
        the task's own code raises.
        """
        self.study = study
        self.shape = shape
        self._spec = study.spec.at(shape)
        self._settings = settings
        self._device = device
        self._listener = listener
        self._engine = self._build_engine(make_engine)
        try:
            # What cannot be rehearsed has not been built: others shall not take it for that.
            with _errors_of_the_task():
                self._capacity = self._settle_capacity()
            self._agree_on_data(database)
        except BaseException:
            self._engine.close()
            raise
        self._occupancy = Occupancy()
        self._writer = CheckpointWriter(store)
        self._meetings = Meetings(
            database,
            settings,
            study,
            shape,
            worker,
            store,
            self._writer,
            self._engine.fits,
            refused,
        )
        self._database = database
        self._lacked_room = lacked_room
        self.has_trained = False
        self._leases = {lease.trial_id: lease for lease in leases}
        self._unbegun = tuple(self._leases)
        self._curves: dict[int, list[Epoch]] = {}
        self._epochs: dict[int, list[Epoch]] = {}
        self._outcomes: dict[int, Outcome] = {}
        self._given_back: frozenset[int] = frozenset()
        self.leaving = False
        self._more_to_come = True
        self.turn: Turn | None = self.own_turn
        self._met_at = self._checkpointed_at = time.monotonic()

    @property
    def own_turn(self) -> Turn:
        """What it trains, as whose turn it may be."""
        return Turn(self.study.study_id, self.shape)

    @property
    def training(self) -> bool:
        """Whether any trial is in training."""
        return bool(self._engine.lanes)

    @property
    def idle(self) -> bool:
        """Whether it neither trains nor has anything left to report or to hear."""
        return not self._leases and self._meetings.unanswered is None

    def train_epoch(self, progress: Callable[[], None]) -> None:
        """Train every lane for one epoch; keep what it measured until the next meeting.

        A trial that was left between its last epoch and its test is tested instead. What the task's
        own code raises ends the trial that raised it. Raises NoRoomForModel where there is none any
        more for a trial by itself, though there was before. Interrupted and DeviceLost go through.
        """
        if over := self._engine.ended:
            self._end_lanes(over, progress)
            return
        failure: Exception | None = None
        epochs: Sequence[LaneEpoch] = []
        try:
            # When a study ends, it is too late for an experiment to pay.
            epochs = self._engine.train_epoch(progress, trying=self._more_to_come)
        except (Interrupted, DeviceLost):
            raise
        except Exception as error:  # noqa: BLE001 - a user's crash is data
            failure = _without_frames(error)
        if failure:
            if is_out_of_memory(failure) and self._engine.slots > 1:
                self._take_fewer_lanes()
                return
            epochs = self._train_apart(failure, progress)
        self.has_trained = self.has_trained or bool(epochs)
        for epoch in epochs:
            for curves in (self._curves, self._epochs):
                curves.setdefault(epoch.key, []).append(_as_epoch(epoch))
        self._occupancy.note(epochs, self._engine.slots, self._more_to_come)
        self._end_lanes({epoch.key: epoch.ended for epoch in epochs if epoch.ended}, progress)
        self._checkpoint_in_time()

    def meet(self) -> bool:
        """Meet the database, if it is time; return whether it has answered.

        Raises NoRoomForModel as ``train_epoch`` does.
        """
        patience = 0.0
        if self._meetings.unanswered is None:
            if not self._is_time_to_meet():
                return True
            # The meeting sees all that was told until now; to be woken for that again is in vain.
            self._listener.drain()
            self._meetings.begin(self._report())
            self._epochs = {}
            patience = ANSWER_SECONDS
        report = self._meetings.unanswered
        try:
            answer = self._meetings.answer(patience)
        except Exception:
            self._take_back(report)
            raise
        if report is None or answer is None:
            return False
        if not self._apply(report, answer):
            raise NoRoomForModel("no memory is left for a trial")
        return True

    def beat_in_time(self) -> bool:
        """Say that the worker lives, if it is idle and must be heard of.

        Return whether it is known, as far as that has been asked.
        """
        return not self._meetings.beat_is_due or self._meetings.beat(self._report())

    def renew(self) -> None:
        """Renew the leases, in the middle of an epoch; from any thread."""
        self._meetings.renew(list(self._leases.values()))

    def close(self) -> None:
        """Let go of the threads; what is still in training is lost to this worker."""
        share = self._occupancy.share
        log.info("stack_closed", study=self.study.name, shape=self.shape, occupancy=share)
        self._meetings.close()
        self._writer.close()
        self._engine.close()

    def abandon(self) -> Sequence[Lease]:
        """Lease nothing more; return all that is held. From any thread, before the process ends."""
        return [*self._leases.values(), *self._meetings.abandon()]

    def release(self, *, keeping: bool = True) -> None:
        """Checkpoint what is in training, report what has ended, and give everything else back.

        The latter two whatever memory is left. Without ``keeping``, for when memory was short and
        lanes may not stand where their curves end, trials go on from the checkpoints that they
        have, and next time in fewer lanes, unless a setting says in how many.
        """
        self.leaving = True
        with self._as_far_as_memory_goes():
            trials = len(self._engine.lanes) or self._engine.slots
            if keeping:
                self._checkpoint(self._engine.lanes)
            elif trials <= self._engine.slots:  # else it ran out as the others were given back
                self._halve_lanes(trials)
        self._writer.wait(CHECKPOINT_SECONDS)
        report, answer = self._meetings.unanswered, None
        try:
            with self._as_far_as_memory_goes():
                answer = self._meetings.answer(ANSWER_SECONDS)
        except FAULTS as error:  # which the last report may not meet
            log.warning("database_lost", error=str(error).splitlines()[0])
        if report and answer:
            self._apply(report, answer)
        else:
            self._take_back(report)
        released = self._meetings.part(self._report(), PARTING_SECONDS)
        if released is None:
            log.warning("not_released", study=self.study.name, trials=len(self._leases))
        else:
            log.info("released", study=self.study.name, trials=released)
        self._leases.clear()

    @contextmanager
    def _as_far_as_memory_goes(self) -> Iterator[None]:
        """Do without what there is no memory for."""
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            log.warning("out_of_memory", study=self.study.name, error=first_line(error))

    def _take_back(self, report: Report | None) -> None:
        """Keep the epochs of a report whose answer has not come: they may be recorded again."""
        for id_, epochs in report.epochs.items() if report else ():
            self._epochs[id_] = [*epochs, *self._epochs.get(id_, [])]

    def _build_engine(self, make_engine: Callable[..., Engine]) -> Engine:
        spec = self._spec
        with _errors_of_the_task():
            return make_engine(
                task=spec.task,
                training=spec.training,
                validation=spec.validation,
                storage=Storage(self._settings.data_dir, self._settings.data_roots),
                device=self._device,
                own_tasks=self._settings.tasks,
                max_lanes=self._settings.lanes or capacity.MOST_LANES,
                knobs=knobs_of(spec),
                data_on_device=self._settings.data_on_device,
            )

    def _agree_on_data(self, database: Database) -> None:
        """Let the first worker that builds a model say which data the study is about."""
        study_id, own, facts = self.study.study_id, _facts(self._engine), self.study.model

        def describe(session: Session) -> ModelFacts | None:
            studies.describe_model(session, study_id, own)
            return studies.by_id(session, study_id).model

        if facts is None:
            facts = transact_patiently(database, describe)
        if facts and facts.data_hash not in (None, own.data_hash):
            raise DataDiffer(
                f"the study began with the data {facts.data_hash}, but those of "
                f"{self.study.spec.task} are {own.data_hash} here"
            )
        if self.shape != NO_SHAPE:
            transact_patiently(
                database,
                lambda session: shapes.describe(session, study_id, self.shape, own),
            )

    def _settle_capacity(self) -> Capacity:
        """Return how many lanes to train: as set, as remembered, or as measured now."""
        if self._settings.lanes:
            chosen = Capacity(self._settings.lanes, "REGTUNE_LANES or --lanes says so")
        else:
            remembered = self._memory.recall(*self._situation)
            chosen = remembered or capacity.measure(
                self._engine.rehearse,
                self._engine.bytes_per_lane,
                self._device,
                self._engine.members,
                self._engine.chunk,
            )
            if not remembered:
                self._memory.keep(chosen, *self._situation)
        chosen = replace(chosen, data=str(self._engine.residence))
        self._engine.max_lanes = chosen.lanes
        if chosen.trial_epochs_per_second:
            self._engine.expect(self._least_trial_epochs(), chosen.trial_epochs_per_second)
        log.info(
            "capacity",
            study=self.study.name,
            shape=self.shape,
            **asdict(chosen),
            data_bytes=self._engine.residence.row_bytes,
        )
        return chosen

    def _least_trial_epochs(self) -> int:
        """Return how many epochs the trials to come take at the least, as far as is known now.

        That is without those that have been appended, except as many as fill the slots; of those
        that have not, each shape is taken to get as many as any other.
        """
        spec = self._spec
        shapes = prod(len(options.root) for options in self.study.spec.search.shaping().values())
        to_come = (self.study.budget_trials - self.study.appended) // shapes
        trials = to_come + self._engine.slots
        patience = int(min(spec.search.patience.numbers()))
        return trials * min(spec.training.max_epochs, patience + 1)

    @property
    def _memory(self) -> capacity.Memory:
        return capacity.Memory(self._settings.data_dir / "capacity.json")

    @property
    def _situation(self) -> tuple[object, ...]:
        """What the capacity depends on."""
        spec = self._spec
        return (
            describe(self._device),
            torch.__version__,
            spec.task.model_dump(mode="json"),
            (spec.training.optimizer, spec.training.batch_size, spec.training.precision),
            (spec.training.decay, spec.training.l1, spec.training.penalized),
            (sorted(spec.training.augment), spec.training.averaging),
            (self._engine.data_hash, self._engine.parameters, asdict(self._engine.residence)),
            (self._engine.members, self._engine.chunk),
            (self._engine.training_rows, self._engine.steps_per_epoch),
            sorted(knobs_of(spec)),
        )

    def _is_time_to_meet(self) -> bool:
        """Say whether there is something to end or to begin, or enough to record."""
        if self._outcomes or not self._engine.lanes:
            return True
        if self._engine.free_slots and self._listener.wait(0):
            return True
        return time.monotonic() - self._met_at >= self._settings.flush_seconds

    def _checkpoint_in_time(self) -> None:
        """Checkpoint all lanes, if that is due and the last ones have been written."""
        due = self._checkpointed_at + self._settings.checkpoint_seconds
        if time.monotonic() >= due and not self._writer.busy:
            with self._as_far_as_memory_goes():  # the next one is as good
                self._checkpoint(self._engine.lanes)

    def _checkpoint(self, keys: Sequence[int]) -> None:
        """Write checkpoints of those that have trained; the writing itself takes place elsewhere.

        A trial that has just been resumed stands where its checkpoint is.
        """
        self._checkpointed_at = time.monotonic()
        begun = [key for key in keys if key in self._curves]
        saved = [
            (self._leases[key], Saved(checkpoint, list(self._curves[key])))
            for key, checkpoint in zip(begun, self._engine.checkpoint(begun), strict=True)
        ]
        self._writer.write(self.study, saved)

    def _take_fewer_lanes(self, besides: int = 0) -> None:
        """Go on with half as many lanes; give the other trials back, at no cost to them.

        ``besides`` is how many trials were there, or were to be, besides those in the stack.
        """
        self._halve_lanes(len(self._engine.lanes) + besides)
        capacity.free_memory(self._device)
        self._give_back(self._engine.lanes[self._engine.slots :])
        with self._as_far_as_memory_goes():  # else they are closed with the next epoch
            self._engine.close_gaps()
        capacity.free_memory(self._device)
        log.warning("out_of_memory", study=self.study.name, lanes=self._capacity.lanes)

    def _halve_lanes(self, trials: int) -> None:
        """Take note that there is no memory for so many trials.

        It holds for the next stack too, unless a setting says how many lanes to train.
        """
        self._capacity = self._capacity.halved(trials * self._engine.members)
        self._engine.max_lanes = self._capacity.lanes
        if not self._settings.lanes:
            self._memory.keep(self._capacity, *self._situation)

    def _give_back(self, keys: Sequence[int]) -> None:
        """Let others go on with these trials; or this worker itself, a moment later."""
        self._checkpoint(keys)
        self._engine.leave(keys)
        self._given_back |= set(keys)

    def _train_apart(self, error: Exception, progress: Callable[[], None]) -> list[LaneEpoch]:
        """Train all lanes for an epoch, in ever smaller parts, until whoever raises is alone.

        In one batched step nobody can say whose fault it was, and nobody else shall suffer from it.
        Who has raised in company, or for the first time alone, gets another try.
        """
        keys = self._engine.lanes
        log.warning("training_raised", study=self.study.name, error=str(error), trials=len(keys))
        before = dict(zip(keys, self._engine.checkpoint(keys), strict=True))
        states = dict(before)
        epochs: list[LaneEpoch] = []
        lack: str | None = None
        parts = _halves(keys) or [keys]
        self._take_all_out()
        capacity.free_memory(self._device)
        try:
            while parts and lack is None:
                part = parts.pop(0)
                try:
                    self._join(part, states)
                    trained = self._engine.train_epoch(progress, trying=False)
                    states |= zip(part, self._engine.checkpoint(part), strict=True)
                    epochs += trained  # only now: whoever is not where it ends trains it again
                    self.has_trained = True
                except (Interrupted, DeviceLost):
                    states = before  # nobody will hear of the epochs since
                    raise
                except Exception as own:  # noqa: BLE001 - a user's crash is data
                    parts = _halves(part) + parts
                    if len(part) == 1 and self._may_find_room(part[0], own):
                        lack, states = first_line(own), before
                    elif len(part) == 1:
                        self._outcomes[part[0]] = Failed.by(own)
                self._take_all_out()
        finally:
            self._take_all_out()
            try:
                self._join([key for key in keys if key not in self._outcomes], states)
            except Exception as none_left:
                if not is_out_of_memory(none_left):
                    raise
                lack = first_line(none_left)  # they go on from their last checkpoints
        if lack is not None:  # only now: the error's frames held what the step had allocated
            raise NoRoomForModel(lack)
        return epochs

    def _take_all_out(self) -> None:
        """Let go of all lanes, and of what the device holds for them."""
        self._engine.leave(self._engine.lanes)
        self._engine.close_gaps()

    def _may_find_room(self, key: int, error: Exception) -> bool:
        """Say whether a trial that ran out of memory by itself is left for later, rather than fail.

        It is, once, if a trial of this study and shape has ever had room, here or elsewhere: then
        another program may hold the memory now.
        """
        if not is_out_of_memory(error) or key in self._lacked_room:
            return False
        self._lacked_room.add(key)
        return self.has_trained or self._has_been_trained()

    def _has_been_trained(self) -> bool:
        """Say whether any worker has trained an epoch of this; if nobody can say, it may be."""
        try:
            with transaction(self._database) as session:
                return shapes.has_been_trained(session, self.study.study_id, self.shape)
        except FAULTS:
            return True

    def _join(self, keys: Sequence[int], states: Mapping[int, Checkpoint]) -> None:
        """Let trials join the engine where they stand, or at their first epoch."""
        lanes = [_as_lane(self._leases[key], self._spec, self.shape) for key in keys]
        self._engine.join(lanes, states)

    def _end_lanes(self, ended: Mapping[int, Ended], progress: Callable[[], None]) -> None:
        """Take ended trials out of the engine, with what they reached at their best weights."""
        for key, reason in ended.items():
            if reason == "diverged":
                self._outcomes[key] = Pruned("diverged")
        reasons = {key: reason for key, reason in ended.items() if reason != "diverged"}
        for result in self._test(list(reasons), progress):
            self._outcomes[result.key] = Completed(
                validation_loss=result.validation_loss,
                validation_loss_spread=result.validation_loss_spread,
                validation_score=result.validation_score,
                best_epoch=result.best_epoch,
                test_loss=result.test_loss,
                test_score=result.test_score,
                reason=reasons[result.key],
            )
        leaving = [key for key in ended if key in self._outcomes]
        self._engine.leave(leaving)
        if self._engine.ended and self._engine.slots == 1:
            raise NoRoomForModel("no memory is left for a trial's test")
        if self._engine.ended:
            self._take_fewer_lanes(len(leaving))

    def _test(self, keys: Sequence[int], progress: Callable[[], None]) -> list[LaneResult]:
        """Return the trials' results; whoever raises is found by halves, and fails.

        Those for which there is no memory are left out: they have been trained, and are tested when
        fewer lanes are in the stack, or later.
        """
        if not keys:
            return []
        try:
            return self._engine.results(keys, progress)
        except (Interrupted, DeviceLost):
            raise
        except Exception as error:  # noqa: BLE001 - a user's crash is data
            fewer_may_do = is_out_of_memory(error) and self._engine.slots > 1
            if len(keys) == 1 and not (fewer_may_do or self._may_find_room(keys[0], error)):
                self._outcomes[keys[0]] = Failed.by(error)
        # Only now: the error's frames held what the test had allocated.
        return [result for half in _halves(keys) for result in self._test(half, progress)]

    def _report(self) -> Report:
        horizon = self._epochs_ahead()
        left = self._engine.epochs_left()
        return Report(
            leases=list(self._leases.values()),
            epochs=self._epochs,
            outcomes=dict(self._outcomes),
            given_back=self._given_back,
            ending_soon=frozenset(id_ for id_ in left if left[id_] <= horizon),
            all_end_soon=self.study.spec.training.max_epochs <= horizon,
            slots=self._engine.slots,
            occupancy=self._occupancy.share,
            capacity=asdict(self._capacity),
        )

    def _epochs_ahead(self) -> float:
        """Return how many epochs may pass before the scheduler could answer; 0 if unknown."""
        seconds = self._occupancy.epoch_seconds
        if seconds is None:
            return 0
        return ceil(SUGGESTION_SECONDS / seconds) if seconds else inf

    def _apply(self, report: Report, answer: Answer) -> bool:
        """Let the lanes follow what the database has said of the trials that were reported.

        Since then, an epoch or more may have been trained. Returns False if there is no memory any
        more for a trial by itself, though there was before.
        """
        gone = {lease.trial_id for lease in report.leases} - answer.staying
        lost = gone - answer.ended - report.given_back
        if lost:
            log.warning("leases_lost", study=self.study.name, trials=len(lost))
        for of_trials in (self._leases, self._curves, self._epochs, self._outcomes):
            for id_ in gone & of_trials.keys():
                del of_trials[id_]
        self._given_back -= gone
        self._writer.remove(self.study, answer.ended & answer.held)
        self._more_to_come = answer.more_to_come
        self.turn = answer.turn
        self._met_at = time.monotonic()
        # Of those that it was built for; one that was lost may come again among the others.
        joining = [id_ for id_ in self._unbegun if id_ in self._leases]
        joining += [lease.trial_id for lease in answer.joining]
        self._unbegun = ()
        self._leases |= {lease.trial_id: lease for lease in answer.joining}
        for id_, saved in answer.resumed.items():
            self._curves[id_] = list(saved.epochs)
        if self.leaving:  # what is held is known now, and given back as it is
            return True
        self._engine.leave([key for key in self._engine.lanes if key in gone])
        # There may be fewer slots than when it was asked for them.
        room = self._engine.free_slots
        joining, too_many = joining[:room], joining[room:]
        self._given_back |= set(too_many)
        if not joining:
            return True
        try:
            self._join(joining, {id_: one.checkpoint for id_, one in answer.resumed.items()})
            return True
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            alone = joining if self._engine.slots == 1 else []
            if any(not self._may_find_room(key, error) for key in alone):
                self._outcomes |= dict.fromkeys(alone, Failed.by(error))
                return True
        self._given_back |= set(joining)
        if self._engine.slots == 1:
            return False
        self._take_fewer_lanes(len(joining))
        return True


@contextmanager
def _errors_of_the_task() -> Iterator[None]:
    """Tell errors of a database of the task's own from those of ours, which no engine knows."""
    try:
        yield
    except (*FAULTS, NotFound) as error:
        raise TaskFailed(first_line(error)) from error


def _without_frames(error: Exception) -> Exception:
    """Return an error that no longer holds what its frames had allocated."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def _halves(keys: Sequence[int]) -> list[Sequence[int]]:
    """Return both halves of two or more, nothing of less."""
    middle = len(keys) // 2
    return [keys[:middle], keys[middle:]] if middle else []


def _facts(engine: Engine) -> ModelFacts:
    return ModelFacts(
        parameters=engine.parameters,
        penalized=engine.model.penalized,
        spared=engine.model.spared,
        dropout_sites=engine.model.sites,
        vectorized=engine.model.vectorized,
        steps_per_epoch=engine.steps_per_epoch,
        training_rows=engine.training_rows,
        score=engine.score,
        data_hash=engine.data_hash,
    )


def knobs_of(spec: StudySpec) -> frozenset[str]:
    """Return the strengths that a trial of the study may use: all that are not fixed at zero."""
    return KNOBS & {
        name for name, parameter in spec.search.parameters().items() if any(parameter.numbers())
    }


def _as_lane(lease: Lease, spec: StudySpec, shape: str) -> LaneTrial:
    """Return the trial to train; one that was appended by an older version has fewer parameters."""
    params = {"learning_rate": spec.training.learning_rate, **lease.params}
    for name in read_shape(shape):
        del params[name]
    return LaneTrial(key=lease.trial_id, patience=int(params.pop("patience")), **params)


def _as_epoch(epoch: LaneEpoch) -> Epoch:
    return Epoch(
        epoch=epoch.epoch,
        train_loss=epoch.train_loss,
        validation_loss=epoch.validation_loss,
        validation_score=epoch.validation_score,
        penalty=epoch.penalty,
        sparsity=epoch.sparsity,
        seconds=epoch.seconds,
    )
