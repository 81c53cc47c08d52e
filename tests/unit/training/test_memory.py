"""How much memory a computation takes, of the tensors that it makes."""

import pytest
import torch

from worker.training.epoch import CHEAP_BYTES, MOST_EVALUATION_ROWS
from worker.training.memory import is_out_of_memory, peak_bytes

KILOBYTE = torch.zeros(250)


def test_what_is_alive_at_the_same_time_counts():
    def one_after_the_other() -> None:
        for _ in range(3):
            KILOBYTE + 1

    def side_by_side() -> None:
        kept = [KILOBYTE + 1 for _ in range(3)]
        del kept

    assert peak_bytes(one_after_the_other) == 1000
    assert peak_bytes(side_by_side) == 3000


def test_views_and_what_is_written_in_place_cost_nothing():
    def views() -> None:
        (KILOBYTE + 1).view(10, 25)[3:].mul_(2).t()

    assert peak_bytes(views) == 1000
    assert peak_bytes(lambda: KILOBYTE.mul_(1)) == 0


def test_what_autograd_keeps_for_the_backward_pass_counts():
    def forward(weights: torch.Tensor) -> None:
        x = weights
        for _ in range(10):
            x = x.sin()

    assert peak_bytes(lambda: forward(KILOBYTE)) == 2000
    kept = peak_bytes(lambda: forward(KILOBYTE.clone().requires_grad_()))
    assert kept >= 10_000


def test_an_evaluation_takes_no_more_memory_than_a_training_step(make_engine):
    """One with wide layers and few rows to train on at a time, one where memory is no matter."""
    narrow, wide = (make_engine(settings={"hidden": [width]}) for width in (4, 20_000))
    assert narrow._epochs._evaluation_rows == MOST_EVALUATION_ROWS
    assert wide._epochs._evaluation_rows < MOST_EVALUATION_ROWS
    assert narrow.footprint.step < 2 * CHEAP_BYTES < wide.footprint.step


@pytest.mark.parametrize(
    ("says", "is_lack"),
    [
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", True),
        ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(…)`", False),
    ],
)
def test_a_librarys_lack_of_memory_is_one(says: str, is_lack: bool):
    assert is_out_of_memory(RuntimeError(says)) == is_lack
