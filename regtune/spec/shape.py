"""The shape of a trial: what it has of all that changes its tensors or its program.

Lanes of one stack have the same shape. It is written as JSON text, ``{"batch_size":64}``, the same
for the same values; of a study that searches strengths alone, every trial has the shape ``{}``.
"""

import json
from collections.abc import Mapping
from typing import Any

from regtune.spec.task import AnyTask
from regtune.spec.training import Training

NO_SHAPE = "{}"
"""The shape of the trials of a study that searches strengths alone."""

MODEL_PREFIX = "model."
"""Stands before a setting of the model or the task, which may be called like a strength."""

MAX_SHAPES = 64
MAX_SHAPE_CHARACTERS = 2000
"""PostgreSQL's indexes take 2700 bytes."""


def write_shape(values: Mapping[str, Any]) -> str:
    """Return the shape that has these values, by the names of the searched parameters."""
    return json.dumps(values, separators=(",", ":"), sort_keys=True)


def read_shape(shape: str) -> dict[str, Any]:
    """Return the values of a shape, by the names of the searched parameters."""
    values: dict[str, Any] = json.loads(shape)
    return values


def value_at(name: str, task: AnyTask, training: Training) -> Any:
    """Return what task and training themselves say for a parameter that makes shapes."""
    if name.startswith(MODEL_PREFIX):
        return task.settings.get(name.removeprefix(MODEL_PREFIX))
    return getattr(training, name)


def shaped(
    values: Mapping[str, Any], task: AnyTask, training: Training
) -> tuple[AnyTask, Training]:
    """Return task and training with the values of a shape."""
    settings = {
        name.removeprefix(MODEL_PREFIX): value
        for name, value in values.items()
        if name.startswith(MODEL_PREFIX)
    }
    trained = {name: value for name, value in values.items() if not name.startswith(MODEL_PREFIX)}
    return task.with_settings(settings), training.shaped(trained)
