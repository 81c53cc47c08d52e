"""A residual network for tables.

Y. Gorishniy, I. Rubachev, V. Khrulkov and A. Babenko, Revisiting Deep Learning Models for Tabular
Data, NeurIPS 2021, arXiv 2106.11959. They embed categories; here they come one-hot.
"""

from collections import OrderedDict
from collections.abc import Mapping
from math import prod
from typing import Any

from torch import Tensor, nn

from regtune.spec import TabularResnetSettings
from worker.tasks.models.layers import activation, dropout, initialize, norm


class ResidualBlock(nn.Module):
    """x + dropout(linear(dropout(activation(linear(norm(x))))))."""

    def __init__(self, asked: TabularResnetSettings) -> None:
        super().__init__()
        hidden = max(1, round(asked.width * asked.hidden_factor))
        self.norm = nn.Sequential(*norm(asked.norm, asked.width, asked.groups))
        self.first = nn.Linear(asked.width, hidden)
        self.activation = activation(asked.activation)
        self.hidden_dropout = dropout(asked.activation)
        self.second = nn.Linear(hidden, asked.width, bias=asked.norm != "batch")
        self.residual_dropout = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, width)`` to the same shape."""
        hidden = self.hidden_dropout(self.activation(self.first(self.norm(x))))
        added: Tensor = x + self.residual_dropout(self.second(hidden))
        return added


def tabular_resnet(
    settings: Mapping[str, Any], input_shape: tuple[int, ...], outputs: int
) -> nn.Module:
    """Build a linear layer, residual blocks, and norm, activation and a linear layer at the end.

    Inputs are flattened. Settings: ``TabularResnetSettings``.
    """
    asked = TabularResnetSettings.model_validate(settings)
    first = nn.Linear(prod(input_shape), asked.width, bias=asked.norm != "batch")
    blocks = [(f"block_{number}", ResidualBlock(asked)) for number in range(1, asked.depth + 1)]
    head = nn.Sequential(
        *norm(asked.norm, asked.width, asked.groups),
        activation(asked.activation),
        nn.Linear(asked.width, outputs),
    )
    parts = [("flatten", nn.Flatten()), ("first", first), *blocks, ("head", head)]
    return initialize(nn.Sequential(OrderedDict(parts)), asked.activation)
