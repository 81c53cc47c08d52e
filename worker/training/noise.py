"""Noise as a pure function of (seed, epoch, step, site, element), with no state to carry.

Host noise (initial weights, data order, the keys of each step) comes from NumPy's ``SeedSequence``
(M. O'Neill's seed_seq, as NumPy documents it) and from torch's seeded CPU generator. Device noise
is counter-based: each element's number is hashed with a 64-bit key, so that it is the same on every
device, under ``vmap`` and after a resume. The hash is ``lowbias32`` from C. Wellons, "Prospecting
for Hash Functions" (2018), keyed here at its start and in its middle; it decides about dropout, not
about secrets. Why not Philox or reseeded generators: docs/decisions/0002-noise.md.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import pi, prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ORDER, DROPOUT, PERTURBATION, MEMBER, INPUT = 1, 2, 3, 4, 5
"""Purposes: two uses of one seed never draw the same numbers."""

LOWEST, HIGHEST = -(2**31), 2**31 - 1
"""The range of the random bits, which are uniform over int32."""

RADIUS_BITS, ANGLE_BITS = 18, 14
"""Into what a hash is split for a pair of normal numbers."""


@contextmanager
def initial_weights(seed: int) -> Iterator[None]:
    """Make every random draw on the CPU inside a pure function of ``seed``.

    A model may be built with draws of Python's and NumPy's generators, too.
    """
    others = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(others[0])
            np.random.set_state(others[1])


def member_seed(seed: int, member: int) -> int:
    """Return the seed of a trial's member, counted from 0; the first one has the study's own.

    A trial with folds or repeats is trained several times, with other rows and other noise.
    """
    if member == 0:
        return seed
    return int(np.random.SeedSequence((seed, MEMBER, member)).generate_state(1)[0] >> 1)


def data_order(seed: int, epoch: int, rows: int) -> NDArray[np.int64]:
    """Return the order in which ``rows`` training rows are seen in ``epoch``: ``(rows,)``."""
    return _generator(seed, ORDER, epoch).permutation(rows)


def step_keys(
    seed: int, epoch: int, steps: int, sites: int, purpose: int = DROPOUT
) -> NDArray[np.int32]:
    """Return a 64-bit key for each step and site of ``epoch``: ``(steps, sites, 2)``, int32."""
    return _generator(seed, purpose, epoch).integers(
        LOWEST, HIGHEST, size=(steps, sites, 2), dtype=np.int32, endpoint=True
    )


def random_bits(key_2: Tensor, shape: Sequence[int], start: int = 0) -> Tensor:
    """Return uniform int32 noise of ``shape``: one hash of (key, number) for each element.

    Elements are numbered from ``start``. ``key_2`` is ``(2,)``, int32, and has to be random itself,
    as ``step_keys`` are: keys that are alike give noise that is alike. Products wrap around, as
    the hash wants; a right shift carries the sign along, which the masks cut off.
    """
    stop = start + prod(shape)
    x = torch.arange(start, stop, dtype=torch.int32, device=key_2.device) + key_2[0]
    x ^= (x >> 16) & 0xFFFF
    x *= 0x7FEB352D
    x ^= key_2[1]
    x ^= (x >> 15) & 0x1FFFF
    x *= 0x846CA68B - 2**32
    x ^= (x >> 16) & 0xFFFF
    return x.view(shape)


def uniform(key_2: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return noise of ``shape``, uniform between 0 and 1, both excluded."""
    return _share(random_bits(key_2, shape) >> 9, 23, dtype)


def standard_normal(key_2: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return standard normal noise of ``shape``, that of the first half beside the second.

    Each hash makes two numbers of it, one in either half: the two coordinates of a point whose
    radius and angle it says (G. Box and M. Muller, Annals of Mathematical Statistics 29, 1958). It
    ends at ±5.1. Why not by inversion: docs/decisions/0002-noise.md.
    """
    count = prod(shape)
    bits = random_bits(key_2, ((count + 1) // 2,))
    radius = torch.sqrt(-2 * torch.log(_share(bits >> ANGLE_BITS, RADIUS_BITS, dtype)))
    # From the middle of an interval to that of the next, so that none of them lies on an axis.
    directions = 2**ANGLE_BITS
    turn = (bits & (directions - 1)).to(dtype) / directions + (0.5 / directions - 0.5)
    angle = turn * (2 * pi)
    halves = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)])
    return halves[:count].view(shape)


def _share(bits: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Return the middles of 2ⁿ equal parts of the numbers from 0 to 1, for n signed bits.

    They are exact in any precision, so that float32 and float64 see the same noise.
    """
    return bits.to(dtype) * 2.0**-count + (0.5 + 2.0 ** -(count + 1))


def _generator(seed: int, purpose: int, epoch: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence((seed, purpose, epoch)))
