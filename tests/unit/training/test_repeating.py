"""Compiled programs that are called many times in a row."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import structlog
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from tests.unit.training.conftest import losses, train, trial
from worker.training import compiling, repeating
from worker.training.compiling import compile_recording, record
from worker.training.engine import Engine
from worker.training.memory import is_out_of_memory
from worker.training.repeating import Repeatable, compile_repeatable

PAGE_BYTES = 4096
NOTHING_FIXED = tree_flatten(())[1]
WEIGHTS = torch.tensor([1.0, 2.0])


def compiled(function: Callable[..., Tensor], *arguments: Tensor) -> Any:
    return compile_recording(*record(function, NOTHING_FIXED, list(arguments)), threads=1)


def add_(total: Tensor, x: Tensor) -> Tensor:
    total.add_(x)
    return total.sum(1)


@pytest.fixture(scope="module")
def adding() -> Repeatable:
    form = compiled(add_, torch.zeros(2, 3), torch.ones(2, 3))
    assert isinstance(form, Repeatable)  # torch's wrapper of a program is what it was
    return form


def test_calls_follow_each_other(adding):
    total = torch.zeros(2, 3)
    pending = [[torch.full((2, 3), float(n))] for n in range(1, 5)]
    results = adding.repeat([total], pending)
    assert [result.tolist() for result in results] == [[3.0] * 2, [9.0] * 2, [18.0] * 2, [30.0] * 2]
    assert torch.equal(total, torch.full((2, 3), 10.0))
    assert adding(total, torch.ones(2, 3))[0].tolist() == [33.0, 33.0]


def test_no_call_is_begun_once_the_time_is_over(adding, monkeypatch):
    total, pending = torch.zeros(2, 3), [[torch.ones(2, 3)]] * 5
    monkeypatch.setattr(repeating, "SECONDS_AT_ONCE", 0.0)
    assert [result.tolist() for result in adding.repeat([total], pending)] == [[3.0, 3.0]]
    assert total.max() == 1.0


def test_what_a_call_throws_is_raised_and_what_was_done_before_stays(adding):
    total = torch.zeros(2, 3)
    pending = [[torch.ones(2, 3)], [torch.ones(3, 3)], [torch.ones(2, 3)]]
    with pytest.raises(RuntimeError, match="expected size 3==2"):
        adding.repeat([total], pending)
    assert total.max() == 1.0


def test_lack_of_memory_is_told_from_other_errors():
    """TorchInductor's code says no more than that the call failed."""
    form = compiled(lambda x: (x[:, None] @ x[None]).sum(1), torch.ones(2**24))
    assert isinstance(form, Repeatable)
    with pytest.raises(RuntimeError, match="can't allocate memory") as thrown:
        form(torch.ones(2**24))
    assert is_out_of_memory(thrown.value)


@torch.library.custom_op("regtune_tests::refuse", mutates_args=())
def refuse(x: Tensor) -> Tensor:
    if x.sum() < 0:
        raise ValueError("it is negative")
    return x.clone()


@refuse.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_what_an_operation_in_python_raises_is_told():
    form = compiled(lambda x: refuse(x * 2).sum(1), torch.ones(2, 3))
    assert isinstance(form, Repeatable)
    pending = [[torch.full((2, 3), number)] for number in (1.0, -1.0, 1.0)]
    with pytest.raises(RuntimeError, match="it is negative"):
        form.repeat([], pending)
    assert form(torch.ones(2, 3))[0].tolist() == [6.0, 6.0]


def test_threads_do_not_disturb_each_other(adding):
    def count(number: int) -> Tensor:
        total, pending = torch.zeros(2, 3), [[torch.full((2, 3), float(number))]] * 50
        for _ in range(20):
            assert len(adding.repeat([total], pending)) == 50
        return total

    with ThreadPoolExecutor(4) as pool:
        totals = list(pool.map(count, range(8)))
    assert [total.tolist() for total in totals] == [[[1000.0 * n] * 3] * 2 for n in range(8)]


def test_what_is_handed_over_is_released(adding):
    """A tensor that is kept takes some 500 bytes; tensors of other kinds come back, too."""
    total, wrong = torch.zeros(2, 3), torch.ones(3, 3)
    pending = [[torch.ones(2, 3)]] * 10

    def call() -> None:
        adding.repeat([total], pending)
        with pytest.raises(RuntimeError):
            adding.repeat([total], [*pending, [wrong], *pending])

    def resident() -> int:
        return PAGE_BYTES * int(Path("/proc/self/statm").read_text().split()[1])

    for _ in range(200):
        call()
    before = resident()
    for _ in range(2000):
        call()
    assert resident() - before < 2**21  # 40 000 results


def test_a_program_that_was_compiled_before_is_found_in_the_same_form(adding):
    again = compiled(add_, torch.zeros(2, 3), torch.ones(2, 3))
    assert isinstance(again, Repeatable)
    assert again is not adding


def weighed(x: Tensor) -> Tensor:
    return (x * WEIGHTS).sum(1)


def test_a_program_with_constants_is_given_them():
    form = compiled(weighed, torch.ones(3, 2))
    assert isinstance(form, Repeatable)
    assert form.repeat([], [[torch.ones(3, 2)]])[0].tolist() == [3.0, 3.0, 3.0]
    assert form.wrapper(torch.ones(3, 2))[0].tolist() == [3.0, 3.0, 3.0]


def test_a_program_that_wants_more_than_its_arguments_is_called_by_its_own_wrapper():
    """What a module holds is an input of the compiled graph of which only the wrapper knows."""
    module, examples = record(weighed, NOTHING_FIXED, [torch.ones(3, 2)])
    with structlog.testing.capture_logs() as lines:
        form = compile_repeatable(module, (), examples, {"cpp_wrapper": True})
    assert [line["event"] for line in lines] == ["not_repeated"]
    assert not isinstance(form, Repeatable)
    assert form(torch.ones(3, 2))[0].tolist() == [3.0, 3.0, 3.0]


@pytest.fixture(autouse=True)
def eager_to_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "CALLS_BEFORE_RECORDING", 2)


def compiled_engine(make_engine: Callable[..., Engine]) -> Engine:
    """Return an engine of two trials after three epochs; from the fourth on all is compiled."""
    engine = make_engine(batch_size=20, dtype=torch.float32)  # three batches of 20 rows
    engine.join([trial(0), trial(1)])
    train(engine, 3)
    for program in engine.programs:
        assert program.recording is not None
        program._form = compile_recording(program.recording, program.examples, program.threads)
        assert isinstance(program._form, Repeatable)
    return engine


@pytest.mark.parametrize(("seconds", "returns"), [(0.0, 3), (60.0, 1)])
def test_an_epoch_is_heard_of_as_often_as_its_steps_return(
    make_engine, monkeypatch, seconds, returns
):
    engine, heard = compiled_engine(make_engine), []
    monkeypatch.setattr(repeating, "SECONDS_AT_ONCE", seconds)
    epochs = engine.train_epoch(lambda: heard.append(1))
    assert len(heard) == returns + 1  # and once after the validation's one batch
    assert [epoch.epoch for epoch in epochs] == [4, 4]


@pytest.mark.parametrize("fails", ["whoever listens", "the program"])
def test_lanes_stand_where_they_stood_after_a_loop_that_was_left(make_engine, monkeypatch, fails):
    engine, undisturbed = compiled_engine(make_engine), compiled_engine(make_engine)
    repeat = Repeatable.repeat

    def throw_at_the_second(self: Repeatable, fixed: Any, pending: Any) -> list[Tensor]:
        return repeat(self, fixed, [pending[0], [torch.ones(9, 9) for _ in pending[0]]])

    def interrupt() -> None:
        raise RuntimeError("interrupted")

    by_program = fails == "the program"
    with monkeypatch.context() as patched:
        if by_program:
            patched.setattr(Repeatable, "repeat", throw_at_the_second)
        with pytest.raises(RuntimeError, match="expected ndim" if by_program else "interrupted"):
            engine.train_epoch((lambda: None) if by_program else interrupt)
    assert torch.equal(losses(engine.train_epoch()), losses(undisturbed.train_epoch()))
