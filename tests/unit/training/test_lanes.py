from math import inf, nan

import pytest
import torch

from tests.unit.training.conftest import trial
from worker.training.lanes import Lane, LaneTensors


def lane(patience: int = 2) -> Lane:
    return Lane.starting(trial(patience=patience), min_delta=0.0)


@pytest.mark.parametrize(
    ("train_loss", "validation_loss"), [(nan, 1.0), (inf, 1.0), (1.0, nan), (1.0, inf)]
)
def test_a_loss_that_is_not_finite_ends_a_lane_as_diverged(train_loss, validation_loss):
    diverged = lane()
    diverged.observe(train_loss, validation_loss, score=0.5, max_epochs=1)
    assert diverged.ended == "diverged"


def test_a_lane_goes_on_until_patience_or_the_epochs_run_out():
    patient, impatient = lane(patience=9), lane(patience=2)
    for loss in (1.0, 2.0, 3.0):
        assert patient.ended is impatient.ended is None
        patient.observe(1.0, loss, score=loss, max_epochs=3)
        impatient.observe(1.0, loss, score=loss, max_epochs=4)
    assert (patient.ended, impatient.ended) == ("finished", "early_stopped")
    assert patient.best_score == impatient.best_score == 1.0


def test_best_copies_are_copies_of_the_lanes_that_improved():
    tensors = LaneTensors.starting(torch.zeros(3), {"mean": torch.zeros(2)}, moments=1, lanes=2)
    tensors.parameters_KP.fill_(1)
    tensors.buffers["mean"].fill_(2)
    tensors.keep_best_(torch.tensor([True, False]))
    tensors.parameters_KP.fill_(7)
    tensors.buffers["mean"].fill_(7)
    assert tensors.best_parameters_KP.tolist() == [[1, 1, 1], [0, 0, 0]]
    assert tensors.best_buffers["mean"].tolist() == [[2, 2], [0, 0]]


def test_selected_lanes_keep_all_that_is_theirs_in_the_order_asked_for():
    one = LaneTensors.starting(torch.tensor([1.0]), {"mean": torch.tensor(1.0)}, 2, lanes=1)
    two = LaneTensors.starting(torch.tensor([2.0]), {"mean": torch.tensor(2.0)}, 2, lanes=1)
    two.moments[1].fill_(5)
    swapped = one.join(two).select([1, 0])
    assert swapped.parameters_KP.tolist() == swapped.best_parameters_KP.tolist() == [[2.0], [1.0]]
    assert swapped.buffers["mean"].tolist() == swapped.best_buffers["mean"].tolist() == [2.0, 1.0]
    assert [moment.tolist() for moment in swapped.moments] == [[[0], [0]], [[5], [0]]]
