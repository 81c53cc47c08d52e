"""The stack: the trials of one study that train together, and their leases.

Between two epochs it meets the database once: one transaction records the epochs, ends what has
ended, leases trials for the free lanes, and says how many lanes still want one. What that
transaction says is applied afterwards. If it fails, nothing is lost: the stack trains on, and
brings everything along the next time.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import structlog
import torch
from sqlalchemy import Engine as Database
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from regtune import leasing, reporting, studies, workers
from regtune.database import transaction
from regtune.leasing import Lease
from regtune.reporting import Completed, Epoch, Failed, Outcome, Pruned, Verdicts
from regtune.settings import Settings
from regtune.spec import StudySpec
from regtune.studies import ModelFacts, Study
from regtune.task import Offer
from worker.shutdown import Interrupted
from worker.training.engine import KNOBS, Engine
from worker.training.lanes import LaneEpoch, LaneTrial

log = structlog.get_logger()


class Stack:
    """One study's trials in one engine, on behalf of a worker."""

    def __init__(
        self,
        database: Database,
        settings: Settings,
        study: Study,
        worker: str,
        offer: Offer,
        device: torch.device,
        lanes: int,
    ) -> None:
        """Load the data and build the model; raises whatever the task's own code raises."""
        self.study = study
        self._database = database
        self._settings = settings
        self._worker = worker
        self._offer = offer
        self._device = device
        self._lanes = lanes
        self._engine = self._build_engine()
        if study.model is None:
            with transaction(database) as session:
                studies.describe_model(session, study.study_id, _facts(self._engine))
        self._leases: dict[int, Lease] = {}
        self._epochs: dict[int, list[Epoch]] = {}
        self._outcomes: dict[int, Outcome] = {}
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
        except Interrupted:
            raise
        except Exception as error:  # noqa: BLE001 - a user's crash is data
            self._fail_all(error)
            return
        for epoch in epochs:
            self._epochs.setdefault(epoch.key, []).append(_as_epoch(epoch))
        ended = [epoch for epoch in epochs if epoch.ended]
        if ended:
            self._end_lanes(ended)

    def meet(self) -> bool:
        """Meet the database, if it is time; return whether it could be reached."""
        urgent = self._outcomes or not self._engine.lanes
        if not urgent and time.monotonic() - self._met_at < self._settings.flush_seconds:
            return True
        with self._meeting:
            try:
                with transaction(self._database) as session:
                    verdicts = self._flush(session)
                    outcomes = self._finish(session, verdicts)
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
            free = self._lanes - len(leases)
            workers.beat(session, self._worker, wanted_lanes=free, study_id=self.study.study_id)

    def close(self) -> None:
        """Let go of the threads; what is still in training is lost to this worker."""
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

    def _build_engine(self) -> Engine:
        spec = self.study.spec
        return Engine(
            task=spec.task,
            training=spec.training,
            validation=spec.validation,
            data_dir=Path(self._settings.data_dir),
            device=self._device,
            max_lanes=self._lanes,
            knobs=_knobs(spec),
        )

    def _end_lanes(self, ended: Sequence[LaneEpoch]) -> None:
        """Take ended trials out of the engine, with what they reached at their best weights."""
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
            judged=self.study.spec.pruner.name != "none",
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

    def _lease(
        self, session: Session, verdicts: Verdicts, outcomes: Mapping[int, Outcome]
    ) -> Sequence[Lease]:
        """Lease trials for the free lanes, if it is this study's turn; say how many stay free."""
        study_id = self.study.study_id
        free = self._lanes - len(verdicts.held - outcomes.keys())
        joining: Sequence[Lease] = []
        if free and workers.choose_study(session, self._offer) == study_id:
            joining = leasing.lease(
                session, study_id, self._worker, free, self._settings.lease_seconds
            )
        workers.beat(session, self._worker, wanted_lanes=free - len(joining), study_id=study_id)
        return joining

    def _apply(
        self, verdicts: Verdicts, outcomes: Mapping[int, Outcome], joining: Sequence[Lease]
    ) -> None:
        """Let the lanes follow what the database has said."""
        staying = verdicts.held - outcomes.keys()
        lost = self._leases.keys() - verdicts.held
        if lost:
            log.warning("leases_lost", study=self.study.name, trials=len(lost))
        self._engine.leave([key for key in self._engine.lanes if key not in staying])
        self._leases = {id_: lease for id_, lease in self._leases.items() if id_ in staying}
        self._leases |= {lease.trial_id: lease for lease in joining}
        self._engine.join([_as_lane(lease, self.study.spec) for lease in joining])
        self._epochs.clear()
        self._outcomes.clear()
        self._met_at = time.monotonic()


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
