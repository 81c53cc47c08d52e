import pytest
import structlog
import torch

from worker.training import recording
from worker.training.recording import Recorder, record


@pytest.fixture(autouse=True)
def eager_to_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "CALLS_BEFORE", 2)


class Counted:
    """Adds in place and counts how often Python came by."""

    def __init__(self) -> None:
        self.visits = 0

    def __call__(self, total: torch.Tensor, state: dict[str, torch.Tensor]) -> torch.Tensor:
        self.visits += 1
        state["sum"].add_(total.sum())
        return total * 2


def test_after_some_calls_with_the_same_shapes_the_recording_runs_instead():
    recorder, function = Recorder(), Counted()
    state = {"sum": torch.zeros(())}
    for call in range(1, 7):
        x = torch.full((3,), float(call))
        assert recorder.call("double", function, x, state).tolist() == [2.0 * call] * 3
        assert state["sum"] == 3 * sum(range(call + 1))
    assert function.visits == 3  # two calls, and the recording


def test_other_shapes_and_other_functions_have_recordings_of_their_own():
    recorder = Recorder()
    for rows in (3, 4):
        for _ in range(4):
            x = torch.ones(rows)
            assert recorder.call("sum", lambda x: x.sum() + len(x), x) == 2 * rows
            assert recorder.call("mean", lambda x: x.mean(), x) == 1


def test_what_cannot_be_recorded_runs_as_before_and_says_so_once():
    def branching(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.sum().item() > 0 else x - 1

    recorder = Recorder()
    with structlog.testing.capture_logs() as lines:
        for _ in range(5):
            assert recorder.call("branching", branching, torch.ones(2)).tolist() == [2, 2]
        assert recorder.call("branching", branching, -torch.ones(2)).tolist() == [-2, -2]
    assert [line["event"] for line in lines] == ["step_not_recorded"]


def test_recording_leaves_the_arguments_as_they_are():
    x = torch.ones(2)
    recorded = record(lambda x: x.add_(1), (x,))
    assert x.tolist() == [1, 1]
    assert recorded(x).tolist() == [2, 2]
    assert x.tolist() == [2, 2]
