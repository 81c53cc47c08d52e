"""Search spaces for kinds of problems, after the usual advice for each.

A preset only says what is searched where the person names nothing. docs/studies.md tells where the
ranges come from.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from regtune.spec.search import for_each, zero_or
from regtune.spec.training import Training

PresetName = Literal["small_data", "sequence", "large_model", "noisy_data"]


def preset_search(
    name: str, training: Training, optimizers: Sequence[str], *, has_labels: bool
) -> dict[str, Any]:
    """Return what a preset searches; every strength that it does not name keeps its default.

    ``name`` is a ``PresetName``.

    Labels are smoothed only where there are some, that is, where a class is predicted.
    """
    found = _PRESETS[name](training, optimizers or (training.optimizer,))
    if not has_labels:
        found.pop("label_smoothing", None)
    return found


def _small_data(training: Training, optimizers: Sequence[str]) -> dict[str, Any]:
    epochs = training.max_epochs
    return {
        "weight_decay": _decay(training, optimizers, decoupled=(1e-2, 10.0), coupled=(1e-5, 0.1)),
        "dropout": _linear(0.8),
        "label_smoothing": _linear(0.2),
        "input_noise": _linear(0.5),
        "patience": _patience(epochs // 5, epochs),
    }


def _sequence(training: Training, optimizers: Sequence[str]) -> dict[str, Any]:
    return {
        "weight_decay": _decay(training, optimizers, decoupled=(1e-3, 1.0), coupled=(1e-7, 1e-3)),
        "dropout": _linear(0.65),
        "l1_lambda": 0.0,
        "label_smoothing": _linear(0.2),
        "weight_noise": zero_or(1e-3, 0.1),
        "max_gradient_norm": zero_or(0.25, 10.0),
    }


def _large_model(training: Training, optimizers: Sequence[str]) -> dict[str, Any]:
    found = {
        "weight_decay": _decay(training, optimizers, decoupled=(1e-2, 1.0), coupled=(1e-6, 1e-2)),
        "dropout": _linear(0.3),
        "l1_lambda": 0.0,
        "label_smoothing": _linear(0.2),
    }
    if "learning_rate" not in training.model_fields_set:
        found["learning_rate"] = for_each(optimizers, _learning_rates)
    return found


def _noisy_data(training: Training, optimizers: Sequence[str]) -> dict[str, Any]:
    epochs = training.max_epochs
    return {
        "weight_decay": _decay(training, optimizers, decoupled=(1e-3, 10.0), coupled=(1e-5, 0.1)),
        "dropout": _linear(0.7),
        "l1_lambda": 0.0,
        "label_smoothing": _linear(0.4),
        "input_noise": _linear(1.0),
        "mixup": _linear(1.0),
        "patience": _patience(epochs // 20, epochs // 4),
    }


_PRESETS: Mapping[str, Callable[[Training, Sequence[str]], dict[str, Any]]] = {
    "small_data": _small_data,
    "sequence": _sequence,
    "large_model": _large_model,
    "noisy_data": _noisy_data,
}


def _decay(
    training: Training,
    optimizers: Sequence[str],
    *,
    decoupled: tuple[float, float],
    coupled: tuple[float, float],
) -> Any:
    forms = {"decoupled": decoupled, "coupled": coupled}
    return for_each(optimizers, lambda name: zero_or(*forms[training.decay_of(name)]))


def _learning_rates(optimizer: str) -> dict[str, Any]:
    low, high = (1e-3, 0.3) if optimizer == "sgd" else (1e-5, 3e-3)
    return {"low": low, "high": high, "log": True}


def _linear(high: float) -> dict[str, Any]:
    return {"low": 0.0, "high": high}


def _patience(low: int, high: int) -> dict[str, Any]:
    low = max(1, low)
    return {"low": low, "high": max(low + 1, high)}
