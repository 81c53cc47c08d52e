"""Multilayer perceptrons, and the one without a hidden layer."""

from collections.abc import Mapping
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
    layers: list[nn.Module] = [nn.Flatten()]
    for hidden in asked.hidden:
        layers += [
            nn.Linear(width, hidden, bias=asked.norm != "batch"),
            *norm(asked.norm, hidden, asked.groups),
            activation(asked.activation),
            dropout(asked.activation),
        ]
        width = hidden
    layers.append(nn.Linear(width, outputs))
    return initialize(nn.Sequential(*layers), asked.activation)


def linear(settings: Mapping[str, Any], input_shape: tuple[int, ...], outputs: int) -> nn.Module:
    """Build one linear layer. Inputs are flattened. Settings: ``LinearSettings``."""
    LinearSettings.model_validate(settings)
    return nn.Sequential(nn.Flatten(), nn.Linear(prod(input_shape), outputs))
