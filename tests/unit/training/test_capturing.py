"""What can be known of captured steps without a GPU, and the rest with one."""

import pytest
import torch

from worker.training.capturing import Captured, capture, first_replay

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
    result, agrees = first_replay(taped(state), step, [state], copies, [x], ["state"], TOLERANCE)
    assert agrees
    assert result.item() == 9
    assert state.tolist() == [3, 3, 3]


def test_a_capture_that_computes_something_else_is_noticed_and_undone():
    state, x = torch.ones(3), torch.full((3,), 2.0)
    result, agrees = first_replay(
        taped(state, factor=1.1), step, [state], [state.clone()], [x], ["state"], TOLERANCE
    )
    assert not agrees
    assert result.item() == 9
    assert state.tolist() == [3, 3, 3]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_captures_a_step_and_replays_it_on_the_same_lanes():
    state = torch.zeros(3, device="cuda")
    captured = capture(step, [state], [state.clone()], [torch.ones(3, device="cuda")])
    assert state.tolist() == [0, 0, 0]
    assert captured(torch.ones(3, device="cuda")).item() == 3
    assert captured(torch.full((3,), 2.0, device="cuda")).item() == 9
