"""The stack: the trials of one study that train together, and their leases.

Between two epochs it meets the database once: one transaction records the epochs, ends what has
ended, leases trials for the free lanes, and says how many lanes still want one. What that
transaction says is applied afterwards. If it fails, nothing is lost: the stack trains on, and
brings everything along the next time.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from math import ceil
from pathlib import Path

import structlog
import torch
from sqlalchemy import Engine as Database
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from regtune import leasing, reporting, shares, studies, workers
from regtune.database import Listener, transaction
from regtune.leasing import Lease
from regtune.reporting import Completed, Epoch, Failed, Outcome, Pruned, Verdicts
from regtune.settings import Settings
from regtune.spec import StudySpec
from regtune.studies import ModelFacts, Study
from worker.shutdown import Interrupted
from worker.training import capacity
from worker.training.capacity import Capacity
from worker.training.engine import KNOBS, Engine
from worker.training.lanes import LaneEpoch, LaneTrial

log = structlog.get_logger()

SUGGESTION_SECONDS = 1.0
"""Ample time for a scheduler to hear that a worker wants a trial, and to append one."""


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
        worker: str,
        device: torch.device,
        listener: Listener,
        make_engine: Callable[..., Engine] = Engine,
    ) -> None:
        """Load the data, build the model and see how many lanes the device takes.

        Raises whatever the task's own code raises.
        """
        self.study = study
        self._database = database
        self._settings = settings
        self._worker = worker
        self._device = device
        self._listener = listener
        self._engine = self._build_engine(make_engine)
        self._capacity = self._settle_capacity()
        self._occupancy = Occupancy()
        if study.model is None:
            with transaction(database) as session:
                studies.describe_model(session, study.study_id, _facts(self._engine))
        self._leases: dict[int, Lease] = {}
        self._epochs: dict[int, list[Epoch]] = {}
        self._outcomes: dict[int, Outcome] = {}
        self._given_back: frozenset[int] = frozenset()
        self._more_to_come = True
        self._meeting = threading.Lock()
        self._met_at = time.monotonic()

    @property
    def training(self) -> bool:
        """Whether any trial is in training."""
        return bool(self._engine.lanes)

    @property
    def idle(self) -> bool:
        """Whether it neither trains nor has anything left to report."""
        return not self._leases

    def train_epoch(self, progress: Callable[[], None]) -> None:
        """Train every lane for one epoch; keep what it measured until the next meeting.

        What the task's own code raises ends its trials; Interrupted goes through.
        """
        try:
            epochs = self._engine.train_epoch(progress)
            for epoch in epochs:
                self._epochs.setdefault(epoch.key, []).append(_as_epoch(epoch))
            self._occupancy.note(epochs, self._engine.slots, self._more_to_come)
            self._end_lanes([epoch for epoch in epochs if epoch.ended])
        except Interrupted:
            raise
        except Exception as error:  # noqa: BLE001 - a user's crash is data
            if capacity.is_out_of_memory(error) and self._engine.slots > 1:
                self._take_fewer_lanes()
            else:
                self._fail_all(error)

    def meet(self) -> bool:
        """Meet the database, if it is time; return whether it could be reached."""
        if not self._is_time_to_meet():
            return True
        with self._meeting:
            try:
                with transaction(self._database) as session:
                    verdicts = self._flush(session)
                    outcomes = self._finish(session, verdicts)
                    self._give_back(session)
                    joining = self._lease(session, verdicts, outcomes)
            except DBAPIError as error:
                log.warning("meeting_failed", error=str(error.orig).splitlines()[0])
                return False
            self._apply(verdicts, outcomes, joining)
            return True

    def renew(self) -> None:
        """Renew the leases, in the middle of an epoch; the verdicts wait for its end."""
        with self._meeting, transaction(self._database) as session:
            leases = list(self._leases.values())
            reporting.flush(session, leases, {}, self._settings.lease_seconds)
            free = max(0, self._engine.slots - len(leases))
            workers.beat(session, self._worker, wanted_lanes=free, study_id=self.study.study_id)

    def close(self) -> None:
        """Let go of the threads; what is still in training is lost to this worker."""
        log.info("stack_closed", study=self.study.name, occupancy=self._occupancy.share)
        self._engine.close()

    def release(self) -> None:
        """Report what has ended, and give everything else back."""
        with transaction(self._database) as session:
            verdicts = self._flush(session)
            self._finish(session, verdicts)
            left = [lease for id_, lease in self._leases.items() if id_ not in self._outcomes]
            released = leasing.release(session, left, self._worker)
        log.info("released", study=self.study.name, trials=len(released))
        self._leases.clear()

    def _build_engine(self, make_engine: Callable[..., Engine]) -> Engine:
        spec = self.study.spec
        return make_engine(
            task=spec.task,
            training=spec.training,
            validation=spec.validation,
            data_dir=Path(self._settings.data_dir),
            device=self._device,
            max_lanes=self._settings.lanes or capacity.MOST_LANES,
            knobs=_knobs(spec),
        )

    def _settle_capacity(self) -> Capacity:
        """Return how many lanes to train: as set, as remembered, or as measured now."""
        if self._settings.lanes:
            chosen = Capacity(self._settings.lanes, "REGTUNE_LANES or --lanes says so")
        else:
            remembered = self._memory.recall(*self._situation)
            chosen = remembered or capacity.measure(
                self._engine.rehearse,
                self._engine.footprint,
                self._device,
                self._engine.members,
            )
            if not remembered:
                self._memory.keep(chosen, *self._situation)
        self._engine.max_lanes = chosen.lanes
        if chosen.trial_epochs_per_second:
            self._engine.expect(self._least_trial_epochs(), chosen.trial_epochs_per_second)
        log.info("capacity", study=self.study.name, **asdict(chosen))
        return chosen

    def _least_trial_epochs(self) -> int:
        """Return how many epochs the trials to come take at the least, as far as is known now.

        That is without those that have been appended, except as many as fill the slots.
        """
        spec = self.study.spec
        trials = self.study.budget_trials - self.study.appended + self._engine.slots
        patience = int(min(spec.search.patience.numbers()))
        return trials * min(spec.training.max_epochs, patience + 1)

    @property
    def _memory(self) -> capacity.Memory:
        return capacity.Memory(self._settings.data_dir / "capacity.json")

    @property
    def _situation(self) -> tuple[object, ...]:
        """What the capacity depends on."""
        spec = self.study.spec
        return (
            describe(self._device),
            torch.__version__,
            spec.task.model_dump(mode="json"),
            (spec.training.optimizer, spec.training.batch_size, spec.training.precision),
            self._engine.members,
            sorted(_knobs(spec)),
        )

    def _is_time_to_meet(self) -> bool:
        """Say whether there is something to end or to begin, or enough to record."""
        if self._outcomes or not self._engine.lanes:
            return True
        if self._engine.free_slots and self._listener.wait(0):
            return True
        return time.monotonic() - self._met_at >= self._settings.flush_seconds

    def _take_fewer_lanes(self) -> None:
        """Give all trials back, at no cost to them, and go on with half as many lanes."""
        self._engine.leave(self._engine.lanes)
        self._capacity = self._capacity.halved()
        self._engine.max_lanes = self._capacity.lanes
        if not self._settings.lanes:
            self._memory.keep(self._capacity, *self._situation)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        self._given_back = frozenset(self._leases.keys() - self._outcomes.keys())
        self._epochs.clear()
        log.warning("out_of_memory", study=self.study.name, lanes=self._capacity.lanes)

    def _end_lanes(self, ended: Sequence[LaneEpoch]) -> None:
        """Take ended trials out of the engine, with what they reached at their best weights."""
        if not ended:
            return
        tested = [epoch for epoch in ended if epoch.ended != "diverged"]
        results = self._engine.results([epoch.key for epoch in tested]) if tested else []
        for epoch, result in zip(tested, results, strict=True):
            self._outcomes[epoch.key] = Completed(
                validation_loss=result.validation_loss,
                validation_loss_spread=result.validation_loss_spread,
                validation_score=result.validation_score,
                best_epoch=result.best_epoch,
                test_loss=result.test_loss,
                test_score=result.test_score,
                reason=str(epoch.ended),
            )
        for epoch in ended:
            self._outcomes.setdefault(epoch.key, Pruned("diverged"))
        self._engine.leave([epoch.key for epoch in ended])

    def _fail_all(self, error: Exception) -> None:
        """End all lanes as failed: in one batched step nobody can say whose fault it was."""
        failed = Failed.by(error)
        log.error("training_raised", study=self.study.name, error=failed.reason)
        self._outcomes |= dict.fromkeys(self._engine.lanes, failed)
        self._engine.leave(self._engine.lanes)

    def _flush(self, session: Session) -> Verdicts:
        return reporting.flush(
            session,
            list(self._leases.values()),
            self._epochs,
            self._settings.lease_seconds,
            judged=self._judged,
        )

    def _finish(self, session: Session, verdicts: Verdicts) -> Mapping[int, Outcome]:
        """End what has ended by itself, and what the scheduler wants stopped."""
        stopped = {id_: Pruned(reason) for id_, reason in verdicts.stop.items()}
        outcomes = {**stopped, **self._outcomes}
        reporting.finish(
            session,
            [(self._leases[id_], outcome) for id_, outcome in outcomes.items()],
            self._worker,
        )
        return outcomes

    def _give_back(self, session: Session) -> None:
        """Let others train what did not fit; or this worker itself, a moment later."""
        leases = [self._leases[id_] for id_ in self._given_back]
        leasing.release(session, leases, self._worker)

    def _lease(
        self, session: Session, verdicts: Verdicts, outcomes: Mapping[int, Outcome]
    ) -> Sequence[Lease]:
        """Lease trials for the free slots, if it is this study's turn; say how many more it wants.

        Those are the slots that stay free, and those whose trials may end before the scheduler
        could answer.
        """
        study_id = self.study.study_id
        staying = verdicts.held - outcomes.keys() - self._given_back
        free = max(0, self._engine.slots - len(staying))
        joining: Sequence[Lease] = []
        if free and self._is_its_turn(session):
            joining = leasing.lease(
                session,
                study_id,
                self._worker,
                free,
                self._settings.lease_seconds,
                slots=self._engine.slots,
            )
        if free > len(joining):
            self._more_to_come = studies.has_more(session, study_id)
        workers.beat(
            session,
            self._worker,
            wanted_lanes=free - len(joining) + self._ending_soon(staying),
            study_id=study_id,
            lanes=self._engine.slots,
            occupancy=self._occupancy.share,
            capacity=asdict(self._capacity),
        )
        return joining

    def _is_its_turn(self, session: Session) -> bool:
        study_id = self.study.study_id
        chosen = shares.choose(
            session,
            self._worker,
            current=study_id,
            stay_seconds=self._settings.stay_seconds,
        )
        return chosen == study_id

    def _ending_soon(self, staying: frozenset[int]) -> int:
        """Return how many trials may end within the time that a suggestion takes to arrive.

        Where there is a pruner, at least one: nobody knows whom it will stop next.
        """
        seconds = self._occupancy.epoch_seconds
        horizon = ceil(SUGGESTION_SECONDS / seconds) if seconds else 0
        left = self._engine.epochs_left()
        soon = sum(left[id_] <= horizon for id_ in staying if id_ in left)
        return max(soon, int(self._judged and bool(staying)))

    @property
    def _judged(self) -> bool:
        return self.study.spec.pruner.name != "none"

    def _apply(
        self, verdicts: Verdicts, outcomes: Mapping[int, Outcome], joining: Sequence[Lease]
    ) -> None:
        """Let the lanes follow what the database has said."""
        staying = verdicts.held - outcomes.keys() - self._given_back
        lost = self._leases.keys() - verdicts.held
        if lost:
            log.warning("leases_lost", study=self.study.name, trials=len(lost))
        self._engine.leave([key for key in self._engine.lanes if key not in staying])
        self._leases = {id_: lease for id_, lease in self._leases.items() if id_ in staying}
        self._leases |= {lease.trial_id: lease for lease in joining}
        self._epochs.clear()
        self._outcomes.clear()
        self._given_back = frozenset()
        try:
            self._engine.join([_as_lane(lease, self.study.spec) for lease in joining])
        except Exception as error:
            if not capacity.is_out_of_memory(error) or self._engine.slots == 1:
                raise
            self._take_fewer_lanes()
        self._met_at = time.monotonic()


def describe(device: torch.device) -> str:
    """Return the name of a device, as people know it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({torch.get_num_threads()} threads)"


def _facts(engine: Engine) -> ModelFacts:
    return ModelFacts(
        parameters=engine.parameters,
        penalized=engine.model.penalized,
        spared=engine.model.spared,
        dropout_sites=engine.model.sites,
        vectorized=engine.model.vectorized,
        steps_per_epoch=engine.steps_per_epoch,
        training_rows=engine.training_rows,
    )


def _knobs(spec: StudySpec) -> frozenset[str]:
    """Return the strengths that a trial of the study may use: all that are not fixed at zero."""
    return KNOBS & {
        name for name, parameter in spec.search.parameters().items() if any(parameter.numbers())
    }


def _as_lane(lease: Lease, spec: StudySpec) -> LaneTrial:
    """Return the trial to train; one that was appended by an older version has fewer parameters."""
    params = {"learning_rate": spec.training.learning_rate, **lease.params}
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
