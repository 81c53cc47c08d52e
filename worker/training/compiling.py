"""How functions of lanes that are called again and again get faster while they are in use.

A function is first called as it is written. Walking through ``vmap``, ``grad`` and
``functional_call`` costs some 2 ms of Python each time, so after a few calls it is recorded, by
``make_fx``, as the plain list of operations that it comes down to. Once a recording has run for
about as long as compiling takes, or certainly will, TorchInductor compiles it in the background;
from the next epoch on the compiled form runs, if it gives the same numbers and is faster. A short
study therefore never compiles, and a long one spends at most twice what it had to (the ski-rental
bound).
TorchInductor keeps what it has compiled on disk, where the next worker finds it; so what was
compiled before need not run for long.
"""

import atexit
import hashlib
import importlib
import logging
import os
import queue
import threading
import weakref
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from functools import partial
from math import inf
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import structlog
import torch
import torch._inductor
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._inductor.codecache import CacheBase
from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from worker.training.agreement import Group, differences, groups_of, rounded_otherwise
from worker.training.capturing import (
    Captured,
    Form,
    Leaves,
    capture,
    copy_of,
    first_replay,
)
from worker.training.cores import synchronize
from worker.training.memory import is_out_of_memory
from worker.training.repeating import Repeatable, compile_repeatable

log = structlog.get_logger()

CALLS_BEFORE_RECORDING = 60
"""Recording takes as long as about this many calls save, so rarer shapes are not worth it."""

SECONDS_BEFORE_RECORDING = 10.0
"""Slow functions gain little by being recorded, but the faster of two ways may gain much."""

SECONDS_BEFORE_COMPILING = 5.0
"""About what it takes to compile one function on one core."""

SECONDS_BEFORE_FETCHING = 1.0
"""The same for what is on disk: 0.1 s, and 1.4 s to load TorchInductor if nothing else has."""

MOST_COMPILED = 16
"""Programs of one engine that are compiled; those in use longest, rarer ones stay recorded."""

CALLS_BEFORE_CAPTURING = 20
"""Calls on the same lanes after which a CUDA graph is worth its capture."""

MOST_IN_VAIN = 2
"""Programs in a row that do not compile, after which an engine compiles nothing more; and captures
of one program that fail or compute something else, after which it is captured no more.

One may be what TorchInductor trips over; two mean that there is no compiler, or a model that is
none for it, and each try takes seconds of a core.
"""

HEAD_START_SECONDS, HEAD_START_SHARE = 4.0, 0.3
"""How long training waits at most for what is compiled first, and for which share of its own time.

What a worker has compiled before is there after one or two seconds. Anything else begins with a few
seconds of Python, in which steps that are not compiled would get hardly any of the interpreter.
"""

SETTLING_SECONDS = 0.05
"""How often is looked whether all has been compiled."""

TRIES = 3
"""Calls by which two forms of a program are compared."""

REMATCHES = 3
"""How often a compiled form that seemed slower is tried again.

While another program is being compiled, any call may wait many times its own length for the
interpreter: of ten first studies of a model, one took its compiled step for 16 times slower than
the other, where it is four times faster.
"""

TOLERANCE = 5e-3
"""Largest difference in one call between two forms of a program, see ``agreement``.

Not less, because torch's batch norm of images on a CPU sums up a channel's activations in float32
one after the other: its gradients are off by up to 2e-3 (measured against float64).
"""

ROUNDINGS = 3.0
"""A group that differs more does so by rounding if it is no more than so many times what other
rounding of the arguments makes of it."""

CLEARLY_FASTER = 0.8
"""Which share of the first way's time another one has to take to be recorded instead.

Of ways that are about as fast, the one that comes out ahead changes from run to run; compiled, the
other one of a perceptron takes 1.08 times as long.
"""

_CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"

Function = Callable[..., Tensor]
Call = Callable[[], object]


_BETWEEN_STEPS: dict[int, float] = {}
"""Threads that record, compare or capture a program, and since when."""

MOST_SECONDS_BETWEEN_STEPS = 600.0
"""What takes longer than that hangs."""


@contextmanager
def _between_steps() -> Iterator[None]:
    thread = threading.get_ident()
    _BETWEEN_STEPS[thread] = perf_counter()
    try:
        yield
    finally:
        _BETWEEN_STEPS.pop(thread, None)


def is_between_steps() -> bool:
    """Say whether a program is being recorded, compared or captured, which is progress of a kind.

    To record a large network takes a minute, in which no step is taken.
    """
    now = perf_counter()
    return any(now - began < MOST_SECONDS_BETWEEN_STEPS for began in [*_BETWEEN_STEPS.values()])


class Program:
    """A function of tensors for one set of shapes, in the fastest form found so far.

    A form takes the leaves of the arguments and returns the result in a tuple. Several threads may
    call a program at once, each with arguments of its own.
    """

    def __init__(
        self,
        name: str,
        lanes: int,
        threads: int,
        constants: Collection[int] = (),
        kind: Hashable = None,
        epsilon: float = 0.0,
        recording_seconds: float = 0.0,
    ) -> None:
        """``constants`` are the addresses of arguments that no call changes.

        ``epsilon`` is the relative precision of its sums, if coarser than that of its arguments.
        ``recording_seconds`` is about what it takes to record it.

        Programs of the same ``kind`` do the same on different numbers of threads; which number is
        the best can be told only when all are compiled or none is.

        ``speedup`` is how many times faster the compiled form has been found, ``obstacle`` what has
        kept this program from being recorded or compiled. ``way`` is which of several ways is
        recorded; where it is known before, no other is tried.
        """
        self.name = name
        self.kind = kind
        self._constants = constants
        self._epsilon = epsilon
        self._recording_seconds = recording_seconds
        self.lanes = lanes
        self.threads = threads
        self.calls = 0
        self.seconds = 0.0
        self.certain = 0.0
        self._busy = 0.0
        self._first_called = perf_counter()
        self.queued = False
        self.challenger: Form | None = None
        self._beaten: Form | None = None
        self._rematches = REMATCHES
        self.speedup: float | None = None
        self.obstacle: str | None = None
        self.way: int | None = None
        self.recording: GraphModule | None = None
        self.examples: Leaves = ()
        self._known = False
        self._form: Form | None = None
        self._groups: Sequence[Group] = ()
        self._recordable = True
        self._capturable = True
        self._vain_captures = 0
        self._captured: Captured | None = None
        self._place: Hashable = None
        self._calls_here = 0
        self._changing = threading.Lock()

    def bind(self, functions: Sequence[Function], *fixed: Any) -> "Bound":
        """Return the program for arguments of which these stay the same from call to call.

        Arguments are tensors, or trees of them for the fixed ones. ``functions`` are ways to do the
        same, wherever the program is bound: the first one is called until all are recorded, and
        from then on the fastest.
        """
        leaves, spec = pytree.tree_flatten(fixed)
        place = tuple(leaf.data_ptr() for leaf in leaves)
        self._groups = groups_of(fixed)
        self._capturable &= any(leaf.device.type == "cuda" for leaf in leaves)

        def call(pending: Sequence[Leaves]) -> Sequence[Tensor]:
            varying = pending[0]
            self.calls += 1
            if self.challenger is not None:
                self._alone(lambda: self._duel([*leaves, *varying]))
            form = self._form
            if form is None and self._recordable and self._has_earned_recording():
                self._alone(lambda: self._record(functions, spec, [*leaves, *varying]))
            started = perf_counter()
            if form is None:
                results: Sequence[Tensor] = [functions[0](*fixed, *varying)]
            elif isinstance(form, Repeatable):
                results = form.repeat(leaves, pending)
            else:
                results = [self._run(form, place, leaves, varying)]
            self._busy += perf_counter() - started
            self.calls += len(results) - 1
            return results

        return Bound(call)

    def _run(self, form: Form, where: Hashable, fixed: Leaves, varying: Leaves) -> Tensor:
        """Call a form; on CUDA as a graph, once it has been called often enough in one place.

        ``where`` says where the fixed arguments lie.
        """
        if not self._capturable:
            return form(*fixed, *varying)[0]
        place = form, where
        if place != self._place:
            self._place, self._calls_here, self._captured = place, 0, None
        if self._captured is not None:
            return self._captured(*varying)
        self._calls_here += 1
        if self._calls_here <= CALLS_BEFORE_CAPTURING:
            return form(*fixed, *varying)[0]
        return self._capture(form, fixed, varying)

    def _capture(self, form: Form, fixed: Leaves, varying: Leaves) -> Tensor:
        """Capture a form and call it once."""
        with _between_steps():
            made = self._try_to_capture(form, fixed, varying)
        if made is None:
            return form(*fixed, *varying)[0]
        captured, expected, copies = made
        result, agrees = first_replay(
            captured, expected, fixed, copies, varying, self._groups, TOLERANCE
        )
        if agrees:
            self._captured, self._vain_captures = captured, 0
            log.info("captured", program=self.name, lanes=self.lanes)
        else:
            # In Adam's first steps rounding alone may differ so much, and on other lanes not.
            self._capture_in_vain("it computes something else")
        return result

    def _capture_in_vain(self, reason: str) -> None:
        """Say so; it is tried again later, but not for ever."""
        self._vain_captures += 1
        self._capturable, self._calls_here = self._vain_captures < MOST_IN_VAIN, 0
        log.warning("not_captured", program=self.name, reason=reason)

    def _try_to_capture(
        self, form: Form, fixed: Leaves, varying: Leaves
    ) -> tuple[Captured, Tensor, Leaves] | None:
        """Return a form captured, what it should return, and copies that it has changed.

        None if that cannot be, with nothing left that holds memory.
        """
        try:
            captured = capture(form, fixed, self._copies(fixed), varying)
            copies = self._copies(fixed)
            (expected,) = form(*copies, *varying)
        except Exception as error:  # noqa: BLE001 - whatever it is, the form itself still works
            self._capture_in_vain(first_line(error))  # memory may have been short just then
            return None
        return captured, expected, copies

    def _has_earned_recording(self) -> bool:
        since = perf_counter() - self._first_called
        return (
            self.calls > CALLS_BEFORE_RECORDING
            or since > max(SECONDS_BEFORE_RECORDING, self._recording_seconds)
            or (self.pays and self.certain >= self._recording_seconds)
        )

    @property
    def pays(self) -> bool:
        """Whether it runs for so long that it pays to compile it."""
        return self.certain >= (
            SECONDS_BEFORE_FETCHING if self._known else SECONDS_BEFORE_COMPILING
        )

    @property
    def settled(self) -> bool:
        """Whether calls are of the form in which they go on, until anything has been compiled."""
        if self._form is None:
            return not self._recordable
        return self._captured is not None or not self._capturable

    def forget_capture(self) -> None:
        """Drop the CUDA graph, which keeps a copy of whatever changes from call to call."""
        self._place = self._captured = None

    def take_work(self) -> float:
        """Return how many seconds its calls have taken since it was last asked.

        That is what the host has seen of them; a GPU goes on by itself.
        """
        busy, self._busy = self._busy, 0.0
        return busy

    def demand_rematch(self) -> bool:
        """Let a compiled form that seemed slower try again; return whether there is one."""
        if self._beaten is None or not self._rematches:
            return False
        self._rematches -= 1
        self.challenger, self._beaten = self._beaten, None
        return True

    def _alone(self, change: Callable[[], None]) -> None:
        """Change this program, unless another thread does so right now."""
        if self._changing.acquire(blocking=False):
            try:
                with _between_steps():
                    change()
            finally:
                self._changing.release()

    def _record(
        self, functions: Sequence[Function], spec: pytree.TreeSpec, arguments: Leaves
    ) -> None:
        if self._form is not None or not self._recordable:
            return
        try:
            if self.way is None:
                self.recording, self.examples = self._record_fastest(functions, spec, arguments)
            else:
                self.recording, self.examples = record(functions[self.way], spec, arguments)
            self._known = is_marked(self.recording, self.examples, self.threads)
            self._form = self.recording.forward
            log.debug("recorded", program=self.name, lanes=self.lanes, way=self.way)
        except Exception as error:  # noqa: BLE001 - whatever it is, the function itself still works
            self.obstacle = first_line(error)
            log.warning("not_recorded", program=self.name, reason=self.obstacle)
            self._recordable = False

    def _record_fastest(
        self, functions: Sequence[Function], spec: pytree.TreeSpec, arguments: Leaves
    ) -> tuple[GraphModule, Leaves]:
        """Record all ways; return that of the fastest, and note which one it is."""
        recordings = [record(function, spec, arguments) for function in functions]
        chosen = 0
        if len(recordings) > 1:
            copies = self._copies(arguments)
            seconds = [
                fastest(partial(recording.forward, *copies), copies[0].device)
                for recording, _ in recordings
            ]
            fastest_way = seconds.index(min(seconds))
            if seconds[fastest_way] < CLEARLY_FASTER * seconds[0]:
                usual, faster = (recordings[way][0].forward for way in (0, fastest_way))
                found = self._differences(
                    usual, self._copies(arguments), faster, self._copies(arguments)
                )
                chosen = fastest_way if self._are_rounding(found, usual, arguments) else 0
        self.way = chosen  # other threads may see it from here on
        return recordings[chosen]

    def _differences(
        self, one: Form, ones: Leaves, other: Form, others: Leaves
    ) -> Mapping[Group, float]:
        """Return by how much two forms differ in what they return and change, see ``agreement``.

        Each gets arguments of its own, of equal content; what both get is taken for unchanged.
        """
        groups = [*self._groups, *("varying" for _ in ones[len(self._groups) :])]
        results = [("result", a, b) for a, b in zip(one(*ones), other(*others), strict=True)]
        arguments = zip(groups, ones, others, strict=True)
        return differences((group, a, b) for group, a, b in [*results, *arguments] if a is not b)

    def _are_rounding(self, found: Mapping[Group, float], form: Form, arguments: Leaves) -> bool:
        """Say whether differences from a form are no more than other rounding might make."""
        if all(difference <= TOLERANCE for difference in found.values()):
            return True
        usual = self._by_rounding(form, arguments)
        return all(found[g] <= max(TOLERANCE, ROUNDINGS * usual[g]) for g in found)

    def _by_rounding(self, form: Form, arguments: Leaves) -> Mapping[Group, float]:
        """Return by how much a form differs from itself where its arguments are rounded otherwise.

        That is much in Adam's first steps, which go as far by a gradient that is nothing but
        rounding as by any other.
        """
        others = [
            one if one.data_ptr() in self._constants else rounded_otherwise(one, self._epsilon)
            for one in self._copies(arguments)
        ]
        return self._differences(form, self._copies(arguments), form, others)

    def _as_called(self, *forms: tuple[Form, Leaves]) -> Sequence[Call]:
        """Return how forms are called in the end, each on its arguments: on CUDA as graphs.

        Where to launch kernels takes longer than they do, the time of a form by itself says nothing
        of its graph. What cannot be captured will not be, and neither is what it is compared with.
        """
        count = len(self._groups)
        if self._capturable:
            with suppress(Exception):
                return [
                    partial(capture(form, own[:count], own[:count], own[count:]), *own[count:])
                    for form, own in forms
                ]
        return [partial(form, *own) for form, own in forms]

    def _copies(self, arguments: Leaves) -> list[Tensor]:
        return [
            argument if argument.data_ptr() in self._constants else copy_of(argument)
            for argument in arguments
        ]

    def _duel(self, arguments: Leaves) -> None:
        """Let the challenger take over if it does the same in less time; on copies."""
        challenger, champion = self.challenger, self._form
        self.challenger = None
        if challenger is None or champion is None:
            return
        try:
            copies, others = self._copies(arguments), self._copies(arguments)
            found = self._differences(champion, copies, challenger, others)
            agrees = self._are_rounding(found, champion, arguments)
            one, other = self._as_called((challenger, copies), (champion, others))
            seconds, before = compared(one, other, arguments[0].device)
        except Exception as error:  # noqa: BLE001 - whatever it is, the champion still works
            reason = first_line(error)
            if is_out_of_memory(error):
                self._beaten = challenger  # there may be memory another time
            else:
                self.obstacle = reason
            log.warning("compiled_in_vain", program=self.name, reason=reason)
            return
        self.speedup = before / seconds
        if agrees and seconds < before:
            self._form = challenger
        elif agrees:
            self._beaten = challenger
        log.info(
            "compiled" if self._form is challenger else "compiled_in_vain",
            program=self.name,
            lanes=self.lanes,
            speedup=round(self.speedup, 2),
            difference=float(f"{max(found.values(), default=0.0):.1e}"),
        )


class Bound:
    """A program to be called with what changes from call to call."""

    def __init__(self, call: Callable[[Sequence[Leaves]], Sequence[Tensor]]) -> None:
        self._call = call

    def __call__(self, *varying: Tensor) -> Tensor:
        """Call it once."""
        (result,) = self._call([varying])
        return result

    def some(self, pending: Sequence[Leaves]) -> Sequence[Tensor]:
        """Call it with the first of these arguments, or as many more as it takes at once.

        Return the results of those, at least one, in the order in which they were called.
        """
        return self._call(pending)


class Programs:
    """All programs of one engine; compiles, in a thread of its own, those that earn it."""

    def __init__(self, *, compiles: bool, constants: Leaves = (), epsilon: float = 0.0) -> None:
        """``constants`` are arguments that no call changes, such as the data set.

        ``epsilon`` is that of all programs, and so is ``recording_seconds``.
        """
        self.recording_seconds = 0.0
        self._compiles = compiles
        self._epsilon = epsilon
        self._constants = frozenset(tensor.data_ptr() for tensor in constants)
        self._programs: dict[tuple[Any, ...], Program] = {}
        self._finding = threading.Lock()
        self._queue: queue.Queue[Program | None] = queue.Queue()
        self._compiled: queue.SimpleQueue[tuple[Program, Form]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._expected: dict[tuple[str, int], float] = {}

    def find(self, name: str, lanes: int, threads: int, *shapes: Hashable) -> Program:
        """Return the program of this name for so many lanes, intra-op threads and shapes."""
        with self._finding:
            key = (name, lanes, threads, *shapes)
            if key not in self._programs:
                kind = (name, lanes, *shapes)
                program = Program(
                    name,
                    lanes,
                    threads,
                    self._constants,
                    kind,
                    self._epsilon,
                    self.recording_seconds,
                )
                program.certain = self._expected_of(program)
                program.way = self._way_of_others(program)
                self._programs[key] = program
            return self._programs[key]

    def settled(self, name: str, lanes: int, threads: int, rows: int) -> bool:
        """Say whether what computes batches of so many rows is in the form in which it goes on."""
        own = (name, lanes, threads)
        with self._finding:
            found = [
                p for key, p in self._programs.items() if key[:3] == own and key[3][-1] == rows
            ]
        return all(program.settled for program in found)

    def __iter__(self) -> Iterator[Program]:
        with self._finding:
            return iter(list(self._programs.values()))

    def forget_captures(self) -> None:
        """Drop all CUDA graphs: lanes have joined or left, and lie elsewhere now.

        Not only those of the next call's own program: each number of lanes has one.
        """
        for program in self:
            program.forget_capture()

    def epoch_ended(self, seconds: float, epochs_to_come: int = 0) -> bool:
        """Share an epoch's time out among the programs that were called, and compile for the next.

        ``epochs_to_come`` are those that will be trained for certain. Takes no time itself. Return
        whether the next calls try a compiled form, for the first time or again.
        """
        changed = self._take_compiled()
        programs = list(self)
        if not self._compiling:
            changed |= sum(program.demand_rematch() for program in programs) > 0
        work = [program.take_work() for program in programs]
        for program, share in zip(programs, work, strict=True):
            spent = seconds * share / (sum(work) or 1.0)
            program.seconds += spent
            known = program.seconds + spent * epochs_to_come
            program.certain = max(self._expected_of(program), known)
        self.compile_what_pays()
        return changed

    def expect(self, name: str, sizes: Collection[int], seconds: float) -> bool:
        """Say that a program will run for so long on each of these numbers of lanes.

        Return whether to record and compile it pays. Then it is recorded when it is first called.
        What was called until now was a rehearsal, and counts for nothing else.
        """
        self._expected = {(name, lanes): seconds for lanes in sizes}
        for program in self:
            program.take_work()
            program.certain = self._expected_of(program)
        return self._compiles and seconds >= max(SECONDS_BEFORE_COMPILING, self.recording_seconds)

    def compile_what_pays(self) -> None:
        """Compile what has been recorded and runs for long, or is expected to."""
        if not self._compiles:
            return
        programs = list(self)
        queued = sum(program.queued for program in programs)
        paying = {program.kind for program in programs if program.pays}
        for program in programs:
            earned = program.recording is not None and program.kind in paying
            if earned and not program.queued and queued < MOST_COMPILED:
                program.queued = True
                queued += 1
                self._submit(program)

    def settle(self, limit: float = inf) -> bool:
        """Wait until nothing is being compiled any more; the next calls try what has been.

        For so many seconds at most. Return whether there is anything new to try.
        """
        ends = perf_counter() + limit
        while self._compiling and perf_counter() < ends:
            sleep(SETTLING_SECONDS)
        return self._take_compiled()

    def close(self) -> None:
        """Compile nothing more; what is being compiled right now is left to end by itself."""
        self._closed = True
        self._queue.put(None)

    @property
    def _compiling(self) -> bool:
        alive = self._thread is not None and self._thread.is_alive()
        return alive and bool(self._queue.unfinished_tasks)

    def _expected_of(self, program: Program) -> float:
        """Return for how many seconds a program will run, as far as that has been said."""
        return self._expected.get((program.name, program.lanes), 0.0)

    def _way_of_others(self, program: Program) -> int | None:
        """Return how a program with as many lanes or more does the same, if that has been found.

        It need not be found again for other batches or fewer lanes; but one alone is no batch.
        """
        ways = (
            other.way
            for other in self._programs.values()
            if (other.name, other.threads) == (program.name, program.threads)
            and other.lanes >= program.lanes
            and (other.lanes > 1) == (program.lanes > 1)
        )
        return next((way for way in ways if way is not None), None)

    def _take_compiled(self) -> bool:
        taken = False
        while not self._compiled.empty():
            program, form = self._compiled.get()
            program.challenger = form
            taken = True
        return taken

    def _submit(self, program: Program) -> None:
        self._queue.put(program)
        if self._thread is None:
            self._thread = threading.Thread(target=self._compile_all, name="compiler", daemon=True)
            self._thread.start()
            _COMPILING.add(self)

    def end(self) -> None:
        """Close, and wait for what is being compiled."""
        self.close()
        if self._thread is not None:
            self._thread.join()

    def _compile_all(self) -> None:
        vain, reason = 0, ""
        while (program := self._queue.get()) is not None and not self._closed:
            started = perf_counter()
            try:
                assert program.recording is not None  # else it would not have been queued
                form = compile_recording(program.recording, program.examples, program.threads)
            except Exception as error:  # noqa: BLE001 - no compiler, or not for this model
                program.obstacle = first_line(error)
                if program.obstacle != reason:
                    log.warning("not_compiled", program=program.name, reason=program.obstacle)
                vain, reason = vain + 1, program.obstacle
                if vain == MOST_IN_VAIN:
                    return
            else:
                vain = 0
                self._compiled.put((program, form))
            self._queue.task_done()
            log.debug("compiling_took", seconds=round(perf_counter() - started, 1))


_COMPILING: weakref.WeakSet[Programs] = weakref.WeakSet()


@atexit.register
def _let_compilers_end() -> None:
    """Let no thread be cut off in the midst of C++ when the interpreter ends: that would crash."""
    for programs in list(_COMPILING):
        programs.end()


def keep_compiled_in(folder: Path) -> None:
    """Let TorchInductor keep on disk what it compiles in ``folder``, unless told otherwise.

    That is by the environment; on being imported it writes a temporary folder there by itself.
    """
    if os.environ.get(_CACHE_VARIABLE) in (None, default_cache_dir()):
        os.environ[_CACHE_VARIABLE] = str(folder)


def load_compiler_if_used() -> None:
    """Load TorchInductor where it has compiled before: it takes 1.4 s, which nobody waits for now.

    What it keeps on disk it finds by hashing its own files, which takes a part of that. Whatever
    keeps it from being loaded is told when something is to be compiled.
    """
    with suppress(Exception):
        if _marks().exists():
            _load_compiler()
            CacheBase.get_system()


def _load_compiler() -> None:
    # It warns wherever there is a CUDA toolkit and no GPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    importlib.import_module("torch._inductor.compile_fx")


def record(
    function: Function, spec: pytree.TreeSpec, arguments: Leaves
) -> tuple[GraphModule, Leaves]:
    """Return the operations that ``function`` calls, and stand-ins for its arguments.

    The last arguments beyond ``spec`` are given as they are. Nothing is computed, and no argument
    is kept: the stand-ins have shapes alone. Raises whatever keeps torch from recording.
    """
    # TorchInductor keeps nothing on disk of what has no environment of shapes.
    mode = FakeTensorMode(
        allow_non_fake_inputs=True,
        shape_env=ShapeEnv(),
        static_shapes=True,
    )
    examples = [mode.from_tensor(argument) for argument in arguments]

    def flat(*leaves: Tensor) -> tuple[Tensor]:
        fixed = pytree.tree_unflatten(leaves[: spec.num_leaves], spec)
        return (function(*fixed, *leaves[spec.num_leaves :]),)

    return make_fx(flat)(*examples), examples


def is_marked(recording: GraphModule, examples: Leaves, threads: int) -> bool:
    """Say whether this recording has been compiled before, as far as can be seen.

    A file says so where TorchInductor keeps what it has compiled. Should that have gone, or not fit
    this machine, compiling takes its time again.
    """
    with suppress(OSError):
        return _mark_of(recording, examples, threads).exists()
    return False


def mark(recording: GraphModule, examples: Leaves, threads: int) -> None:
    """Note that this recording has been compiled, if there is room for a note."""
    with suppress(OSError):
        file = _mark_of(recording, examples, threads)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


def _mark_of(recording: GraphModule, examples: Leaves, threads: int) -> Path:
    shapes = [(one.shape, one.stride(), one.dtype, one.device.type) for one in examples]
    said = repr((torch.__version__, threads, shapes, str(recording.graph)))
    return _marks() / hashlib.sha256(said.encode()).hexdigest()


def _marks() -> Path:
    return Path(cache_dir()) / "recordings"


def compile_recording(recording: GraphModule, examples: Leaves, threads: int) -> Form:
    """Return a recording as TorchInductor compiles it, for so many intra-op threads on a CPU.

    There it is wrapped in C++, so that a call holds no interpreter lock. Waits for what is being
    compiled elsewhere in this process. Raises if there is no compiler, or whatever else
    TorchInductor raises.
    """
    with _COMPILER:
        form = _compile_for_device(recording, examples, threads)
    mark(recording, examples, threads)
    return form


_COMPILER = threading.Lock()
"""TorchInductor compiles one thing at a time; an engine that is closed may still be at its last."""


@contextmanager
def nothing_compiles() -> Iterator[None]:
    """Hold compiling off, after what is being compiled now.

    When TorchInductor is done it puts torch's one generator of random numbers back to where it was
    as it began, whoever has seeded it meanwhile.
    """
    with _COMPILER:
        yield


def _compile_for_device(recording: GraphModule, examples: Leaves, threads: int) -> Form:
    _load_compiler()
    if examples[0].device.type == "cuda":
        with torch.cuda.device(examples[0].device):  # a thread's current one is the first
            return _compile(recording, examples, _FOR_CUDA | {"compile_threads": threads})
    options: dict[str, Any] = {"compile_threads": 1, "cpp_wrapper": True, "cpp.threads": threads}
    for more in (_VECTORS_KNOWN, _VECTORS_KNOWN | _LOOPS_APART):
        # Whatever keeps it from compiling so, there is another way to try.
        with suppress(Exception):
            return _compile(recording, examples, options | more)
    return _compile(recording, examples, options)


_FOR_CUDA = {"shape_padding": False}
"""What padding would gain is measured on the device, which computes something else meanwhile: the
figures would say nothing, and to wait for the device may spoil a capture.

Several threads compile there: they are processes of TorchInductor's own, each kernel takes one a
second or two, and in this process that would keep the interpreter from the steps.
"""

_VECTORS_KNOWN = {"cpp.vec_isa_ok": True}
"""To try out first whether the compiler knows this CPU's vector instructions takes 6 s."""

_LOOPS_APART = {"cpp.max_horizontal_fusion_size": 1}
"""Without it TorchInductor 2.15 trips over steps with max-norm (a ``KeyError`` of its own)."""


def _compile(recording: GraphModule, examples: Leaves, options: dict[str, Any]) -> Form:
    mode = detect_fake_mode(examples)
    assert mode is not None  # see ``record``
    module, constants, stand_ins = _constants_apart(recording, mode)
    inputs: list[Any] = [*stand_ins, *examples]
    with torch.no_grad():
        if not options.get("cpp_wrapper"):
            form: Form = torch._inductor.compile(module, inputs, options=options)
            return partial(form, *constants)
        return compile_repeatable(module, constants, inputs, options)


def _constants_apart(
    recording: GraphModule, mode: FakeTensorMode
) -> tuple[GraphModule, Leaves, Leaves]:
    """Return a recording that is given what it holds, such as class weights, as first arguments.

    And those, and stand-ins for them. While TorchInductor looks at a module, it puts its own in the
    place of what that holds, and the recording runs on meanwhile.
    """
    graph, constants, stand_ins = deepcopy(recording.graph), list[Tensor](), list[Tensor]()
    first = next(iter(graph.nodes))
    for node in graph.find_nodes(op="get_attr"):
        held = getattr(recording, node.target)
        if not isinstance(held, Tensor):  # a branch
            continue
        with graph.inserting_before(first):
            given = graph.placeholder(f"constant_{len(constants)}")
        constants.append(held)
        stand_ins.append(mode.from_tensor(held))
        given.meta["val"] = stand_ins[-1]
        node.replace_all_uses_with(given)
        graph.erase_node(node)
    return GraphModule(recording, graph), constants, stand_ins


def fastest(call: Call, device: torch.device) -> float:
    """Return the seconds of the fastest of a few calls."""
    return min(_seconds(call, device) for _ in range(TRIES))


def compared(one: Call, other: Call, device: torch.device) -> tuple[float, float]:
    """Return the same for two that take turns, so that what intrudes meets both."""
    turns = [(_seconds(one, device), _seconds(other, device)) for _ in range(TRIES)]
    return min(a for a, _ in turns), min(b for _, b in turns)


def _seconds(call: Call, device: torch.device) -> float:
    synchronize(device)
    started = perf_counter()
    call()
    synchronize(device)
    return perf_counter() - started


def first_line(error: Exception) -> str:
    """Return the first line of what an error says, after its kind."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]
