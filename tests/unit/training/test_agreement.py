from math import nan

import pytest
import torch

from worker.training.agreement import groups_of, largest_difference, rounded_otherwise

BIG, NOISE = torch.full((100,), 1.0), torch.full((4,), 1e-9)


def test_tensors_side_by_side_in_a_tree_are_a_group():
    parameters, moment = {"w": BIG, "b": BIG}, {"w": BIG, "b": BIG}
    groups = groups_of(((parameters, (moment,)), BIG))
    assert groups[0] == groups[1] != groups[2] == groups[3] != groups[4]


def test_a_difference_counts_relative_to_its_group():
    noisy = [("moments", BIG, BIG), ("moments", NOISE, -NOISE)]
    assert largest_difference(noisy) < 1e-8
    assert largest_difference([("moments", NOISE, -NOISE)]) == pytest.approx(2)
    assert largest_difference([*noisy, ("weights", BIG, 1.1 * BIG)]) == pytest.approx(0.1)


def test_a_group_of_zeros_and_numbers_that_are_none():
    zeros = torch.zeros(4)
    assert largest_difference([("buffers", zeros, zeros)]) == 0
    assert largest_difference([("buffers", zeros, zeros + 0.5)]) == pytest.approx(1.0)
    assert largest_difference([("buffers", torch.tensor([nan]), torch.tensor([nan]))]) == 0
    assert largest_difference([]) == 0


@pytest.mark.parametrize("epsilon", [0.0, 1e-2])
def test_what_is_rounded_otherwise_is_off_by_its_precision_and_settings_are_not(epsilon):
    x = torch.linspace(1, 2, 10_000).reshape(100, 100)
    off = ((rounded_otherwise(x, epsilon) - x) / x).abs().max()
    precision = max(epsilon, torch.finfo(x.dtype).eps)
    assert precision / 2 <= off <= 2 * precision
    rates, keys = torch.rand(8), torch.arange(8).reshape(4, 2)
    assert rounded_otherwise(rates, epsilon) is rates
    assert rounded_otherwise(keys, epsilon) is keys
