"""Training images changed at random, each in its own way, and rows mixed with one another.

Every change is made of the same numbers for all lanes, scaled by the lane's strength s in [0, 1];
at s = 0 nothing changes. What comes into an image from outside repeats its border. Images are
``(B, channels, height, width)``, standardized.

Random erasing: Z. Zhong et al., arXiv 1708.04896. Mixup: H. Zhang et al., arXiv 1710.09412.
"""

from collections.abc import Collection
from math import log, radians

import torch
from torch import Tensor

from worker.training.layout import axes_in_memory, like
from worker.training.noise import uniform

MOST_SHIFTED = 1 / 8
"""Of height and width: 4 pixels of 32, as usual for CIFAR."""

MOST_ROTATED = radians(30)
MOST_FLIPPED = MOST_ERASED = 0.5
"""Shares of the images."""

ERASED_AREA = (0.02, 0.33)
ERASED_ASPECT = 3.3
"""A rectangle's share of the image, and the most by which it is longer than wide, or wider."""

_DRAWS = 9


def augmented(x: Tensor, kinds: Collection[str], strength: Tensor, key_2: Tensor) -> Tensor:
    """Return images changed in the ways of these kinds, in memory as ``x`` lies.

    They are flipped, then shifted, then rotated, all in one look-up; then a part is erased.
    """
    rows, _, height, width = x.shape
    draws = uniform(key_2, (_DRAWS, rows), x.dtype)
    # Stacked, so that a compiler works them out once for an image, and not for each of its pixels.
    numbers = torch.stack(_of_each_image(draws, kinds, strength, height, width))[..., None, None]
    cosine, sine, shift_y, shift_x, mirror, top, bottom, left, right = numbers.unbind()
    lines, columns = (torch.arange(n, dtype=x.dtype, device=x.device) for n in (height, width))
    middle_y, middle_x = (height - 1) / 2, (width - 1) / 2
    down, across = (lines - middle_y)[:, None], columns - middle_x
    # What depends on the line alone, or on the column, is worked out once for each of them.
    if "rotation" in kinds:
        source_y = (cosine * down + shift_y + middle_y) - sine * across
        source_x = (mirror * (cosine * across + shift_x) + middle_x) + mirror * sine * down
        x = _interpolated(x, source_y, source_x)
    elif "shift" in kinds or "flip" in kinds:
        x = _looked_up(x, down + shift_y + middle_y, mirror * (across + shift_x) + middle_x)
    if "erasing" in kinds:
        inside_y = (lines[:, None] >= top) & (lines[:, None] < bottom)
        inside_x = (columns >= left) & (columns < right)
        x = x * ~(inside_y & inside_x)[:, None]
    return x


def own_shares(strength: Tensor, key_2: Tensor, rows: int) -> Tensor:
    """Return how much of each row is its own when rows are mixed: ``(B,)``.

    They are uniform between 1 − s/2 and 1. With s = 1 that is the mixup of α = 1: a share below a
    half would only swap the two rows.
    """
    return 1 - strength / 2 * uniform(key_2, (rows,), strength.dtype)


def mixed(x: Tensor, share_B: Tensor) -> Tensor:
    """Return each row mixed with the one before it in the batch, whose order is random."""
    share = share_B.view(-1, *(1 for _ in x.shape[1:]))
    return share * x + (1 - share) * before(x)


def before(rows: Tensor) -> Tensor:
    """Return the row before each row of a batch; the last one is before the first."""
    return like(rows, lambda t: t.roll(1, 0))


def _of_each_image(
    draws: Tensor, kinds: Collection[str], strength: Tensor, height: int, width: int
) -> list[Tensor]:
    """Return what is done to each image, ``(B,)`` each.

    Cosine and sine of its angle, its shift down and right, −1 if it is flipped and 1 if not, and
    where the rectangle to erase begins and ends, down and right; it is empty where nothing is
    erased.
    """
    shift_y, shift_x, flip, rotation, erased, area, aspect, place_y, place_x = draws.unbind()
    most_shifted = MOST_SHIFTED * ("shift" in kinds)
    most_flipped = MOST_FLIPPED * ("flip" in kinds)
    angle = (2 * rotation - 1) * strength * MOST_ROTATED
    smallest, largest = ERASED_AREA
    pixels = (smallest + (largest - smallest) * area) * (height * width)
    ratio = torch.exp((2 * aspect - 1) * log(ERASED_ASPECT))
    tall = torch.round((pixels * ratio).sqrt()).clamp(1, height)
    wide = torch.round((pixels / ratio).sqrt()).clamp(1, width)
    # In single precision a product may be rounded up to the other factor.
    top = torch.minimum((place_y * (height - tall + 1)).floor(), height - tall)
    left = torch.minimum((place_x * (width - wide + 1)).floor(), width - wide)
    return [
        torch.cos(angle),
        torch.sin(angle),
        torch.round((2 * shift_y - 1) * strength * (most_shifted * height)),
        torch.round((2 * shift_x - 1) * strength * (most_shifted * width)),
        1 - 2 * (flip < strength * most_flipped).to(draws.dtype),
        top,
        top + tall * (erased < strength * MOST_ERASED),
        left,
        left + wide,
    ]


def _looked_up(x: Tensor, source_y: Tensor, source_x: Tensor) -> Tensor:
    """Return images made of the pixels at whole coordinates.

    They are ``(B, height, 1)`` and ``(B, 1, width)``.
    """
    height, width = x.shape[2:]
    lines = source_y.clamp(0, height - 1).long() * width
    columns = source_x.clamp(0, width - 1).long()
    return _pixels(x, (lines + columns).flatten(1))


def _interpolated(x: Tensor, source_y: Tensor, source_x: Tensor) -> Tensor:
    """Return images at coordinates ``(B, height, width)``, bilinear between four pixels each."""
    height, width = x.shape[2:]
    source_y, source_x = source_y.clamp(0, height - 1), source_x.clamp(0, width - 1)
    # There is nothing beyond the last line and column: they are where the one before leads to.
    top = source_y.floor().clamp(max=max(height - 2, 0))
    left = source_x.floor().clamp(max=max(width - 2, 0))
    beside, below = min(width - 1, 1), min(height - 1, 1) * width
    index_BP = (top * width + left).long().flatten(1)
    upper, lower = (
        torch.lerp(
            _pixels(x, index_BP, line),
            _pixels(x, index_BP, line + beside),
            (source_x - left)[:, None],
        )
        for line in (0, below)
    )
    return torch.lerp(upper, lower, (source_y - top)[:, None])


def _pixels(x: Tensor, index_BP: Tensor, ahead: int = 0) -> Tensor:
    """Return images made of the pixels so far ahead of these numbers, in memory as ``x`` lies."""
    rows, channels, height, width = x.shape
    if axes_in_memory(x, behind=1) == [2, 3, 1]:
        pixels_BPC = x.permute(0, 2, 3, 1).flatten(1, 2)[:, ahead:]
        found = pixels_BPC.gather(1, index_BP[:, :, None].expand(-1, -1, channels))
        return found.view(rows, height, width, channels).permute(0, 3, 1, 2)
    found = x.flatten(2)[:, :, ahead:].gather(2, index_BP[:, None].expand(-1, channels, -1))
    return found.view(x.shape)
