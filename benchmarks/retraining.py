"""How good strengths are under seeds that they were not chosen by.

All trials of a study share held-out rows, initial weights and order, so its lowest loss is as much
a matter of that one draw as of the strengths that were found.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.curves import train_all
from regtune.spec import StudySpec
from regtune.task import Storage
from worker.stack import knobs_of
from worker.training.engine import Engine
from worker.training.lanes import LaneTrial

FIRST_SEED = 1000
"""Studies of benchmarks have smaller ones."""


@dataclass(frozen=True)
class Again:
    """The best validation losses ``(studies, seeds)`` of each contender's strengths, trained again.

    Studies, and seeds within them, are the same for all contenders.
    """

    losses: Mapping[str, NDArray[np.float64]]

    def against(self, name: str, other: str) -> tuple[float, float]:
        """Return by how much a contender's losses are above another's, and the standard error.

        The error is over the studies, each with the mean of its seeds; NaN for a single study.
        """
        above = (self.losses[name] - self.losses[other]).mean(axis=1)
        error = above.std(ddof=1) / math.sqrt(len(above)) if len(above) > 1 else math.nan
        return float(above.mean()), float(error)


def train_again(
    study: Callable[[int], StudySpec],
    best: Mapping[str, Sequence[Mapping[str, float]]],
    seeds: int,
    data_dir: Path,
    device: str,
    threads: int,
) -> Again:
    """Train the ``best`` strengths of all studies of each contender, all side by side.

    ``study`` returns a study with the training's seed that it is given: other held-out rows,
    initial weights, order and dropout.
    """
    trials = [
        LaneTrial(key=key, **params)
        for key, params in enumerate(chain.from_iterable(best.values()))
    ]
    losses = np.full((len(trials), seeds), np.inf)
    for number in range(seeds):
        spec = study(FIRST_SEED + number)
        engine = Engine(
            task=spec.task,
            training=spec.training,
            validation=spec.validation,
            storage=Storage(data_dir),
            device=torch.device(device),
            max_lanes=len(trials),
            knobs=knobs_of(spec),
            threads=threads,
        )
        with closing(engine):
            for epoch in train_all(engine, trials):
                own = (epoch.key, number)
                losses[own] = min(losses[own], epoch.validation_loss)
    return Again(dict(zip(best, losses.reshape(len(best), -1, seeds), strict=True)))
