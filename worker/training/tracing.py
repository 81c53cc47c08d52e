"""Keeps apart who traces and who calls modules.

While FX traces, for ``make_fx`` or within TorchInductor, ``nn.Module`` is changed for the whole
process. A module that another thread calls meanwhile may raise, and so may two traces at once. So a
trace waits until no module is being called, and calls wait until it has ended.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch.fx


class Turns:
    """A lock that many may share who call, or one may have who traces.

    Whoever holds it in one way may enter again in either: a model may trace a part of itself.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._calls = 0
        self._traced = False
        self._traces_waiting = 0
        self._mine = threading.local()

    @contextmanager
    def calling(self) -> Iterator[None]:
        """Hold off traces by other threads; a trace that waits already goes first."""
        if self._entered:
            yield
            return
        with self._changed:
            self._changed.wait_for(lambda: not (self._traced or self._traces_waiting))
            self._calls += 1
        with self._inside():
            yield

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """Hold off calls and traces by other threads."""
        if self._entered:
            yield
            return
        with self._changed:
            self._traces_waiting += 1
            self._changed.wait_for(lambda: not (self._traced or self._calls))
            self._traces_waiting -= 1
            self._traced = True
        with self._inside():
            yield

    @contextmanager
    def _inside(self) -> Iterator[None]:
        """Have a turn that was taken, of either kind, and give it back."""
        self._mine.entered = True
        try:
            yield
        finally:
            self._mine.entered = False
            with self._changed:
                # A trace is alone, so whoever leaves while none is under way was calling.
                if self._traced:
                    self._traced = False
                else:
                    self._calls -= 1
                self._changed.notify_all()

    @property
    def _entered(self) -> bool:
        return getattr(self._mine, "entered", False)


TURNS = Turns()
"""Those of this process."""


def _take_turns() -> None:
    """Let every trace of FX in this process take its turn."""
    trace = torch.fx.Tracer.trace

    @wraps(trace)
    def in_turn(self: torch.fx.Tracer, *arguments: Any, **options: Any) -> torch.fx.Graph:
        with TURNS.tracing():
            return trace(self, *arguments, **options)

    torch.fx.Tracer.trace = in_turn  # type: ignore[method-assign]


_take_turns()
