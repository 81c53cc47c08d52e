"""Training that costs nothing, so that what is left is the control plane: regtune's and Optuna's.

Ours are workers as they are, from registration to release, with an engine that computes a curve
from a trial's strengths instead of training a network. The peer's are processes that share a study
through Optuna's own tables, with the same sampler, pruner, curve and number of epochs.
"""

import gc
import math
import multiprocessing
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Barrier
from types import SimpleNamespace
from typing import Any

import optuna
import torch
from optuna.distributions import BaseDistribution
from optuna.study import MaxTrialsCallback
from optuna.trial import TrialState

from regtune import logs
from regtune.settings import Settings
from worker.loop import Worker
from worker.shutdown import Shutdown
from worker.training.checkpoint import Checkpoint
from worker.training.lanes import Ended, LaneEpoch, LaneResult, LaneTrial
from worker.training.residence import Residence

EPOCHS = 20
_TICK_SECONDS = 0.25
# Not spawned: sixty-four processes that each import torch would take minutes.
_processes = multiprocessing.get_context("fork")


def loss(params: Mapping[str, float], epoch: int) -> float:
    """Return the validation loss after an epoch, best at a decay of 0.1 and a dropout of 0.2.

    All trials look alike until their last epoch, so that no pruner saves anybody a report.
    """
    if epoch < EPOCHS:
        return 10.0 - epoch / EPOCHS
    decay = math.log10(max(params["weight_decay"], 1e-9)) + 1
    return 0.1 + 0.01 * decay**2 + (params["dropout"] - 0.2) ** 2


class FreeEngine:
    """Stands where the worker's engine stands, and takes ``epoch_seconds`` for an epoch.

    It never ends a trial before its last epoch, whatever its patience.
    """

    def __init__(self, *, max_lanes: int, epoch_seconds: float = 0.0, **_: object) -> None:
        self.max_lanes = max_lanes
        self.score, self.data_hash = "accuracy", None
        self.residence = Residence(resident=True, row_bytes=0)
        self.members = self.steps_per_epoch = self.training_rows = self.parameters = 1
        self.model = SimpleNamespace(penalized=[], spared=[], sites=[], vectorized=True)
        self._epoch_seconds = epoch_seconds
        self._trials: dict[int, LaneTrial] = {}
        self._epochs: dict[int, int] = {}

    @property
    def lanes(self) -> list[int]:
        """The keys of the trials in training."""
        return list(self._trials)

    @property
    def slots(self) -> int:
        """How many trials it trains at once."""
        return self.max_lanes

    @property
    def free_slots(self) -> int:
        """How many more trials may join."""
        return self.max_lanes - len(self._trials)

    def epochs_left(self) -> dict[int, int]:
        """Return how many epochs each trial has left, by key."""
        return {key: EPOCHS - epoch for key, epoch in self._epochs.items()}

    def join(
        self, trials: Sequence[LaneTrial], checkpoints: Mapping[int, Checkpoint] | None = None
    ) -> None:
        """Let trials start with the next epoch, at their first one or where they were left."""
        states = {key: one.state for key, one in (checkpoints or {}).items()}
        for trial in trials:
            self._trials[trial.key] = trial
            self._epochs[trial.key] = states[trial.key]["epoch"] if trial.key in states else 0

    def checkpoint(self, keys: Sequence[int]) -> list[Checkpoint]:
        """Return how far trials have come, which is all that there is of them."""
        return [
            Checkpoint({"epoch": torch.tensor(self._epochs[key])}, {"epoch": self._epochs[key]})
            for key in keys
        ]

    def fits(self, checkpoint: Checkpoint) -> bool:
        """Say whether a checkpoint is of such a trial."""
        return checkpoint.tensors.keys() == {"epoch"}

    def leave(self, keys: Sequence[int]) -> None:
        """Take trials out."""
        for key in list(keys):
            del self._trials[key], self._epochs[key]

    def close_gaps(self) -> None:
        """Do nothing: no trial holds anything here."""

    def train_epoch(self, tick: Any, *, trying: bool) -> list[LaneEpoch]:
        """Let an epoch's time pass, and say what each trial has reached."""
        due = time.monotonic() + self._epoch_seconds
        tick()
        while (left := due - time.monotonic()) > 0:
            time.sleep(min(left, _TICK_SECONDS))
            tick()
        return [self._next_epoch(trial) for trial in self._trials.values()]

    @property
    def ended(self) -> dict[int, Ended]:
        """Why trials train no more that have not left, by key."""
        return {key: "finished" for key, epoch in self._epochs.items() if epoch == EPOCHS}

    def results(self, keys: Sequence[int], tick: Any) -> list[LaneResult]:
        """Return what trials reached in their last epoch."""
        return [LaneResult(key, EPOCHS, self._loss(key), 0.9, 1.0, 0.9) for key in keys]

    def close(self) -> None:
        """Nothing to let go of."""

    def _next_epoch(self, trial: LaneTrial) -> LaneEpoch:
        epoch = self._epochs[trial.key] = self._epochs[trial.key] + 1
        return LaneEpoch(
            key=trial.key,
            epoch=epoch,
            train_loss=1.0,
            validation_loss=self._loss(trial.key),
            validation_score=0.9,
            penalty=0.1,
            sparsity=0.0,
            seconds=self._epoch_seconds,
            ended="finished" if epoch == EPOCHS else None,
        )

    def _loss(self, key: int) -> float:
        trial = self._trials[key]
        known = {"weight_decay": trial.weight_decay, "dropout": trial.dropout}
        return loss(known, self._epochs[key])


@contextmanager
def our_workers(
    url: str, settings: Settings, count: int, *, processes: int, epoch_seconds: float = 0.0
) -> Iterator[None]:
    """Keep so many workers, as threads of so many processes; one in each is how people run them."""
    started = [
        _processes.Process(target=_work, args=(url, settings, names, epoch_seconds))
        for names in _dealt([f"free-{i}" for i in range(count)], processes)
    ]
    for process in started:
        process.start()
    try:
        yield
    finally:
        for process in started:
            process.terminate()
        _end(started)


def stock_workers(
    url: str, names: Sequence[str], space: Mapping[str, BaseDistribution], count: int, budget: int
) -> tuple[float, float]:
    """Let so many processes optimize a study as Optuna's documentation shows; return their span.

    It is the last of ``names``; each process first does a trial of the others, to start up. Both
    ends are in seconds of the clock ``time.time``.
    """
    ready = _processes.Barrier(count + 1)
    started = [
        _processes.Process(target=_optimize, args=(url, names, space, budget, seed, ready))
        for seed in range(count)
    ]
    for process in started:
        process.start()
    ready.wait()
    since = time.time()
    _end(started)
    return since, time.time()


def _dealt(names: Sequence[str], processes: int) -> list[Sequence[str]]:
    return [names[i::processes] for i in range(processes)]


def _end(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        process.join()


def _work(url: str, settings: Settings, names: Sequence[str], epoch_seconds: float) -> None:
    """Run workers until SIGTERM."""
    logs.configure(settings)
    shutdown = Shutdown()
    shutdown.install()
    gc.freeze()  # as a worker's program does

    def make_engine(**arguments: Any) -> Any:
        return FreeEngine(epoch_seconds=epoch_seconds, **arguments)

    threads = [
        threading.Thread(
            target=Worker(
                url, settings, torch.device("cpu"), name, shutdown, make_engine=make_engine
            ).run
        )
        for name in names
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _optimize(
    url: str,
    names: Sequence[str],
    space: Mapping[str, BaseDistribution],
    budget: int,
    seed: int,
    ready: Barrier,
) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    *starting, study = (
        optuna.load_study(
            study_name=name,
            storage=url,
            sampler=optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True),
            pruner=optuna.pruners.MedianPruner(),
        )
        for name in names
    )

    def objective(trial: optuna.Trial) -> float:
        params = {key: _suggest(trial, key, kind) for key, kind in space.items()}
        for epoch in range(1, EPOCHS + 1):
            trial.report(loss(params, epoch), epoch)
            if trial.should_prune() and epoch < EPOCHS:
                raise optuna.TrialPruned
        return loss(params, EPOCHS)

    for one in starting:
        one.optimize(objective, n_trials=1)
    ready.wait()
    ended = (TrialState.COMPLETE, TrialState.PRUNED)
    study.optimize(objective, callbacks=[MaxTrialsCallback(budget, states=ended)])


def _suggest(trial: optuna.Trial, name: str, kind: Any) -> float:
    if isinstance(kind, optuna.distributions.IntDistribution):
        return trial.suggest_int(name, kind.low, kind.high, log=kind.log)
    return trial.suggest_float(name, kind.low, kind.high, log=kind.log)
