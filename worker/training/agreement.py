"""Whether two forms of a step do the same, but for rounding.

A difference counts relative to the norm of a group of tensors: all parameters, or all moments of
one kind. A single tensor tells little, since a gradient that is nothing but rounding, as that of a
bias in front of a batch norm, is whatever the rounding was, and Adam walks as far by it as by any
other.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Group = Hashable


def groups_of(arguments: Any) -> list[Group]:
    """Return for each leaf of a tree of tensors which group it belongs to: those side by side."""
    return [pytree.keystr(path[:-1]) for path, _ in pytree.tree_flatten_with_path(arguments)[0]]


def differences(pairs: Iterable[tuple[Group, Tensor, Tensor]]) -> Mapping[Group, float]:
    """Return by how much pairs of tensors differ, relative to the first, in each group.

    In a group of zeros, the difference itself counts. A NaN counts as 0.
    """
    apart: dict[Group, float] = defaultdict(float)
    squares: dict[Group, float] = defaultdict(float)
    for group, one, other in pairs:
        one, other = one.double().nan_to_num(), other.double().nan_to_num()
        apart[group] += float((one - other).square().sum())
        squares[group] += float(one.square().sum())
    return {group: (apart[group] / (squares[group] or 1.0)) ** 0.5 for group in apart}


def largest_difference(pairs: Iterable[tuple[Group, Tensor, Tensor]]) -> float:
    """Return by how much pairs of tensors differ in the worst group."""
    return max(differences(pairs).values(), default=0.0)


def rounded_otherwise(tensor: Tensor, epsilon: float) -> Tensor:
    """Return a tensor as it might be if its numbers had been rounded otherwise, everywhere.

    They are off by up to the precision of their type, or by ``epsilon`` if that is coarser. Only
    tensors of several dimensions: the others hold settings, not sums.
    """
    if not tensor.is_floating_point() or tensor.ndim < 2:
        return tensor
    epsilon = max(epsilon, torch.finfo(tensor.dtype).eps)
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * 2 - 1
    return tensor * (1 + epsilon * noise).to(tensor.device, tensor.dtype)
