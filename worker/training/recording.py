"""Recorded functions: the Python on the way to the tensor operations is walked only a few times.

``vmap``, ``grad`` and ``functional_call`` cost some 2 ms of Python a step, whatever the number of
lanes. A function that is called again and again with the same shapes is recorded, by ``make_fx``,
as the plain list of operations that it comes down to; from then on that list runs. It is the same
operations on the same numbers, and needs no compiler.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import structlog
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

log = structlog.get_logger()

CALLS_BEFORE = 60
"""Recording takes as long as about this many calls save, so rarer shapes are not worth it."""

Function = Callable[..., Any]


class Recorder:
    """Keeps a recording for each function and each set of argument shapes."""

    def __init__(self) -> None:
        self._calls: Counter[Any] = Counter()
        self._recordings: dict[Any, Function] = {}

    def call(self, name: str, function: Function, *arguments: Any) -> Any:
        """Return ``function(*arguments)``, by its recording if there is one.

        ``name`` and the shapes of the arguments must decide which operations are called.
        """
        shapes = tuple(leaf.shape for leaf in pytree.tree_leaves(arguments))
        key = name, shapes
        if key not in self._recordings:
            self._calls[key] += 1
            if self._calls[key] <= CALLS_BEFORE:
                return function(*arguments)
            self._recordings[key] = record(function, arguments)
        return self._recordings[key](*arguments)


def record(function: Function, arguments: tuple[Any, ...]) -> Function:
    """Return the operations that ``function`` calls; itself, if torch cannot record them.

    Recording runs the function, so it gets copies: it may write into its arguments.
    """
    copies = pytree.tree_map(torch.clone, arguments)
    try:
        recording: Function = make_fx(lambda *a: function(*a))(*copies).forward
    except Exception as error:  # noqa: BLE001 - whatever it is, the function itself still works
        log.warning("step_not_recorded", reason=str(error).partition("\n")[0])
        return function
    return recording
