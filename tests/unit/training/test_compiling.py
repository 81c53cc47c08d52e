"""Functions that get faster while they are in use, and never anything else than faster."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import structlog
import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from tests.unit.training.conftest import losses, train, trial
from worker.training import compiling
from worker.training.compiling import Program, Programs, compile_recording
from worker.training.engine import Engine

OTHERS = {"max_norm": 0.8, "max_gradient_norm": 0.3, "input_dropout": 0.2, "mixup": 0.5}


@pytest.fixture(autouse=True)
def eager_to_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "CALLS_BEFORE_RECORDING", 2)


@pytest.fixture(autouse=True)
def nothing_compiled_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compiling, "cache_dir", lambda: str(tmp_path))


@pytest.fixture
def lines() -> list:
    with structlog.testing.capture_logs() as captured:
        yield captured


def told(lines: list) -> list:
    """What everybody sees in the log."""
    return [line for line in lines if line["log_level"] != "debug"]


class Counted:
    """Adds in place and counts how often Python came by."""

    def __init__(self) -> None:
        self.visits = 0

    def __call__(self, state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        self.visits += 1
        state["sum"].add_(x.sum())
        return x * 2


def test_after_some_calls_the_recording_runs_instead():
    function, state = Counted(), {"sum": torch.zeros(())}
    double = Program("double", 1, 1).bind([function], state)
    for call in range(1, 7):
        assert double(torch.full((3,), float(call))).tolist() == [2.0 * call] * 3
        assert state["sum"] == 3 * sum(range(call + 1))
    assert function.visits == 4  # three calls, of which the last one recorded, too


def test_a_recording_serves_whatever_is_bound_to_its_program():
    program, functions = Program("double", 1, 1), (Counted(), Counted())
    for function in functions:
        state = {"sum": torch.zeros(())}
        bound = program.bind([function], state)
        for _ in range(4):
            bound(torch.ones(2))
        assert state["sum"] == 8
    assert functions[1].visits == 0


def test_of_two_ways_to_do_the_same_the_faster_one_runs():
    def long_way(x: torch.Tensor) -> torch.Tensor:
        for _ in range(200):
            x = x + 1
        return x - 199

    def short_way(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    for ways in ([long_way, short_way], [short_way, long_way]):
        program = Program("ways", 1, 1)
        bound = program.bind(ways)
        for _ in range(4):
            assert bound(torch.zeros(3)).tolist() == [1, 1, 1]
        assert program.recording is not None
        assert len(program.recording.graph.nodes) < 10


def test_the_faster_way_is_not_looked_for_again_with_fewer_lanes(monkeypatch: pytest.MonkeyPatch):
    programs, tried = Programs(compiles=False), []

    def way(number: int, rounds: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def one(x: torch.Tensor) -> torch.Tensor:
            for _ in range(rounds):
                x = x @ x
            return x

        one.number = number
        return one

    recorded_as_usual = compiling.record

    def noting(function: Callable, *others: object) -> object:
        tried.append(function.number)
        return recorded_as_usual(function, *others)

    monkeypatch.setattr(compiling, "record", noting)
    ways = [way(0, 30), way(1, 1)]

    def found(name: str, lanes: int, threads: int, shape: str) -> list[int]:
        tried.clear()
        program = programs.find(name, lanes, threads, shape)
        bound = program.bind(ways)
        for _ in range(4):
            bound(torch.eye(200))
        assert program.way == 1
        return list(tried)

    assert found("step", 3, 1, "usual") == [0, 1]
    assert found("step", 2, 1, "usual") == found("step", 3, 1, "larger") == [1]
    assert found("step", 4, 1, "usual") == [0, 1], "more may do it otherwise"
    assert found("step", 3, 2, "usual") == [0, 1], "so may other threads"
    assert found("measure", 3, 1, "usual") == [0, 1]
    assert found("step", 1, 1, "usual") == [0, 1], "one alone is no batch"
    assert found("step", 1, 1, "larger") == [1]


def test_what_is_slow_is_recorded_after_fewer_calls(monkeypatch):
    monkeypatch.setattr(compiling, "CALLS_BEFORE_RECORDING", 1000)
    monkeypatch.setattr(compiling, "SECONDS_BEFORE_RECORDING", 0.0)
    assert recorded(busy).recording is not None


def test_what_takes_long_to_record_is_recorded_once_it_has_run_or_will_run_for_as_long(monkeypatch):
    monkeypatch.setattr(compiling, "CALLS_BEFORE_RECORDING", 1000)
    now = 0.0
    monkeypatch.setattr(compiling, "perf_counter", lambda: now)
    long, certain = (Program("busy", 1, 1, recording_seconds=60.0) for _ in range(2))
    bound, bound_certain = long.bind([busy]), certain.bind([busy])
    bound(torch.ones(4))
    now = compiling.SECONDS_BEFORE_RECORDING + 1
    bound(torch.ones(4))
    assert long.recording is None
    now = 61.0
    bound(torch.ones(4))
    assert long.recording is not None
    certain._first_called, certain.certain = now, 59.0
    bound_certain(torch.ones(4))
    assert certain.recording is None
    certain.certain = 60.0
    bound_certain(torch.ones(4))
    assert certain.recording is not None


def test_what_cannot_be_recorded_runs_as_before_and_says_so_once(lines):
    def branching(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.sum().item() > 0 else x - 1

    bound = Program("branching", 1, 1).bind([branching])
    for _ in range(5):
        assert bound(torch.ones(2)).tolist() == [2, 2]
    assert bound(-torch.ones(2)).tolist() == [-2, -2]
    assert [line["event"] for line in told(lines)] == ["not_recorded"]


def test_programs_are_told_apart_by_name_lanes_threads_and_shapes():
    programs = Programs(compiles=False)
    first = programs.find("step", 4, 1, (64,))
    assert programs.find("step", 4, 1, (64,)) is first
    others = [("measure", 4, 1, (64,)), ("step", 3, 1, (64,)), ("step", 4, 2, (64,))]
    others.append(("step", 4, 1, (4, 64)))
    assert first not in [programs.find(*other) for other in others]


def busy(x: torch.Tensor) -> torch.Tensor:
    """Something that is faster in one pass over its input than in many."""
    for _ in range(20):
        x = torch.relu(x * 1.01 + 0.1)
    return x


def recorded(function: Callable[[torch.Tensor], torch.Tensor]) -> Program:
    program = Program("busy", 1, 1)
    bound = program.bind([function])
    for _ in range(4):
        bound(torch.ones(10))
    assert program.recording is not None
    return program


def challenged(program: Program, challenger: Callable) -> torch.Tensor:
    program.challenger = challenger
    return program.bind([busy])(torch.ones(10))


def test_a_program_that_runs_for_long_is_compiled_in_the_background(monkeypatch, lines):
    monkeypatch.setattr(compiling, "SECONDS_BEFORE_COMPILING", 2.0)
    programs = Programs(compiles=True)
    program = programs.find("busy", 1, 1)
    bound = program.bind([busy])
    x = torch.linspace(-1, 1, 200_000)
    expected = busy(x)
    for seconds in (1.0, 0.5):
        for _ in range(4):
            bound(x)
        programs.epoch_ended(seconds)
        assert not program.queued
    bound(x)
    programs.epoch_ended(0.6)
    assert program.queued

    programs.settle()
    assert program.challenger is not None
    torch.testing.assert_close(bound(x), expected)
    assert [line["event"] for line in told(lines)] == ["compiled"]
    torch.testing.assert_close(bound(x), expected)
    programs.close()


WITHOUT_A_COMPILER = """
import torch
from tests.unit.training.test_compiling import busy
from tests.waiting import wait_until
from worker.training import compiling

compiling.CALLS_BEFORE_RECORDING, compiling.SECONDS_BEFORE_COMPILING = 2, 0.0
programs = compiling.Programs(compiles=True)
x, bound = torch.ones(9), [programs.find(name, 1, 1).bind([busy]) for name in ("one", "two")]
for call in bound * 4:
    call(x)
programs.epoch_ended(1.0)
wait_until(lambda: not programs._thread.is_alive(), 60)
programs.epoch_ended(1.0)
assert torch.equal(bound[0](x), busy(x)) and torch.equal(bound[1](x), busy(x))
"""


def test_what_is_expected_to_run_for_long_is_recorded_at_once_and_compiled(monkeypatch):
    programs = Programs(compiles=True)
    monkeypatch.setattr(programs, "_submit", lambda program: None)
    rehearsed, other = (programs.find("busy", lanes, 1) for lanes in (4, 2))
    for program in (rehearsed, other):
        bound = program.bind([busy])
        for _ in range(compiling.CALLS_BEFORE_RECORDING + 1):
            bound(torch.ones(10))
    assert not programs.expect("busy", {4, 1}, compiling.SECONDS_BEFORE_COMPILING - 1)
    programs.compile_what_pays()
    assert not rehearsed.queued
    assert programs.expect("busy", {4, 1}, compiling.SECONDS_BEFORE_COMPILING)
    single, idle = programs.find("busy", 1, 1), programs.find("idle", 4, 1)
    for program in (single, idle):
        program.bind([busy])(torch.ones(10))
    programs.compile_what_pays()
    assert [p.queued for p in (rehearsed, single, other, idle)] == [True, True, False, False]
    assert idle.recording is None
    assert rehearsed.seconds == 0


@pytest.mark.parametrize(("lanes", "first", "later"), [(5, {3, 2}, {1}), (2, {1}, set())])
def test_an_engine_that_expects_a_long_study_compiles_first_what_is_needed_first(
    make_engine, monkeypatch, lanes, first, later
):
    engine = make_engine(threads=2)
    submitted = []
    monkeypatch.setattr(engine._epochs.programs, "_compiles", True)
    monkeypatch.setattr(engine._epochs.programs, "_submit", submitted.append)
    engine.max_lanes = lanes
    engine.expect(1000, 1.0)
    assert {(program.name, program.lanes) for program in submitted} == {
        ("step", size) for size in first
    }
    submitted.clear()
    engine.join([trial(0)])
    engine.train_epoch()
    assert {program.lanes for program in submitted if program.name == "step"} == later


def test_a_study_that_is_shorter_than_recording_its_step_does_not_wait_for_that(
    make_engine, monkeypatch
):
    monkeypatch.setattr(compiling, "CALLS_BEFORE_RECORDING", 1000)
    engine = make_engine()
    programs = engine._epochs.programs
    monkeypatch.setattr(programs, "_compiles", True)
    monkeypatch.setattr(programs, "_submit", lambda program: None)
    assert 0 < programs.recording_seconds < 60  # as counted when the engine was built
    programs.recording_seconds = 100.0
    engine.expect(99, 1.0)
    assert [program for program in programs if program.recording] == []
    engine.join([trial(0)])
    engine.train_epoch()
    assert [program for program in programs if program.recording] == []
    engine.expect(100, 1.0)
    assert [program.name for program in programs if program.recording] == ["step"]


KEPT_ON_DISK = """
import sys
import torch
from torch._dynamo.utils import counters
from tests.unit.training.test_compiling import busy
from torch.utils import _pytree as pytree
from worker.training import compiling

compiling.load_compiler_if_used()
print("torch._inductor.compile_fx" in sys.modules)
x = torch.ones(9)
recording, examples = compiling.record(busy, pytree.tree_flatten(())[1], [x])
form = compiling.compile_recording(recording, examples, 1)
assert torch.equal(form(x)[0], busy(x))
print(counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"])
"""


@pytest.mark.slow
def test_what_was_compiled_once_is_found_by_the_next_process_that_loads_the_compiler_at_once(
    tmp_path,
):
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    said = [
        subprocess.run(
            [sys.executable, "-c", KEPT_ON_DISK],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for _ in range(2)
    ]
    assert said == [["False", "0", "1"], ["True", "1", "0"]]


def test_what_was_compiled_once_is_compiled_again_after_less_time():
    queued = []
    for seconds in (4.0, 6.0, 1.5, 0.5):
        programs = Programs(compiles=True)
        program = programs.find("busy", 1, 1)
        bound = program.bind([busy])
        for _ in range(4):
            bound(torch.ones(10))
        programs.epoch_ended(seconds)
        queued.append(program.queued)
        programs.end()
    assert queued == [False, True, True, False]


def test_where_no_note_can_be_made_of_it_things_are_recorded_and_compiled_as_before(
    monkeypatch, tmp_path, lines
):
    file = tmp_path / "no folder"
    file.touch()
    monkeypatch.setattr(compiling, "cache_dir", lambda: str(file))
    compiling.load_compiler_if_used()
    programs = Programs(compiles=True)
    program = programs.find("busy", 1, 1)
    bound = program.bind([busy])
    for _ in range(4):
        bound(torch.ones(10))
    programs.epoch_ended(compiling.SECONDS_BEFORE_COMPILING)
    programs.settle()
    assert program.challenger is not None
    assert told(lines) == []
    programs.end()


def test_an_epochs_time_is_shared_out_by_what_calls_have_taken(monkeypatch):
    """Not by their number: those of a validation take longer than steps, and are fewer."""
    programs = Programs(compiles=False)
    clock = [0.0]
    monkeypatch.setattr(compiling, "perf_counter", lambda: clock[0])

    def taking(seconds: float) -> Callable[[torch.Tensor], torch.Tensor]:
        def function(x: torch.Tensor) -> torch.Tensor:
            clock[0] += seconds
            return x

        return function

    rare, often = (programs.find(name, 1, 1) for name in ("rare", "often"))
    for program, seconds in ((rare, 3.0), (often, 1.0), (often, 2.0)):
        program.bind([taking(seconds)])(torch.ones(10))
    programs.epoch_ended(12.0)
    assert (rare.seconds, often.seconds) == (6.0, 6.0)


ENDS_WHILE_COMPILING = """
import torch
from tests.unit.training.test_compiling import busy
from tests.waiting import wait_until
from worker.training import compiling

compiling.CALLS_BEFORE_RECORDING, compiling.SECONDS_BEFORE_COMPILING = 0, 0.0
programs = compiling.Programs(compiles=True)
programs.find("busy", 1, 1).bind([busy])(torch.ones(9))
programs.epoch_ended(1.0)
wait_until(lambda: programs._queue.empty(), 60)
print("compiling")
"""


@pytest.mark.slow
def test_a_program_that_ends_lets_the_compiler_end_first(tmp_path):
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", ENDS_WHILE_COMPILING],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "compiling\n" in done.stdout
    assert list(tmp_path.rglob("*.so"))


def test_the_folder_of_compiled_programs_is_ours_unless_the_environment_names_one(
    monkeypatch, tmp_path
):
    monkeypatch.setenv(compiling._CACHE_VARIABLE, default_cache_dir())
    compiling.keep_compiled_in(tmp_path)
    assert os.environ[compiling._CACHE_VARIABLE] == str(tmp_path)
    monkeypatch.setenv(compiling._CACHE_VARIABLE, "/elsewhere")
    compiling.keep_compiled_in(tmp_path)
    assert os.environ[compiling._CACHE_VARIABLE] == "/elsewhere"


def test_waiting_for_the_compiler_has_a_limit(monkeypatch):
    programs, started, go_on = Programs(compiles=True), threading.Event(), threading.Event()

    def compile_slowly(*_: object) -> Callable[..., object]:
        started.set()
        go_on.wait()
        return lambda x: (busy(x),)

    monkeypatch.setattr(compiling, "compile_recording", compile_slowly)
    programs.expect("busy", {1}, compiling.SECONDS_BEFORE_COMPILING)
    programs.find("busy", 1, 1).bind([busy])(torch.ones(10))
    programs.compile_what_pays()
    started.wait()
    assert not programs.settle(0.01)
    go_on.set()
    assert programs.settle()


def test_what_is_compiled_for_some_threads_is_compiled_for_all_that_were_tried(monkeypatch):
    """Else a recording on the best number of threads would lose against what has been compiled."""
    programs = Programs(compiles=True)
    monkeypatch.setattr(programs, "_submit", lambda program: None)
    tried, used, other = (
        programs.find("busy", lanes, threads) for lanes, threads in ((1, 1), (1, 2), (2, 1))
    )
    for program in (tried, used, other):
        bound = program.bind([busy])
        for _ in range(compiling.CALLS_BEFORE_RECORDING + 1):
            bound(torch.ones(10))
    programs.epoch_ended(0.0)
    used.bind([busy])(torch.ones(10))
    programs.epoch_ended(compiling.SECONDS_BEFORE_COMPILING)
    assert (tried.queued, used.queued, other.queued) == (True, True, False)


def test_what_will_certainly_run_for_long_is_compiled_at_once(monkeypatch):
    programs = Programs(compiles=True)
    monkeypatch.setattr(programs, "_submit", lambda program: None)
    program = programs.find("busy", 1, 1)
    bound = program.bind([busy])
    for _ in range(4):
        bound(torch.ones(10))
    programs.epoch_ended(compiling.SECONDS_BEFORE_COMPILING / 10, epochs_to_come=8)
    assert not program.queued
    bound(torch.ones(10))
    programs.epoch_ended(compiling.SECONDS_BEFORE_COMPILING / 10, epochs_to_come=8)
    assert program.queued


@pytest.mark.slow
def test_where_there_is_no_compiler_that_is_said_once_and_recordings_go_on(tmp_path):
    environment = {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_A_COMPILER],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("not_compiled") == 1
    assert "compiler" in done.stdout


def test_a_program_that_does_not_compile_keeps_no_other_from_it(monkeypatch, lines):
    programs, compiled = Programs(compiles=True), []

    def compile_some(recording: object, examples: tuple, threads: int) -> Callable[..., object]:
        if threads == 1:
            raise RuntimeError("nothing for this one")
        compiled.append(threads)
        return lambda x: (busy(x),)

    monkeypatch.setattr(compiling, "compile_recording", compile_some)
    programs.expect("busy", {1, 2, 3, 4}, compiling.SECONDS_BEFORE_COMPILING)
    for lanes, threads in ((1, 1), (2, 2), (3, 1), (4, 2)):
        programs.find("busy", lanes, threads).bind([busy])(torch.ones(10))
        programs.compile_what_pays()
        programs.settle()
    assert compiled == [2, 2]
    assert [line["event"] for line in told(lines)] == ["not_compiled"]


def test_a_compiled_form_that_computes_something_else_is_not_used(lines):
    program = recorded(busy)
    for wrong in (lambda x: (busy(x) * 1.01,), lambda x: (busy(x.fill_(2)),)):
        torch.testing.assert_close(challenged(program, wrong), busy(torch.ones(10)))
        torch.testing.assert_close(program.bind([busy])(torch.ones(10)), busy(torch.ones(10)))
    assert [line["event"] for line in told(lines)] == ["compiled_in_vain"] * 2


@pytest.mark.parametrize(("by_mistake", "event"), [(0.0, "compiled"), (2.0, "compiled_in_vain")])
def test_what_rounding_alone_makes_of_a_step_is_no_difference(lines, by_mistake, event):
    """As in Adam's first step: it is as long for a gradient that is nothing but rounding."""
    half = torch.randn(32, 1000, generator=torch.Generator().manual_seed(1))
    rows, weights = torch.cat([half, -half]), torch.ones(1, 1000)
    known = busy(rows)

    def step(weights: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        weights.sub_(0.1 * rows.sum(0).sign())
        return busy(rows)

    def in_another_order(weights: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor]:
        weights.sub_(0.1 * rows.flip(0).cumsum(0)[-1].sign() + by_mistake)
        return (known,)

    program = Program("step", 1, 1)
    bound = program.bind([step], weights)
    for _ in range(4):
        bound(rows)
    program.challenger = in_another_order
    bound(rows)
    (line,) = told(lines)
    assert line["event"] == event
    assert line["difference"] > compiling.TOLERANCE


def test_a_compiled_form_that_is_slower_is_not_used(lines):
    program = recorded(busy)
    calls = []

    def slow(x: torch.Tensor) -> tuple[torch.Tensor]:
        calls.append(1)
        time.sleep(0.01)
        return (busy(x),)

    challenged(program, slow)
    before = len(calls)
    program.bind([busy])(torch.ones(10))
    assert len(calls) == before
    assert told(lines)[-1]["event"] == "compiled_in_vain"


def test_a_compiled_form_that_was_slow_by_accident_is_tried_again(lines):
    programs = Programs(compiles=True)
    program = programs.find("busy", 1, 1)
    bound = program.bind([busy])
    x = torch.ones(100_000)
    known = busy(x)
    for _ in range(4):
        bound(x)
    calls = []

    def held_up_at_first(x: torch.Tensor) -> tuple[torch.Tensor]:
        calls.append(1)
        if len(calls) <= 1 + compiling.TRIES:
            time.sleep(0.1)
        return (known,)

    program.challenger = held_up_at_first
    bound(x)
    assert programs.epoch_ended(0.1)
    bound(x)

    assert [line["event"] for line in told(lines)] == ["compiled_in_vain", "compiled"]
    before = len(calls)
    torch.testing.assert_close(bound(x), known)
    assert len(calls) == before + 1
    assert not programs.epoch_ended(0.1)
    programs.close()


def test_a_compiled_form_that_stays_slower_is_not_tried_for_ever(lines):
    programs = Programs(compiles=True)
    program = programs.find("busy", 1, 1)
    bound = program.bind([busy])
    for _ in range(4):
        bound(torch.ones(10))

    def slow(x: torch.Tensor) -> tuple[torch.Tensor]:
        time.sleep(0.01)
        return (busy(x),)

    program.challenger = slow
    for _ in range(compiling.REMATCHES + 3):
        bound(torch.ones(10))
        programs.epoch_ended(0.1)
    times = 1 + compiling.REMATCHES
    assert [line["event"] for line in told(lines)] == ["compiled_in_vain"] * times
    programs.close()


class Graph:
    """Stands in for a CUDA graph: calls a form on the same arguments, and takes its own time."""

    def __init__(self, seconds: float, form: Callable, fixed: Sequence[torch.Tensor]) -> None:
        self.call = lambda *varying: form(*fixed, *varying)[0]
        self.seconds = seconds

    def __call__(self, *varying: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        return self.call(*varying)


@pytest.mark.parametrize("faster", ["recorded", "compiled"])
def test_on_a_gpu_forms_are_compared_as_graphs(monkeypatch, lines, faster):
    """Launched one by one, kernels take longer than they do themselves."""
    program = recorded(busy)
    launching = 0.05 if faster == "compiled" else 0.0

    def challenger(x: torch.Tensor) -> tuple[torch.Tensor]:
        time.sleep(launching)
        return (busy(x),)

    def capture(form: Callable, fixed: object, copies: object, varying: object) -> Graph:
        is_faster = (form is challenger) == (faster == "compiled")
        return Graph(0.0 if is_faster else 0.01, lambda *leaves: (busy(*leaves),), fixed)

    monkeypatch.setattr(compiling, "capture", capture)
    program._capturable = True
    program.challenger = challenger
    program._duel([torch.ones(10)])
    (line,) = told(lines)
    assert line["event"] == ("compiled" if faster == "compiled" else "compiled_in_vain")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), ValueError("no")])
def test_what_cannot_be_captured_is_tried_once_more_and_compared_as_it_is(
    monkeypatch, lines, error
):
    tries = []

    def capture(*arguments: object) -> Graph:
        tries.append(1)
        raise error

    monkeypatch.setattr(compiling, "capture", capture)
    monkeypatch.setattr(compiling, "CALLS_BEFORE_CAPTURING", 3)
    program = recorded(busy)
    x = torch.ones(10)
    bound = program.bind([busy])
    program._capturable = True  # as if its arguments were on a GPU
    assert not program.settled
    for _ in range(20):
        torch.testing.assert_close(bound(x), busy(x))
    assert len(tries) == compiling.MOST_IN_VAIN
    assert {line["event"] for line in told(lines)} == {"not_captured"}
    assert program.settled


def test_a_compiled_form_that_there_is_no_memory_to_try_is_tried_again(lines):
    def too_large(x: torch.Tensor) -> tuple[torch.Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    program = recorded(busy)
    challenged(program, too_large)
    assert program.demand_rematch()


def test_a_compiled_form_that_raises_is_not_used(lines):
    def broken(x: torch.Tensor) -> tuple[torch.Tensor]:
        raise RuntimeError("not for these strides")

    program = recorded(busy)
    for _ in range(2):
        torch.testing.assert_close(challenged(program, broken), busy(torch.ones(10)))
    assert {line["reason"] for line in told(lines)} == {"RuntimeError: not for these strides"}


def test_two_forms_are_compared_on_arguments_that_lie_in_memory_as_the_real_ones():
    column = torch.arange(12.0).view(4, 3)[:, :2]
    seen = []

    def form(x: torch.Tensor) -> tuple[torch.Tensor]:
        seen.append(x.stride())
        return (x.add_(1),)

    program = Program("form", 1, 1)
    bound = program.bind([form])
    for _ in range(4):
        bound(column)
    seen.clear()
    before = column.clone()
    program.challenger = form
    bound(column)
    assert set(seen) == {(3, 1)}
    assert torch.equal(column, before + 1)


def test_what_no_call_changes_is_not_copied_to_compare_two_forms():
    data = torch.arange(4.0)
    programs = Programs(compiles=False, constants=[data])
    program = programs.find("form", 1, 1)
    seen = []

    def form(data: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor]:
        seen.append(data.data_ptr())
        return (x.add_(data.sum()),)

    bound = program.bind([lambda data, x: form(data, x)[0]], data)
    x = torch.zeros(1)
    for _ in range(4):
        bound(x)
    seen.clear()
    program.challenger = form
    bound(x)
    assert set(seen) == {data.data_ptr()}
    assert x.item() == 5 * 6


def test_threads_may_record_different_programs_at_once(lines):
    """``make_fx`` itself stands no company."""
    programs = Programs(compiles=False)
    calls = [programs.find(name, 1, 1).bind([busy]) for name in "abcdef"]
    start = threading.Barrier(len(calls))

    def use(call: Callable[[torch.Tensor], torch.Tensor]) -> None:
        start.wait()
        for _ in range(5):
            call(torch.ones(10))

    with ThreadPoolExecutor(len(calls)) as pool:
        list(pool.map(use, calls))
    assert all(program.recording for program in programs)
    assert told(lines) == []


def test_a_short_study_never_compiles():
    programs = Programs(compiles=True)
    program = programs.find("busy", 1, 1)
    bound = program.bind([busy])
    for _ in range(10):
        bound(torch.ones(10))
    programs.epoch_ended(compiling.SECONDS_BEFORE_COMPILING / 2)
    assert not program.queued


def compiled(engine: Engine) -> None:
    """Compile, right now, every program that the engine has used."""
    for program in engine.programs:
        assert program.recording is not None
        program._form = compile_recording(program.recording, program.examples, program.threads)


@pytest.mark.parametrize(
    ("training", "dtype", "epochs", "tolerance"),
    [
        pytest.param({}, torch.float64, 12, 1e-8, marks=pytest.mark.slow),
        ({}, torch.float32, 1, 1e-5),
        ({"optimizer": "sgd", "l1": "subgradient"}, torch.float64, 12, 1e-8),
        ({"optimizer": "sgd", "l1": "subgradient"}, torch.float32, 1, 1e-5),
    ],
)
def test_a_trial_is_the_same_compiled(make_engine, training, dtype, epochs, tolerance):
    settings = {"dtype": dtype, "batch_size": 20, **training}  # three batches of 20 rows
    strong = trial(0, weight_decay=0.3, dropout=0.4, l1_lambda=0.02, input_noise=0.1, **OTHERS)
    plain, engine = make_engine(**settings), make_engine(**settings)
    plain.join([strong, trial(1)])
    expected = losses(train(plain, epochs)[0])
    engine.join([trial(2), trial(3)])
    train(engine, 3)
    engine.leave([2, 3])
    compiled(engine)
    assert len(list(engine.programs)) == 2  # the step and the measurement
    engine.join([strong, trial(1)])
    curve = losses(train(engine, epochs)[0])
    torch.testing.assert_close(curve, expected, rtol=tolerance, atol=0)


@pytest.mark.slow
def test_a_step_that_the_compiler_trips_over_is_compiled_another_way(make_engine):
    """Once this torch does not raise any more, the other way can go."""
    engine = make_engine(
        settings={"hidden": [16] * 3, "norm": "none"},
        knobs=frozenset({"dropout", "input_dropout", "max_norm"}),
        optimizer="sgd",
        momentum=0.95,
        dtype=torch.float32,
    )
    engine.join([trial(i, dropout=0.3, input_dropout=0.2, max_norm=float(i % 3)) for i in range(4)])
    train(engine, 3)
    step = next(program for program in engine.programs if program.name == "step")
    options = {"cpp_wrapper": True, "cpp.threads": 1, **compiling._VECTORS_KNOWN}
    with pytest.raises(Exception, match="KeyError"):
        compiling._compile(step.recording, step.examples, options)
    compiled(engine)
    train(engine, 1)


def test_a_recording_with_constants_runs_while_it_is_compiled():
    weights, anew = torch.rand(7), time.time()  # so that nothing is found on disk

    def function(state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return x * weights[x.long()] * anew + state["sum"]

    program = Program("weigh", 1, 1)
    weigh = program.bind([function], {"sum": torch.ones(())})
    x = torch.arange(7.0)
    for _ in range(4):
        weigh(x)
    with ThreadPoolExecutor(1) as pool:
        compiling_it = pool.submit(compile_recording, program.recording, program.examples, 1)
        while not compiling_it.done():
            assert torch.equal(weigh(x), x * weights * anew + 1)
    assert torch.allclose(compiling_it.result()(torch.ones(()), x)[0], x * weights * anew + 1)


def test_of_two_engines_one_compiles_at_a_time(monkeypatch):
    """TorchInductor raises otherwise; a worker builds the next engine while the last compiles."""
    compile_one, inside, most = torch._inductor.compile, [], []

    def spy(*arguments, **options):
        inside.append(1)
        most.append(len(inside))
        try:
            return compile_one(*arguments, **options)
        finally:
            inside.pop()

    monkeypatch.setattr(torch._inductor, "compile", spy)
    x = torch.arange(3.0)
    functions = [lambda x, n=n: x * n for n in (2.0, 3.0)]
    _, spec = compiling.pytree.tree_flatten((x,))
    recordings = [compiling.record(function, spec, [x]) for function in functions]
    with ThreadPoolExecutor(2) as pool:
        forms = list(pool.map(lambda made: compile_recording(*made, threads=1), recordings))
    assert [form(x)[0].tolist() for form in forms] == [[0.0, 2.0, 4.0], [0.0, 3.0, 6.0]]
    assert most == [1, 1]
