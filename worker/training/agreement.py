"""Whether two forms of a step do the same, but for rounding.

A difference counts relative to the norm of a group of tensors: all parameters, or all moments of
one kind. A single tensor tells little, since a gradient that is nothing but rounding, as that of a
bias in front of a batch norm, is whatever the rounding was, and Adam walks as far by it as by any
other.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterable
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

Group = Hashable


def groups_of(arguments: Any) -> list[Group]:
    """Return for each leaf of a tree of tensors which group it belongs to: those side by side."""
    return [pytree.keystr(path[:-1]) for path, _ in pytree.tree_flatten_with_path(arguments)[0]]


def largest_difference(pairs: Iterable[tuple[Group, Tensor, Tensor]]) -> float:
    """Return by how much pairs of tensors differ, relative to the first, in the worst group.

    In a group of zeros, the difference itself counts. A NaN counts as 0.
    """
    apart: dict[Group, float] = defaultdict(float)
    squares: dict[Group, float] = defaultdict(float)
    for group, one, other in pairs:
        one, other = one.double().nan_to_num(), other.double().nan_to_num()
        apart[group] += float((one - other).square().sum())
        squares[group] += float(one.square().sum())
    return max(((apart[g] / (squares[g] or 1.0)) ** 0.5 for g in apart), default=0.0)
