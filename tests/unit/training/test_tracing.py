"""Who traces and who calls modules keep out of each other's way."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from tests.waiting import wait_until
from worker.training.tracing import TURNS, Turns


def test_calls_share_their_turn_and_a_trace_has_it_alone():
    turns, inside, together = Turns(), [], threading.Barrier(2)

    def call() -> None:
        with turns.calling():
            together.wait(10)  # passes only with both inside
            inside.append("call")

    def trace() -> None:
        with turns.tracing():
            inside.append("trace")

    with ThreadPoolExecutor(4) as pool:
        for job in (call, call, trace, trace):
            pool.submit(job)
    assert sorted(inside) == ["call", "call", "trace", "trace"]


def waiting_for(turn: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=turn, daemon=True)
    thread.start()
    return thread


def test_a_trace_waits_for_calls_and_new_calls_wait_for_it():
    turns, order = Turns(), []

    def trace() -> None:
        with turns.tracing():
            order.append("trace")

    def call() -> None:
        with turns.calling():
            order.append("call")

    with turns.calling():
        threads = [waiting_for(trace)]
        wait_until(lambda: turns._traces_waiting == 1, 10)
        threads.append(waiting_for(call))
        order.append("first")
    for thread in threads:
        thread.join(10)
    assert order == ["first", "trace", "call"]


def test_whoever_is_inside_may_enter_again_in_either_way():
    turns = Turns()
    with turns.calling(), turns.tracing(), turns.calling():
        pass
    with turns.tracing(), turns.calling(), turns.tracing():
        pass
    assert not turns._calls


def test_the_turn_is_given_back_after_an_exception():
    turns = Turns()
    for enter in (turns.calling, turns.tracing):
        try:
            with enter():
                raise ZeroDivisionError
        except ZeroDivisionError:
            pass
    with turns.tracing():
        pass


def test_modules_can_be_called_while_others_trace():
    """Without turns, calls raise that a module is not installed, and traces that none is left."""
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), torch.ones(3, 4)
    stop = threading.Event()

    def call() -> int:
        calls = 0
        while not stop.is_set():
            with TURNS.calling():
                model(x)
            calls += 1
        return calls

    def trace() -> None:
        for _ in range(20):
            torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
            make_fx(lambda y: torch.relu(y * 2))(x)

    with ThreadPoolExecutor(4) as pool:
        callers, tracers = [pool.submit(call)], [pool.submit(trace) for _ in range(2)]
        try:
            for tracer in tracers:
                tracer.result(60)
        finally:
            stop.set()
        assert all(caller.result(60) for caller in callers)
