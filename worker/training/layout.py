"""In which order tensors lie in memory.

On a CPU, convolutions, pooling and batch norm are faster where an image's channels lie side by side
(*channels last*). A layer gives its output in the order of its input and weights, so it is enough
that rows and the weights of convolutions are kept like that, and that what is done to rows before
the model leaves them so; to turn them in each step would cost what is gained.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def prefers_channels_last(model: nn.Module, device: torch.device) -> bool:
    """Say whether rows and weights are to be kept channels last for this model."""
    return device.type == "cpu" and any(isinstance(m, nn.Conv2d) for m in model.modules())


def channels_last(model: nn.Module) -> None:
    """Turn the weights of a model's convolutions, in place."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)


def memory_format_of_rows(
    model: nn.Module, input_shape: Sequence[int], device: torch.device
) -> torch.memory_format:
    """Return how rows are to be kept for this model: images, perhaps, channels last."""
    images = len(input_shape) == 3
    last = images and prefers_channels_last(model, device)
    return torch.channels_last if last else torch.contiguous_format


def like(original: Tensor, function: Callable[..., Tensor], *others: Tensor) -> Tensor:
    """Return ``function(original, *others)``, with axes in memory in the order of ``original``.

    The function must take and return tensors of as many axes; the first one, lanes or rows, stays.
    """
    order = [0, *axes_in_memory(original, behind=1)]
    if order == list(range(original.ndim)):
        return function(original, *others)
    back = [order.index(axis) for axis in range(original.ndim)]
    turned = (tensor.permute(order) for tensor in (original, *others))
    return function(*turned).permute(back)


def stacked(lanes: Sequence[Tensor]) -> Tensor:
    """Return tensors of lanes along a new first axis, else in the order in which the first lies."""
    if len(lanes) == 1:
        return lanes[0].unsqueeze(0)
    order = axes_in_memory(lanes[0])
    back = [0, *(1 + order.index(axis) for axis in range(lanes[0].ndim))]
    return torch.stack([lane.permute(order) for lane in lanes]).permute(back)


def axes_in_memory(tensor: Tensor, behind: int = 0) -> list[int]:
    """Return the axes from number ``behind`` on, the one with the longest stride first.

    Of axes alike, one of a single element comes last: so torch tells a single channel that lies
    last from one that lies first.
    """
    strides, sizes = tensor.stride(), tensor.shape
    axes = range(behind, tensor.ndim)
    return sorted(axes, key=lambda axis: (-strides[axis], -sizes[axis]))
