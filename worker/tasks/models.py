"""The built-in models."""

from collections.abc import Mapping
from math import prod
from typing import Any

from torch import nn


def mlp(settings: Mapping[str, Any], input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Build a multilayer perceptron: linear, norm, ReLU and dropout for each hidden layer.

    Settings: ``hidden`` (widths, default ``[128]``) and ``norm`` (``batch``, ``layer`` or
    ``none``, default ``batch``). Inputs are flattened. The dropout rate is the lane's, so none is
    set here. In front of batch norm a linear layer has no bias: the norm would cancel it, and Adam
    would walk it along the rounding errors of a gradient that is zero.
    """
    norm = settings.get("norm", "batch")
    layers: list[nn.Module] = [nn.Flatten()]
    width = prod(input_shape)
    for hidden in settings.get("hidden", (128,)):
        linear = nn.Linear(width, hidden, bias=norm != "batch")
        layers += [linear, *_norm(norm, hidden), nn.ReLU(), nn.Dropout()]
        width = hidden
    return nn.Sequential(*layers, nn.Linear(width, classes))


def _norm(name: str, width: int) -> list[nn.Module]:
    match name:
        case "batch":
            return [nn.BatchNorm1d(width)]
        case "layer":
            return [nn.LayerNorm(width)]
        case "none":
            return []
    raise ValueError(f"norm must be batch, layer or none, not {name!r}")
