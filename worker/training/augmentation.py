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
    """Return images changed in the ways of these kinds.

    They are flipped, then shifted, then rotated, all in one look-up; then a part is erased.
    """
    rows, _, height, width = x.shape
    draws = uniform(key_2, (_DRAWS, rows), x.dtype)
    # Stacked, so that a compiler works them out once for an image, and not for each of its pixels.
    numbers = torch.stack(_of_each_image(draws, strength, height, width))[..., None, None]
    cosine, sine, shift_y, shift_x, flipped, top, bottom, left, right = numbers.unbind()
    lines, columns = (torch.arange(n, dtype=x.dtype, device=x.device) for n in (height, width))
    source_y, source_x = lines[:, None], columns[None, :]
    if "rotation" in kinds:
        source_y, source_x = _rotated(source_y, source_x, cosine, sine)
    if "shift" in kinds:
        source_y, source_x = source_y + shift_y, source_x + shift_x
    if "flip" in kinds:
        source_x = torch.where(flipped > 0, width - 1 - source_x, source_x)
    if "rotation" in kinds:
        x = _interpolated(x, source_y, source_x)
    elif "shift" in kinds or "flip" in kinds:
        x = _looked_up(x, source_y, source_x)
    if "erasing" in kinds:
        inside_y = (lines[:, None] >= top) & (lines[:, None] < bottom)
        inside_x = (columns[None, :] >= left) & (columns[None, :] < right)
        inside = (inside_y & inside_x)[:, None]
        x = torch.where(inside, torch.zeros((), dtype=x.dtype, device=x.device), x)
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
    return rows.roll(1, 0)


def _of_each_image(draws: Tensor, strength: Tensor, height: int, width: int) -> list[Tensor]:
    """Return what is done to each image, ``(B,)`` each.

    Cosine and sine of its angle, its shift down and right, whether it is flipped, and where the
    rectangle to erase begins and ends, down and right; it is empty where nothing is erased.
    """
    shift_y, shift_x, flip, rotation, erased, area, aspect, place_y, place_x = draws.unbind()
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
        torch.round((2 * shift_y - 1) * strength * (MOST_SHIFTED * height)),
        torch.round((2 * shift_x - 1) * strength * (MOST_SHIFTED * width)),
        (flip < strength * MOST_FLIPPED).to(draws.dtype),
        top,
        top + tall * (erased < strength * MOST_ERASED),
        left,
        left + wide,
    ]


def _rotated(y: Tensor, x: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
    """Turn coordinates about the middle of the image."""
    middle_y, middle_x = (len(y) - 1) / 2, (x.shape[-1] - 1) / 2
    y, x = y - middle_y, x - middle_x
    return cosine * y - sine * x + middle_y, sine * y + cosine * x + middle_x


def _looked_up(x: Tensor, source_y: Tensor, source_x: Tensor) -> Tensor:
    """Return images made of the pixels at whole coordinates ``(B, height, width)``."""
    rows, channels, height, width = x.shape
    at = source_y.clamp(0, height - 1) * width + source_x.clamp(0, width - 1)
    index = at.expand(rows, height, width).reshape(rows, 1, -1).long()
    return x.flatten(2).gather(2, index.expand(-1, channels, -1)).view(x.shape)


def _interpolated(x: Tensor, source_y: Tensor, source_x: Tensor) -> Tensor:
    """Return images at any coordinates, bilinear between the four pixels around them."""
    source_y = source_y.clamp(0, x.shape[2] - 1)
    source_x = source_x.clamp(0, x.shape[3] - 1)
    top, left = source_y.floor(), source_x.floor()
    upper, lower = (
        torch.lerp(_looked_up(x, y, left), _looked_up(x, y, left + 1), (source_x - left)[:, None])
        for y in (top, top + 1)
    )
    return torch.lerp(upper, lower, (source_y - top)[:, None])
