from math import inf, isnan, nan

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
    diverged.observe(train_loss, [validation_loss], score=0.5, max_epochs=1)
    assert diverged.ended == "diverged"


def test_a_lane_goes_on_until_patience_or_the_epochs_run_out():
    patient, impatient = lane(patience=9), lane(patience=2)
    for loss in (1.0, 2.0, 3.0):
        assert patient.ended is impatient.ended is None
        patient.observe(1.0, [loss], score=loss, max_epochs=3)
        impatient.observe(1.0, [loss], score=loss, max_epochs=4)
    assert (patient.ended, impatient.ended) == ("finished", "early_stopped")
    assert patient.best_score == impatient.best_score == 1.0


def test_best_copies_are_copies_of_the_lanes_that_improved():
    tensors = LaneTensors.starting(
        {"w": torch.zeros(1, 3)}, {"mean": torch.zeros(1, 2)}, moments=1, trials=2
    )
    tensors.parameters["w"].fill_(1)
    tensors.buffers["mean"].fill_(2)
    tensors.keep_best_(torch.tensor([True, False]))
    tensors.parameters["w"].fill_(7)
    tensors.buffers["mean"].fill_(7)
    assert tensors.best_parameters["w"].tolist() == [[1, 1, 1], [0, 0, 0]]
    assert tensors.best_buffers["mean"].tolist() == [[2, 2], [0, 0]]


def test_selected_lanes_keep_all_that_is_theirs_in_the_order_asked_for():
    one, two = (
        LaneTensors.starting(
            {"w": torch.tensor([[number]])}, {"mean": torch.tensor([number])}, 2, trials=1
        )
        for number in (1.0, 2.0)
    )
    two.moments[1]["w"].fill_(5)
    swapped = one.join(two).select([1, 0])
    for weights in (swapped.parameters, swapped.best_parameters):
        assert weights["w"].tolist() == [[2.0], [1.0]]
    assert swapped.buffers["mean"].tolist() == swapped.best_buffers["mean"].tolist() == [2.0, 1.0]
    assert [moment["w"].tolist() for moment in swapped.moments] == [[[0], [0]], [[5], [0]]]


def test_a_view_of_lanes_is_no_copy():
    tensors = LaneTensors.starting({"w": torch.zeros(1, 2)}, {"mean": torch.zeros(1)}, 1, trials=3)
    tensors.slice(slice(1, 2)).parameters["w"].fill_(5)
    tensors.slice(slice(2, 3)).buffers["mean"].fill_(6)
    assert tensors.parameters["w"].tolist() == [[0, 0], [5, 5], [0, 0]]
    assert tensors.buffers["mean"].tolist() == [0, 0, 6]


def test_every_trial_starts_with_all_of_its_members():
    members = {"w": torch.tensor([[1.0], [2.0]])}
    tensors = LaneTensors.starting(members, {}, 0, trials=2)
    assert tensors.parameters["w"].tolist() == [[1], [2], [1], [2]]


def test_a_trial_goes_by_the_mean_of_its_members_and_keeps_their_spread():
    trial_of_two = lane(patience=1)
    for losses in ([1.0, 3.0], [0.0, 3.0], [0.0, 5.0]):
        trial_of_two.observe(1.0, losses, score=losses[1], max_epochs=9)
    assert trial_of_two.ended == "early_stopped"
    assert trial_of_two.stopping.best_loss == 1.5
    assert trial_of_two.best_spread == pytest.approx(4.5**0.5)
    assert trial_of_two.best_score == 3.0


@pytest.mark.parametrize("losses", [[1.0, inf], [1.0, -inf], [inf, -inf], [nan, 1.0]])
def test_one_member_that_diverges_ends_its_trial(losses):
    trial_of_two = lane()
    trial_of_two.observe(1.0, losses, score=0.5, max_epochs=9)
    assert trial_of_two.ended == "diverged"
    assert isnan(trial_of_two.latest_loss)
