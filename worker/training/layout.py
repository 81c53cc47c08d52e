"""In which order tensors lie in memory.

On a CPU, convolutions, pooling and batch norm are faster where an image's channels lie side by side
(*channels last*). A layer gives its output in the order of its input and weights, so it is enough
that rows and the weights of convolutions are kept like that, and that what is done to rows before
the model leaves them so; to turn them in each step would cost what is gained.

A linear layer multiplies by its weights turned, which is faster where they are kept turned. Its
input's gradient then is slower by as much, but nobody asks for that of rows.
"""

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor, nn

MANY_OUTPUTS = 64
"""From so many on a linear layer gains by weights that are kept turned; of few, it loses."""


def arrange_weights(model: nn.Module, input_shape: Sequence[int], device: torch.device) -> None:
    """Lay the weights of a model's layers out as they are fastest on a device, in place.

    That is those of convolutions, and of linear layers that read as many features as rows have.
    """
    if device.type != "cpu":
        return
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
        # A parametrized weight is computed anew whenever it is looked at.
        elif isinstance(module, nn.Linear) and "weight" in module._parameters:
            reads_rows = module.in_features == prod(input_shape)
            if reads_rows and module.out_features >= MANY_OUTPUTS:
                module.weight.data = module.weight.data.t().contiguous().t()


def memory_format_of_rows(
    model: nn.Module, input_shape: Sequence[int], device: torch.device
) -> torch.memory_format:
    """Return how rows are to be kept for this model: images, perhaps, channels last."""
    images = len(input_shape) == 3
    convolves = any(isinstance(module, nn.Conv2d) for module in model.modules())
    last = images and convolves and device.type == "cpu"
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


def rows_at(x: Tensor, index: Tensor) -> Tensor:
    """Return ``x[index]`` for rows ``(N, *features)`` that lie side by side, in their order.

    As whole rows they are copied faster: 256 bytes-images of 3 × 32 × 32 in 0.1 of the time.
    """
    if x.ndim == 1:
        return x[index]
    numbers = index.flatten()

    def select(turned: Tensor) -> Tensor:
        return turned.flatten(1).index_select(0, numbers).view(-1, *turned.shape[1:])

    return like(x, select).view(*index.shape, *x.shape[1:])


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
