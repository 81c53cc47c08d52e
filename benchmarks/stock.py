"""A study as a good engineer would run it with Optuna alone, over the hand-tuned loop."""

import multiprocessing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path
from time import perf_counter
from typing import Any

import optuna
import torch
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend

from benchmarks.peers import HandTuned, Held, Strengths, mlp
from regtune.space import Fixed
from regtune.spec import StudySpec
from regtune.task import Storage
from worker.tasks.images import mnist
from worker.tasks.preparation import prepare

READY_SECONDS = 300.0


@dataclass(frozen=True)
class Crowd:
    """How the peer spreads its trials: so many processes with so many threads each."""

    processes: int
    threads: int

    def __str__(self) -> str:
        """Say it as the report does."""
        return "Optuna" if self.processes == 1 else f"Optuna × {self.processes}"


@dataclass(frozen=True)
class Task:
    """What a process of the peer is given."""

    spec: StudySpec
    data_dir: Path
    device: str
    journal: Path | None
    threads: int
    trials: int
    seed: int


@dataclass(frozen=True)
class Share:
    """What a process of the peer has done."""

    losses: Sequence[float]
    """Of the trials that were not pruned; ``params`` are theirs."""
    params: Sequence[Mapping[str, float]]
    epochs: Sequence[int]


def share_out(
    spec: StudySpec, data_dir: Path, device: str, crowd: Crowd, journal: Path
) -> tuple[Sequence[Share], float, float]:
    """Share a study's trials out among processes; return what they did, and in which seconds."""
    started = perf_counter()
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(crowd.processes + 1)
    ends, processes = [], []
    for number in range(crowd.processes):
        ours, theirs = context.Pipe()
        task = Task(
            spec,
            data_dir,
            device,
            journal if crowd.processes > 1 else None,
            crowd.threads,
            trials=len(range(number, spec.budget.trials, crowd.processes)),
            seed=spec.sampler.seed * crowd.processes + number,
        )
        processes.append(context.Process(target=optimize, args=(task, ready, theirs)))
        ends.append(ours)
        processes[-1].start()
        theirs.close()
    ready.wait(READY_SECONDS)
    began = perf_counter()
    shares = [end.recv() for end in ends]
    ended = perf_counter()
    for process in processes:
        process.join()
    return shares, ended - began, ended - started


def optimize(task: Task, ready: Barrier, end: Any) -> None:
    """Train some trials of a study, in a process of its own; send what came out."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    torch.set_num_threads(task.threads)
    torch.set_flush_denormal(True)
    ready.wait(READY_SECONDS)
    training, validation = task.spec.training, task.spec.validation
    data = mnist(Storage(task.data_dir))
    prepared = prepare(data, validation, training.seed, torch.float32)
    rows = Held.of(prepared.on(torch.device(task.device)))
    study = optuna.create_study(
        study_name=task.spec.name,
        storage=storage(task.journal),
        sampler=optuna.samplers.TPESampler(seed=task.seed),
        pruner=optuna.pruners.MedianPruner(),
        load_if_exists=True,
    )
    curves, losses, complete = list[list[float]](), list[float](), list[Mapping[str, float]]()

    def objective(trial: optuna.Trial) -> float:
        curves.append([])
        params = suggest(trial, task.spec)
        losses.append(train(trial, params, task.spec, rows, curves[-1]))
        complete.append(params)
        return losses[-1]

    study.optimize(objective, n_trials=task.trials)
    end.send(Share(losses, complete, [len(curve) for curve in curves]))


def train(
    trial: optuna.Trial,
    params: Mapping[str, float],
    spec: StudySpec,
    rows: Held,
    curve: list[float],
) -> float:
    """Train a trial with early stopping; return its best validation loss.

    Each epoch's is appended to ``curve``. Raises TrialPruned when the pruner says so.
    """
    strengths = Strengths(params["weight_decay"], params["dropout"], params["l1_lambda"])
    torch.manual_seed(spec.training.seed)
    model = HandTuned(mlp, rows, strengths)
    for number in range(1, spec.training.max_epochs + 1):
        curve.append(model.train_epoch())
        trial.report(curve[-1], number)
        if trial.should_prune():
            raise optuna.TrialPruned
        best_epoch = 1 + curve.index(min(curve))
        if number - best_epoch >= params["patience"]:
            break
    return min(curve)


def suggest(trial: optuna.Trial, spec: StudySpec) -> dict[str, float]:
    """Suggest what regtune would search, from the same ranges; below a range's low end is zero."""
    params: dict[str, float] = {}
    for name, parameter in spec.search.parameters().items():
        if isinstance(parameter, Fixed):
            params[name] = parameter.root
            continue
        match parameter.distribution():
            case optuna.distributions.FloatDistribution(low=low, high=high, log=log):
                params[name] = parameter.used(trial.suggest_float(name, low, high, log=log))
            case optuna.distributions.IntDistribution(low=low, high=high, log=log):
                params[name] = trial.suggest_int(name, low, high, log=log)
    return params


def storage(journal: Path | None) -> BaseStorage:
    """Return the fastest storage that serves one process, or several."""
    return (
        InMemoryStorage() if journal is None else JournalStorage(JournalFileBackend(str(journal)))
    )
