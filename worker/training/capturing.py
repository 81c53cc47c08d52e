"""CUDA graphs: all kernels of a step launched at once.

A step of many small kernels leaves a GPU waiting for the host. Captured, it is launched as a whole
(A. Gray, Getting Started with CUDA Graphs, NVIDIA 2019). A graph reads and writes the same
addresses each time, so it is captured anew when lanes are moved, and whatever changes from step to
step is copied to where the graph looks for it.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from math import nan
from typing import Any, Protocol

import torch
from torch import Tensor

from worker.training.agreement import Group, largest_difference
from worker.training.cores import side_streams

Form = Callable[..., Sequence[Tensor]]
Leaves = Sequence[Tensor]


class Graph(Protocol):
    """What was captured; ``torch.cuda.CUDAGraph`` is one."""

    def replay(self) -> None:
        """Run it."""


class Captured:
    """A form of a program together with its fixed arguments, as one graph."""

    def __init__(self, graph: Graph, inputs: Leaves, output: Tensor) -> None:
        self._graph = graph
        self._inputs = inputs
        self._output = output

    def __call__(self, *varying: Tensor) -> Tensor:
        """Return a copy of what the form returns for these arguments."""
        for where, what in zip(self._inputs, varying, strict=True):
            where.copy_(what)
        self._graph.replay()
        return self._output.clone()


def capture(form: Form, fixed: Leaves, copies: Leaves, varying: Leaves) -> Captured:
    """Capture a form on the current device; nothing is computed but on ``copies`` of ``fixed``.

    All graphs of a process share the memory that they need within a step, so no two of them may
    run at the same time. Raises whatever keeps CUDA from capturing.
    """
    inputs = [copy_of(leaf) for leaf in varying]
    graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    side = side_streams(current.device).capturing
    side.wait_stream(current)
    with torch.cuda.stream(side):  # libraries set themselves up in a first call, off the record
        form(*copies, *inputs)
    current.wait_stream(side)
    try:
        # Threads that bring rows call CUDA meanwhile; only this one's calls belong to the capture.
        with torch.cuda.graph(
            graph, pool=_shared_memory(), stream=side, capture_error_mode="thread_local"
        ):
            (output,) = form(*fixed, *inputs)
    finally:
        torch.cuda.set_stream(current)  # a capture that cannot begin leaves its own one behind
    output.fill_(nan)  # what a graph does not write there is no result
    return Captured(graph, inputs, output)


def first_replay(
    captured: Callable[..., Tensor],
    expected: Tensor,
    fixed: Leaves,
    copies: Leaves,
    varying: Leaves,
    groups: Sequence[Group],
    tolerance: float,
) -> tuple[Tensor, bool]:
    """Call what was captured; return the result, and whether the form has done the same.

    The form has returned ``expected`` and changed ``copies``. If it has not done the same, it is
    what was called in the end, as where there is no memory to compare. What stands in ``copies``
    itself, and not as a copy, is taken for unchanged. ``groups`` are those of ``fixed``, see
    ``agreement``.
    """
    result = captured(*varying)
    changed = [
        (group, copy, leaf)
        for group, copy, leaf in zip(groups, copies, fixed, strict=True)
        if copy is not leaf
    ]
    with suppress(torch.OutOfMemoryError):
        if largest_difference([("result", expected, result), *changed]) <= tolerance:
            return result, True
    for _, copy, leaf in changed:
        leaf.copy_(copy)
    return expected, False


def copy_of(tensor: Tensor) -> Tensor:
    """Return a copy that lies in memory as the original does, which ``clone`` does not promise."""
    copy = torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
    )
    return copy.copy_(tensor)


@cache
def _shared_memory() -> Any:
    return torch.cuda.graph_pool_handle()
