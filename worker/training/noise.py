"""Noise as a pure function of (seed, epoch, step, site, element), with no state to carry.

Host noise (initial weights, data order, the keys of each step) comes from NumPy's ``SeedSequence``
(M. O'Neill's seed_seq, as NumPy documents it) and from torch's seeded CPU generator. Device noise
is counter-based: each element's number is hashed with a 64-bit key, so that it is the same on every
device, under ``vmap`` and after a resume. The hash is ``lowbias32`` from C. Wellons, "Prospecting
for Hash Functions" (2018), keyed here at its start and in its middle; it decides about dropout, not
about secrets. Why not Philox or reseeded generators: docs/decisions/0002-noise.md.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ORDER, DROPOUT, PERTURBATION, MEMBER, INPUT = 1, 2, 3, 4, 5
"""Purposes: two uses of one seed never draw the same numbers."""

LOWEST, HIGHEST = -(2**31), 2**31 - 1
"""The range of the random bits, which are uniform over int32."""


@contextmanager
def initial_weights(seed: int) -> Iterator[None]:
    """Make every random draw on the CPU inside a pure function of ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


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


def uniform(key_2: Tensor, shape: Sequence[int], dtype: torch.dtype, start: int = 0) -> Tensor:
    """Return noise of ``shape``, uniform between 0 and 1, both excluded."""
    return _middles(key_2, shape, dtype, start) * 2.0**-23 + 0.5


def standard_normal(
    key_2: Tensor, shape: Sequence[int], dtype: torch.dtype, start: int = 0
) -> Tensor:
    """Return standard normal noise of ``shape``, by inversion of the distribution function.

    It ends at ±5.2.
    """
    normal: Tensor = torch.erfinv(_middles(key_2, shape, dtype, start) * 2.0**-22) * 2.0**0.5
    return normal


def _middles(key_2: Tensor, shape: Sequence[int], dtype: torch.dtype, start: int) -> Tensor:
    """Return the middles of 2²³ intervals of length 1 about 0, each as likely as the others.

    They are the upper 23 bits of each hash, exact in any precision, so that float32 and float64 see
    the same noise.
    """
    return (random_bits(key_2, shape, start) >> 9).to(dtype) + 0.5


def _generator(seed: int, purpose: int, epoch: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence((seed, purpose, epoch)))
