"""Rows drawn from a linear model, so that the best strength of weight decay is known.

Features are independent standard normals x, and the weights to be learned are drawn from N(0, τ²)
with τ² = signal² / features. Regression: y = w·x + ε, ε from N(0, noise²). Classification: the
classes' logits are w_c·x, and labels are drawn from their softmax. With such a prior, ridge is the
posterior mode, and in the regression the posterior mean, which no other prediction beats on average
over weights and rows (A. Hoerl and R. Kennard, Technometrics 12, 1970).
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from regtune.spec import SyntheticSettings
from regtune.task import Data, Storage
from worker.errors import NoRoom
from worker.training.capacity import free_bytes, readable


def synthetic(storage: Storage, **settings: Any) -> Data:
    """Return drawn rows; needs no files. Settings: ``SyntheticSettings``."""
    asked = SyntheticSettings.model_validate(settings)
    _check_room(asked)
    random = np.random.default_rng(asked.seed)
    classification = asked.kind == "classification"
    outputs = asked.classes if classification else 1
    weights = random.normal(scale=_prior(asked), size=(asked.features, outputs))

    def draw(rows: int) -> tuple[NDArray[np.float32], NDArray[Any]]:
        x = random.normal(size=(rows, asked.features)).astype(np.float32)
        signal = x @ weights
        if classification:  # the largest logit with Gumbel noise is a draw from the softmax
            return x, (signal + random.gumbel(size=signal.shape)).argmax(1)
        return x, (signal[:, 0] + random.normal(scale=asked.noise, size=rows)).astype(np.float32)

    return Data(
        *draw(asked.rows), *draw(asked.test_rows), classes=outputs if classification else None
    )


def _check_room(asked: SyntheticSettings) -> None:
    """Raise NoRoom if the machine's memory cannot hold the rows while they are drawn."""
    kept = 4 * asked.features * (asked.rows + asked.test_rows)
    needed = kept + 8 * asked.features * max(asked.rows, asked.test_rows)  # drawn as float64
    free = free_bytes(torch.device("cpu"))
    if needed > free:
        raise NoRoom(
            f"{asked.rows} and {asked.test_rows} rows of {asked.features} features take "
            f"{readable(needed)} of memory, but {readable(free)} are free; take a smaller "
            "task.data.rows, test_rows or features, or a machine of more memory"
        )


def best_decay(asked: SyntheticSettings, trained_on: int) -> float:
    """Return the coupled weight decay λ₂ that makes ``linear`` the posterior mode.

    ``trained_on`` is the number of rows that are trained on. The objective is the mean loss over
    them plus (λ₂/2)‖w‖². Standardizing rows changes both by the same factor, up to chance.
    """
    if asked.kind == "classification":
        return 1 / (trained_on * _prior(asked) ** 2)
    return 2 * asked.noise**2 / (trained_on * _prior(asked) ** 2)


def _prior(asked: SyntheticSettings) -> float:
    """Return the standard deviation τ of the weights."""
    return float(asked.signal / np.sqrt(asked.features))
