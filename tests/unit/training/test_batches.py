"""What lanes see in each step, and that steps get it as a compiled step expects it."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from worker.tasks.preparation import Split
from worker.tasks.rows import Rows
from worker.training import batches
from worker.training.batches import Batches, Place
from worker.training.supply import Resident

CPU = torch.device("cpu")
PLACES = {
    "alone": [Place(0, 2)],
    "together": [Place(0, 2)] * 3,
    "apart": [Place(0, 5), Place(1, 2), Place(0, 5), Place(1, 1)],
}


@pytest.fixture
def of_two_members() -> Batches:
    none = torch.empty(0)
    parts = np.arange(23), np.arange(1, 23)
    splits = [Split(part, part[:0], part[:0], none, none) for part in parts]
    return Batches(splits, batch_size=8, seed=3, sites=2, device=CPU)


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
def test_each_lane_sees_the_rows_and_the_noise_of_its_place(
    of_two_members: Batches, places: Sequence[Place]
):
    order, keys = of_two_members.of_epoch(places)
    keys = list(keys)
    numbers = order.of_lanes(CPU).reshape(len(places), -1)
    for lane, place in enumerate(places):
        own_order, own_keys = of_two_members.of_epoch([place])
        assert torch.equal(numbers[lane], own_order.of_lanes(CPU))
        for of_lanes, own in zip(keys, own_keys, strict=True):
            assert torch.equal(of_lanes.reshape(len(places), -1, 2)[lane], own)


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("at_once", [1, 2, 100])
def test_what_a_step_gets_lies_side_by_side(
    of_two_members: Batches,
    places: Sequence[Place],
    at_once: int,
    monkeypatch: pytest.MonkeyPatch,
):
    """A compiled step insists on the strides that it was compiled for, and a graph on its own."""
    monkeypatch.setattr(batches, "STEPS_AT_ONCE", at_once)
    order, keys = of_two_members.of_epoch(places)
    keys = list(keys)
    assert len(keys) == len(of_two_members.sizes)
    sizes = of_two_members.sizes
    supply = Resident(Rows(torch.zeros(23, 1), torch.zeros(23), None))
    assert len(set(sizes)) == 2
    end = 0
    for number, (index,) in enumerate(supply.batches(order, sizes)):
        assert index.shape[-1] == sizes[number]
        assert index.is_contiguous()
        assert keys[number].is_contiguous()
        end += sizes[number]
        assert torch.equal(index, order.of_lanes(CPU)[..., end - sizes[number] : end])
    assert number + 1 == len(sizes)


def test_an_order_is_kept_for_lanes_that_come_there_later(
    of_two_members: Batches, monkeypatch: pytest.MonkeyPatch
):
    made = []

    def noted(seed: int, epoch: int, rows: int) -> np.ndarray:
        made.append(epoch)
        return np.arange(rows)

    monkeypatch.setattr(batches, "data_order", noted)
    for epoch in (1, 2, 1, 2, 3):
        of_two_members.of_epoch([Place(0, epoch)])
    assert made == [1, 2, 3]
