"""Engines that train in turns, an epoch each, so that what intrudes meets all of them."""

from collections.abc import Hashable, Mapping
from time import perf_counter
from typing import TypeVar

import torch

from benchmarks.problems import some_trials
from worker.training.cores import synchronize
from worker.training.engine import Engine

Name = TypeVar("Name", bound=Hashable)


def in_turns(
    engines: Mapping[Name, Engine], lanes: int, rounds: int, device: torch.device
) -> dict[Name, list[float]]:
    """Return the seconds of each epoch, by engine, once all have compiled what they use.

    Closes the engines.
    """
    for engine in engines.values():
        warm_up(engine, lanes)
    seconds: dict[Name, list[float]] = {name: [] for name in engines}
    for _ in range(rounds):
        for name, engine in engines.items():
            started = perf_counter()
            engine.train_epoch()
            synchronize(device)
            seconds[name].append(perf_counter() - started)
    for engine in engines.values():
        engine.close()
    return seconds


def warm_up(engine: Engine, lanes: int) -> None:
    """Let so many trials join, and train until all that they use has been compiled."""
    engine.join(some_trials(lanes))
    for _ in range(2):
        engine.train_epoch()
        engine.settle()
