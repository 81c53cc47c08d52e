"""What can be known of captured steps without a GPU, and the rest with one."""

import pytest
import torch

from worker.training.capturing import Captured, capture, copy_of, first_replay

TOLERANCE = 1e-3


def step(state: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor]:
    return (state.add_(x).sum(),)


class Tape:
    """Runs the same call on the same tensors, as a graph does."""

    def __init__(self, state: torch.Tensor, x: torch.Tensor, factor: float = 1.0) -> None:
        self.state, self.x, self.factor = state, x, factor
        self.output = torch.zeros(())

    def replay(self) -> None:
        self.output.copy_(step(self.state, self.factor * self.x)[0])


def taped(state: torch.Tensor, factor: float = 1.0) -> Captured:
    tape = Tape(state, torch.zeros(3), factor)
    return Captured(tape, [tape.x], tape.output)


def test_what_changes_is_copied_in_and_the_result_is_copied_out():
    state = torch.zeros(3)
    captured = taped(state)
    first = captured(torch.ones(3))
    second = captured(torch.full((3,), 2.0))
    assert (first.item(), second.item()) == (3, 9)
    assert state.tolist() == [3, 3, 3]


def test_the_first_replay_takes_exactly_one_step():
    state, x = torch.ones(3), torch.full((3,), 2.0)
    copies = [state.clone()]
    (expected,) = step(*copies, x)
    result, agrees = first_replay(
        taped(state), expected, [state], copies, [x], ["state"], TOLERANCE
    )
    assert agrees
    assert result.item() == 9
    assert state.tolist() == [3, 3, 3]


def test_a_capture_that_computes_something_else_is_noticed_and_undone():
    state, x = torch.ones(3), torch.full((3,), 2.0)
    copies = [state.clone()]
    (expected,) = step(*copies, x)
    result, agrees = first_replay(
        taped(state, factor=1.1), expected, [state], copies, [x], ["state"], TOLERANCE
    )
    assert not agrees
    assert result.item() == 9
    assert state.tolist() == [3, 3, 3]


def test_a_capture_that_there_is_no_memory_to_check_is_undone(monkeypatch):
    def too_large(pairs: object) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("worker.training.capturing.largest_difference", too_large)
    state, x = torch.ones(3), torch.full((3,), 2.0)
    copies = [state.clone()]
    (expected,) = step(*copies, x)
    result, agrees = first_replay(
        taped(state, factor=1.1), expected, [state], copies, [x], ["state"], TOLERANCE
    )
    assert (agrees, result.item()) == (False, 9)
    assert state.tolist() == [3, 3, 3]


@pytest.mark.parametrize("form", [torch.channels_last, torch.contiguous_format])
def test_a_copy_lies_in_memory_as_the_original_does(form):
    original = torch.rand(2, 3, 4, 5).to(memory_format=form)[:, 1:]
    copy = copy_of(original)
    assert copy.stride() == original.stride()
    assert torch.equal(copy, original)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_captures_a_step_and_replays_it_on_the_same_lanes():
    state = torch.zeros(3, device="cuda")
    captured = capture(step, [state], [state.clone()], [torch.ones(3, device="cuda")])
    assert state.tolist() == [0, 0, 0]
    assert captured(torch.ones(3, device="cuda")).item() == 3
    assert captured(torch.full((3,), 2.0, device="cuda")).item() == 9
