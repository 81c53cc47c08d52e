"""Stochastic weight averaging: what is evaluated is the mean of the weights at epochs' ends.

P. Izmailov et al., arXiv 1803.05407. Until it begins, the weights themselves are evaluated.
"""

from collections.abc import Collection, Mapping, Sequence
from math import floor

import torch
from torch import Tensor

from regtune.spec import Training

Tensors = Mapping[str, Tensor]


def averaged_epochs(training: Training, epochs: Sequence[int]) -> list[int]:
    """Return of how many epochs the average is at each of these epochs' ends, counted from 1."""
    # A product that is whole but for rounding counts as whole.
    first = floor(training.averaging_start * training.max_epochs + 1e-9) + 1
    return [max(epoch - first + 1, 1) for epoch in epochs]


def average_(averages: Tensors, parameters: Tensors, count_K: Tensor) -> None:
    """Take K lanes' parameters into their averages, which are of ``count_K`` epochs with this one.

    The average of a single epoch is that epoch's parameters.
    """
    for name, average_K in averages.items():
        share_K = (1 / count_K).view(-1, *(1 for _ in average_K.shape[1:]))
        average_K.lerp_(parameters[name], share_K)


def complete_buffers_(
    average_buffers: Tensors, buffers: Tensors, found: Collection[str], count_K: Tensor
) -> None:
    """Copy K lanes' buffers to those of their averages, but for statistics that were found there.

    Where the average is of a single epoch, the weights' own running statistics are right.
    """
    for name, target_K in average_buffers.items():
        if name in found:
            averaged_K = (count_K > 1).view(-1, *(1 for _ in target_K.shape[1:]))
            torch.where(averaged_K, target_K, buffers[name], out=target_K)
        else:
            target_K.copy_(buffers[name])
