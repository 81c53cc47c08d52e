from collections.abc import Callable
from math import prod

import pytest
import torch
from torch import nn

from tests.unit.training.conftest import trial
from tests.unit.training.test_architectures import convolutional, small_images
from worker.training.engine import Engine
from worker.training.lanes import LaneTensors
from worker.training.layout import (
    MANY_OUTPUTS,
    arrange_weights,
    axes_in_memory,
    like,
    memory_format_of_rows,
    rows_at,
    stacked,
)
from worker.training.noise import initial_weights

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LAST = torch.channels_last


def image_weights(channels: int = 3) -> torch.Tensor:
    """Two lanes of a convolution's weights, channels last."""
    lanes_first = torch.randn(2, 4, 5, 5, channels)
    return lanes_first.permute(0, 1, 4, 2, 3)


@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_made_of_lanes_lies_as_they_do(channels):
    weights = image_weights(channels)
    joined = like(weights, lambda a, b: torch.cat([a, b]), image_weights(channels).contiguous())
    chosen = like(weights, lambda t: t.index_select(0, torch.tensor([1, 0, 1])))
    none = like(weights, lambda t: t[:0].clone())
    for result in (joined, chosen, stacked([weights[0], weights[1]]), stacked([weights[0]])):
        assert axes_in_memory(result) == axes_in_memory(weights)
        assert torch._prims_common.suggest_memory_format(result[0]) is LAST
    assert axes_in_memory(none) == axes_in_memory(weights)
    assert torch.equal(joined[:2], weights)
    assert torch.equal(chosen, weights[[1, 0, 1]])
    assert torch.equal(stacked(list(weights)), weights)


@pytest.mark.parametrize("index", [[4, 0, 4], [[1, 2], [3, 1]]])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 2, 3, 4), (5, 1, 3, 4), (5, 3, 1, 1)])
def test_rows_are_found_by_number_and_lie_as_all_of_them_do(shape, last, index):
    x = torch.arange(60 * 2)[: prod(shape)].view(shape)
    if last and x.ndim == 4:
        x = x.contiguous(memory_format=LAST)
    found = rows_at(x, torch.tensor(index))
    assert torch.equal(found, x[torch.tensor(index)])
    rows = found.flatten(0, found.ndim - x.ndim)
    assert axes_in_memory(rows, behind=1) == axes_in_memory(x, behind=1)


def test_only_convolutions_on_a_cpu_are_turned():
    convolutions, dense = nn.Sequential(nn.Conv2d(3, 4, 3)), nn.Sequential(nn.Linear(3, 4))
    arrange_weights(convolutions, (3, 8, 8), CUDA)
    assert convolutions[0].weight.is_contiguous()
    arrange_weights(convolutions, (3, 8, 8), CPU)
    assert convolutions[0].weight.is_contiguous(memory_format=LAST)
    assert memory_format_of_rows(convolutions, (3, 8, 8), CPU) is LAST
    assert memory_format_of_rows(convolutions, (3, 8, 8), CUDA) is torch.contiguous_format
    assert memory_format_of_rows(convolutions, (192,), CPU) is torch.contiguous_format
    assert memory_format_of_rows(dense, (3, 8, 8), CPU) is torch.contiguous_format


def test_a_linear_layer_that_reads_rows_is_turned_if_it_has_many_outputs():
    def network() -> nn.Sequential:
        with initial_weights(0):
            return nn.Sequential(
                nn.Flatten(),
                nn.Linear(48, MANY_OUTPUTS),
                nn.Linear(MANY_OUTPUTS, 48),
                nn.Linear(48, MANY_OUTPUTS - 1),
            )

    usual, turned, on_cuda = network(), network(), network()
    arrange_weights(turned, (3, 4, 4), CPU)
    arrange_weights(on_cuda, (3, 4, 4), CUDA)
    assert [layer.weight.stride(0) for layer in turned[1:]] == [1, MANY_OUTPUTS, 48]
    assert [layer.weight.stride(0) for layer in on_cuda[1:]] == [48, MANY_OUTPUTS, 48]
    for mine, theirs in zip(turned.parameters(), usual.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.fixture
def engine(make_engine, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Engine]:
    monkeypatch.setattr("tests.unit.training.conftest.blobs", small_images)
    return lambda: make_engine(model=convolutional, batch_size=8, max_epochs=4)


def lies_channels_last(tensors: LaneTensors) -> bool:
    images = [part[0] for part in tensors.named().values() if part.ndim == 5]
    assert images
    return all(part.is_contiguous(memory_format=LAST) for part in images)


def test_lanes_stay_channels_last_while_others_join_and_leave(engine):
    ours, theirs = engine(), engine()
    ours.join([trial(0), trial(1), trial(2)])
    ours.train_epoch()
    (checkpoint,) = ours.checkpoint([2])
    assert all(part.is_contiguous() for part in checkpoint.tensors.values())
    theirs.join([trial(2), trial(7)], {2: checkpoint})
    theirs.train_epoch()
    theirs.leave([7])
    ours.leave([1])
    ours.train_epoch()
    assert lies_channels_last(ours._tensors)
    assert lies_channels_last(theirs._tensors)
    weights = [e._tensors.slice(e._span(e.lanes.index(2))).named() for e in (ours, theirs)]
    for name, part in weights[0].items():
        torch.testing.assert_close(weights[1][name], part, rtol=1e-9, atol=1e-12)
