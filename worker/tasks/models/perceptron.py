"""Multilayer perceptrons, and the one without a hidden layer."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from torch import nn

from regtune.spec import LinearSettings, MlpSettings
from worker.tasks.models.layers import activation, dropout, initialize, norm


def mlp(settings: Mapping[str, Any], input_shape: tuple[int, ...], outputs: int) -> nn.Module:
    """Build a multilayer perceptron: linear, norm, activation and dropout for each hidden layer.

    Inputs are flattened. Settings: ``MlpSettings``.
    """
    asked = MlpSettings.model_validate(settings)
    width = prod(input_shape)
    layers: list[nn.Module] = []
    for hidden in asked.hidden:
        layers += [
            nn.Linear(width, hidden, bias=asked.norm != "batch"),
            *norm(asked.norm, hidden, asked.groups),
            activation(asked.activation),
            dropout(asked.activation),
        ]
        width = hidden
    layers.append(nn.Linear(width, outputs))
    return initialize(_flat(layers, asked.input_dropout), asked.activation)


def linear(settings: Mapping[str, Any], input_shape: tuple[int, ...], outputs: int) -> nn.Module:
    """Build one linear layer. Inputs are flattened. Settings: ``LinearSettings``."""
    asked = LinearSettings.model_validate(settings)
    return _flat([nn.Linear(prod(input_shape), outputs)], asked.input_dropout)


def _flat(layers: Sequence[nn.Module], input_dropout: bool) -> nn.Module:
    """Return layers on flat inputs, numbered from 1; the site at the inputs has a name instead."""
    first = [("input_dropout", nn.Dropout())] if input_dropout else []
    numbered = [(str(number), layer) for number, layer in enumerate(layers, start=1)]
    return nn.Sequential(OrderedDict([("0", nn.Flatten()), *first, *numbered]))
