import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch.func import vmap

from worker.training import noise
from worker.training.dropout import dropout_threshold

SIGMAS = 4.5
N = 200_000


def uniform(key: torch.Tensor, n: int = N) -> torch.Tensor:
    return (noise.random_bits(key, (n,)).double() - noise.LOWEST) / 2**32


def keys(epoch: int = 1, steps: int = 4, sites: int = 2) -> torch.Tensor:
    return torch.from_numpy(noise.step_keys(7, epoch, steps, sites))


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


def test_the_bits_are_uniform():
    for key in keys().flatten(0, 1):
        u = uniform(key)
        assert abs(u.mean() - 1 / 2) < SIGMAS * (1 / 12 / N) ** 0.5
        assert abs(u.var() - 1 / 12) < SIGMAS * (1 / 180 / N) ** 0.5
        assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-5


def test_every_single_bit_is_fair():
    bits = noise.random_bits(keys()[0, 0], (N,))
    for place in range(32):
        share = ((bits >> place) & 1).double().mean()
        assert abs(share - 1 / 2) < SIGMAS * (1 / 4 / N) ** 0.5, place


def test_neighbouring_elements_are_independent():
    u = uniform(keys()[0, 0])
    for lag in (1, 2, 8, 64, 128, 1024):
        assert abs(correlation(u[:-lag], u[lag:])) < SIGMAS / (N - lag) ** 0.5, lag


def test_steps_sites_and_epochs_are_independent():
    streams = [uniform(key) for e in (1, 2) for key in keys(e).flatten(0, 1)]
    for i, a in enumerate(streams):
        for b in streams[:i]:
            assert abs(correlation(a, b)) < SIGMAS / N**0.5


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.2, 0.5, 0.8, 0.95])
def test_dropout_drops_at_its_rate(rate):
    threshold = dropout_threshold(torch.tensor(rate))
    for key in keys().flatten(0, 1):
        dropped = (noise.random_bits(key, (N,)) < threshold).double().mean()
        assert abs(dropped - rate) < SIGMAS * (rate * (1 - rate) / N) ** 0.5


def test_a_rate_of_zero_drops_nothing_whatever_the_noise():
    assert dropout_threshold(torch.tensor(0.0)) == noise.LOWEST


def test_the_noise_is_the_same_again_and_under_vmap():
    key_D2 = keys()[:, 0]
    mapped = vmap(lambda key: noise.random_bits(key, (5, 3)))(key_D2)
    for key, bits in zip(key_D2, mapped, strict=True):
        assert torch.equal(noise.random_bits(key, (5, 3)), bits)


def test_a_longer_draw_is_two_shorter_ones():
    key = keys()[0, 0]
    whole = noise.random_bits(key, (6, 3))
    assert torch.equal(noise.random_bits(key, (4, 3)), whole[:4])
    assert torch.equal(noise.random_bits(key, (2, 3), start=12), whole[4:])


def test_the_noise_never_changes_between_versions():
    bits = noise.random_bits(torch.tensor([1, 2], dtype=torch.int32), (3,))
    assert bits.tolist() == [lowbias32(i + 1, 2) for i in range(3)]


def lowbias32(x: int, middle: int) -> int:
    """The published hash in unbounded integers, with the second key word in its middle."""
    mask = 2**32 - 1
    x ^= x >> 16
    x = x * 0x7FEB352D & mask
    x ^= middle
    x ^= x >> 15
    x = x * 0x846CA68B & mask
    x ^= x >> 16
    return x - 2**32 if x >= 2**31 else x


def test_the_data_order_is_a_permutation_of_its_own_in_each_epoch():
    first, again, second = (noise.data_order(7, epoch, 100) for epoch in (1, 1, 2))
    assert sorted(first) == list(range(100))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, noise.data_order(8, 1, 100))


def test_initial_weights_depend_on_the_seed_and_leave_other_randomness_alone():
    def draw(seed: int) -> torch.Tensor:
        with noise.initial_weights(seed):
            return torch.nn.Linear(3, 3).weight.detach()

    before = torch.get_rng_state()
    first = draw(1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert torch.equal(draw(1), first)
    assert not torch.equal(draw(2), first)


def normal(key: torch.Tensor, n: int = N) -> torch.Tensor:
    return noise.standard_normal(key, (n,), torch.float64)


def test_normal_noise_is_standard_normal_and_the_same_in_any_precision():
    for key in keys().flatten(0, 1):
        z = normal(key)
        for power in (1, 2, 3, 4):  # mean, variance, skewness, kurtosis
            moment, squared = (stats.norm.moment(p) for p in (power, 2 * power))
            deviation = (squared - moment**2) ** 0.5
            assert abs((z**power).mean() - moment) < SIGMAS * deviation / N**0.5, power
        assert stats.kstest(z.numpy(), "norm").pvalue > 1e-5
        single = noise.standard_normal(key, (N,), torch.float32)
        torch.testing.assert_close(single.double(), z, rtol=1e-4, atol=3e-6)


def test_the_tails_of_normal_noise_are_as_heavy_as_they_should_be():
    z = torch.cat([normal(key, 10 * N) for key in keys().flatten(0, 1)])
    for beyond in (2.0, 3.0, 4.0, 4.5):
        for side in (z, -z):
            expected = len(z) * stats.norm.sf(beyond)
            assert abs(int((side > beyond).sum()) - expected) < SIGMAS * expected**0.5, beyond


def test_both_numbers_of_a_hash_are_independent_and_so_are_neighbours():
    z = normal(keys()[0, 0])
    for lag in (1, 2, 64, 1024, N // 2):
        near, far = z[:-lag], z[lag:]
        for f in (lambda t: t, torch.abs, torch.sign, torch.square):
            assert abs(correlation(f(near), f(far))) < SIGMAS / (N - lag) ** 0.5, lag
    first, second = z[: N // 2], z[N // 2 :]
    total = (first + second) / 2**0.5
    assert stats.kstest(total.numpy(), "norm").pvalue > 1e-5
    assert stats.kstest((first / second).numpy(), "cauchy").pvalue > 1e-5


def test_normal_noise_of_other_steps_sites_and_epochs_is_independent():
    streams = [normal(key) for e in (1, 2) for key in keys(e).flatten(0, 1)]
    for i, a in enumerate(streams):
        for b in streams[:i]:
            assert abs(correlation(a, b)) < SIGMAS / N**0.5


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5)])
def test_normal_noise_of_any_shape_is_the_same_again_and_under_vmap(shape):
    key_D2 = keys()[:, 0]
    mapped = vmap(lambda key: noise.standard_normal(key, shape, torch.float64))(key_D2)
    assert mapped.shape == (len(key_D2), *shape)
    for key, numbers in zip(key_D2, mapped, strict=True):
        again = noise.standard_normal(key, shape, torch.float64)
        torch.testing.assert_close(again, numbers, rtol=1e-12, atol=0)
    assert mapped.unique().numel() == mapped.numel()


def test_normal_noise_is_finite_at_both_ends_and_never_zero(monkeypatch):
    ends = torch.tensor([noise.LOWEST, noise.HIGHEST, 0, -1, 2**13], dtype=torch.int32)
    monkeypatch.setattr(noise, "random_bits", lambda key, shape: ends)
    for dtype in (torch.float32, torch.float64):
        z = noise.standard_normal(keys()[0, 0], (10,), dtype)
        assert torch.isfinite(z).all()
        assert (z != 0).all()
        radius = torch.hypot(z[:5], z[5:])
        assert 5.1 < radius[0] < 5.2
        assert 0 < radius[1] < 0.01


def test_the_normal_noise_never_changes_between_versions():
    key = torch.tensor([1, 2], dtype=torch.int32)
    expected = []
    for i in range(3):
        bits = lowbias32(i + 1, 2)
        radius = math.sqrt(-2 * math.log(((bits >> 14) + 2**17 + 0.5) / 2**18))
        angle = 2 * math.pi * (((bits & (2**14 - 1)) + 0.5) / 2**14 - 0.5)
        expected.append((radius * math.cos(angle), radius * math.sin(angle)))
    first, second = zip(*expected, strict=True)
    numbers = noise.standard_normal(key, (5,), torch.float64)
    assert numbers.tolist() == pytest.approx([*first, *second[:2]], rel=1e-12)


def test_every_member_has_a_seed_of_its_own_and_the_first_the_studys():
    seeds = [noise.member_seed(7, member) for member in range(256)]
    assert seeds[0] == 7
    assert len(set(seeds)) == 256
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert seeds[1] != noise.member_seed(8, 1)
