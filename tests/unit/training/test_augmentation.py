"""Augmentation against plain loops over images, and what it may depend on."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import vmap

from regtune.errors import InvalidData
from regtune.task import Data, Storage
from tests.unit.training.conftest import losses, train, trial
from worker.training import compiling
from worker.training.augmentation import augmented, mixed, own_shares
from worker.training.batches import Place
from worker.training.engine import Engine
from worker.training.layout import axes_in_memory
from worker.training.model import loop
from worker.training.noise import uniform
from worker.training.regularizers import perturbed

KINDS = ["shift", "flip", "rotation", "erasing"]
KEY = torch.tensor([123, -456], dtype=torch.int32)
ROWS, HEIGHT, WIDTH = 200, 12, 9
EPOCHS = 3


def images(rows: int = ROWS) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, 2, HEIGHT, WIDTH, dtype=torch.float64, generator=generator)


def strength(s: float) -> Tensor:
    return torch.tensor(s, dtype=torch.float64)


def draws(rows: int = ROWS) -> Tensor:
    return uniform(KEY, (9, rows), torch.float64)


def shifted(image: Tensor, down: int, right: int) -> Tensor:
    y = (torch.arange(HEIGHT) + down).clamp(0, HEIGHT - 1)
    x = (torch.arange(WIDTH) + right).clamp(0, WIDTH - 1)
    return image[:, y][:, :, x]


def rotated(image: Tensor, angle: float) -> Tensor:
    """By torch's own sampling, which measures coordinates from -1 to 1 along either side."""
    cosine, sine = np.cos(angle), np.sin(angle)
    tall, wide = (HEIGHT - 1) / 2, (WIDTH - 1) / 2
    theta = torch.tensor([[cosine, sine * tall / wide, 0], [-sine * wide / tall, cosine, 0]])
    grid = nn.functional.affine_grid(theta[None], [1, *image.shape], align_corners=True)
    sampled = nn.functional.grid_sample(
        image[None], grid, padding_mode="border", align_corners=True
    )
    return sampled[0]


@pytest.mark.parametrize("s", [0.3, 1.0])
def test_a_shift_is_by_whole_pixels_up_to_an_eighth_of_each_side(s):
    out = augmented(images(), ["shift"], strength(s), KEY)
    downs, rights = (
        torch.round((2 * u - 1) * s * side / 8).int().tolist()
        for u, side in zip(draws()[:2], (HEIGHT, WIDTH), strict=True)
    )
    expected = [shifted(*of) for of in zip(images(), downs, rights, strict=True)]
    assert torch.equal(out, torch.stack(expected))
    assert set(downs) == (set(range(-1, 2)) if s == 1 else {0})
    assert set(rights) == (set(range(-1, 2)) if s == 1 else {0})


@pytest.mark.parametrize("s", [0.3, 1.0])
def test_a_flip_changes_left_and_right_of_up_to_half_of_the_images(s):
    out = augmented(images(), ["flip"], strength(s), KEY)
    chosen = draws()[2] < s / 2
    assert torch.equal(out, torch.where(chosen[:, None, None, None], images().flip(3), images()))
    assert abs(float(chosen.double().mean()) - s / 2) < 4.5 * 0.5 / ROWS**0.5


@pytest.mark.parametrize("s", [0.3, 1.0])
def test_a_rotation_is_that_of_torch_by_up_to_thirty_degrees(s):
    out = augmented(images(), ["rotation"], strength(s), KEY)
    angles = (2 * draws()[3] - 1) * s * np.pi / 6
    expected = [rotated(*of) for of in zip(images(), angles.tolist(), strict=True)]
    torch.testing.assert_close(out, torch.stack(expected))


@pytest.mark.parametrize("s", [0.3, 1.0])
def test_erasing_sets_a_rectangle_to_the_mean_in_up_to_half_of_the_images(s):
    out = augmented(images(), ["erasing"], strength(s), KEY)
    chosen = draws()[4] < s / 2
    for before, after, erased, *of in zip(images(), out, chosen, *draws()[5:], strict=True):
        expected = before.clone()
        if erased:
            expected[:, *rectangle(*map(float, of))] = 0
        assert torch.equal(after, expected)
    assert abs(float(chosen.double().mean()) - s / 2) < 4.5 * 0.5 / ROWS**0.5


def rectangle(area: float, aspect: float, place_y: float, place_x: float) -> tuple[slice, slice]:
    """Where it lies, of four numbers between 0 and 1."""
    pixels, ratio = (0.02 + 0.31 * area) * HEIGHT * WIDTH, 3.3 ** (2 * aspect - 1)
    tall = min(max(round((pixels * ratio) ** 0.5), 1), HEIGHT)
    wide = min(max(round((pixels / ratio) ** 0.5), 1), WIDTH)
    top, left = int(place_y * (HEIGHT - tall + 1)), int(place_x * (WIDTH - wide + 1))
    return slice(top, top + tall), slice(left, left + wide)


def test_all_at_once_flip_then_shift_then_rotate_and_a_rectangle_of_the_result_is_erased():
    every = augmented(images(), ["erasing", "flip", "shift"], strength(1.0), KEY)
    one_by_one = images()
    for kind in ("flip", "shift", "erasing"):
        one_by_one = augmented(one_by_one, [kind], strength(1.0), KEY)
    assert torch.equal(every, one_by_one)
    turned = augmented(images(), KINDS, strength(1.0), KEY)
    one_by_one = augmented(
        augmented(images(), ["flip"], strength(1.0), KEY), ["shift"], strength(1.0), KEY
    )
    one_by_one = augmented(one_by_one, ["rotation", "erasing"], strength(1.0), KEY)
    inside = slice(4, 8), slice(3, 6)  # where nothing comes in from outside
    torch.testing.assert_close(
        turned[..., inside[0], inside[1]], one_by_one[..., inside[0], inside[1]]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_strength_of_zero_is_exactly_off(dtype):
    zero = torch.zeros((), dtype=dtype)
    assert torch.equal(augmented(images().to(dtype), KINDS, zero, KEY), images().to(dtype))
    assert torch.equal(mixed(images().to(dtype), own_shares(zero, KEY, ROWS)), images().to(dtype))


def test_lanes_change_the_same_images_in_the_same_ways_each_by_its_own_strength():
    s_K = torch.tensor([0.0, 0.4, 0.4, 1.0], dtype=torch.float64)
    x = images(20)
    lanes = [over(lambda s: augmented(x, KINDS, s, KEY), (0,))(s_K) for over in (vmap, loop)]
    torch.testing.assert_close(*lanes, rtol=0, atol=1e-12)
    assert torch.equal(lanes[0][1], lanes[0][2])
    assert torch.equal(lanes[0][0], x)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kinds", [["shift"], ["flip"], ["rotation"], ["erasing"], KINDS])
def test_images_stay_channels_last_and_become_the_same(channels, kinds):
    """Also under vmap, and behind mixup and noise on the inputs."""
    first = torch.randn(2, 20, channels, HEIGHT, WIDTH, dtype=torch.float64)
    last = torch.empty(2, 20, HEIGHT, WIDTH, channels, dtype=torch.float64).permute(0, 1, 4, 2, 3)
    last.copy_(first)
    s_K = torch.tensor([0.4, 1.0], dtype=torch.float64)
    orders = []

    def change(x: Tensor, s: Tensor) -> Tensor:
        out = mixed(augmented(x, kinds, s, KEY), own_shares(s, KEY, 20))
        (out,) = perturbed([out], s, KEY)
        orders.append(axes_in_memory(out, behind=1))
        return out

    outs = [over(change, (0, 0))(x, s_K) for over in (vmap, loop) for x in (first, last)]
    if channels > 1:  # of a single one, there is no telling
        assert orders == [[1, 2, 3], [2, 3, 1]] + [[1, 2, 3]] * 2 + [[2, 3, 1]] * 2
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], rtol=0, atol=1e-12)


def test_rows_are_mixed_with_their_neighbours_as_mixup_does():
    x, share_B = images(), own_shares(strength(0.6), KEY, ROWS)
    assert share_B.min() > 1 - 0.6 / 2
    assert share_B.max() < 1
    assert abs(float(share_B.mean()) - (1 - 0.6 / 4)) < 4.5 * 0.3 / 12**0.5 / ROWS**0.5
    out = mixed(x, share_B)
    for row, share in enumerate(share_B.tolist()):
        torch.testing.assert_close(out[row], share * x[row] + (1 - share) * x[row - 1])


def test_at_full_strength_the_larger_share_is_distributed_as_in_mixup_with_alpha_one():
    """λ is Beta(1, 1) there, and the larger of λ and 1 − λ is what a row has of its own."""
    ours = own_shares(strength(1.0), KEY, 20_000)
    beta = np.random.default_rng(0).beta(1, 1, 20_000)
    theirs = torch.from_numpy(np.sort(np.maximum(beta, 1 - beta)))
    assert float((ours.sort().values - theirs).abs().max()) < 0.015


def small_images(storage: Storage) -> Data:
    random = np.random.default_rng(0)
    x = random.integers(0, 255, size=(40, 1, HEIGHT, WIDTH)).astype(np.uint8)
    return Data(x, np.arange(40) % 3, x[:9], np.arange(9) % 3, classes=3)


@pytest.fixture
def build(make_engine, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Engine]:
    monkeypatch.setattr("tests.unit.training.conftest.blobs", small_images)

    def make(**settings: Any) -> Engine:
        return make_engine(**{"augment": KINDS, "batch_size": 8} | settings)

    return make


STRONG = {"augment_strength": 0.7, "mixup": 0.4, "dropout": 0.3}


def test_an_augmented_trial_is_the_same_alone_in_company_resumed_and_lane_by_lane(build):
    alone, company, resumed, looped = (build() for _ in range(4))
    alone.join([trial(0, **STRONG)])
    expected = losses(train(alone, EPOCHS)[0])
    company.join([trial(1), trial(2, augment_strength=1.0), trial(0, **STRONG)])
    first = losses(train(company, 1)[0])
    resumed.join([trial(5, mixup=1.0)])
    train(resumed, 1)
    resumed.join([trial(0, **STRONG)], {0: company.checkpoint([0])[0]})
    rest, there = (losses(train(engine, EPOCHS - 1)[0]) for engine in (company, resumed))
    for curve in (rest, there):
        torch.testing.assert_close(torch.cat([first, curve]), expected, rtol=1e-8, atol=0)
    for step in list(looped._epochs._replicas.queue):
        step._model._over_lanes = loop
    looped.join([trial(1), trial(0, **STRONG)])
    torch.testing.assert_close(losses(train(looped, EPOCHS)[0]), expected, rtol=1e-8, atol=0)


@pytest.mark.slow
def test_an_augmented_trial_is_the_same_compiled(build, monkeypatch):
    monkeypatch.setattr(compiling, "CALLS_BEFORE_RECORDING", 2)
    plain, engine = build(), build()
    for each in (plain, engine):
        each.join([trial(0, **STRONG), trial(1)])
    expected = losses(train(plain, EPOCHS)[0])
    train(engine, 3)
    for program in engine._epochs.programs:
        assert program.recording is not None
        program._form = compiling.compile_recording(
            program.recording, program.examples, program.threads
        )
    engine.leave([0, 1])
    engine.join([trial(0, **STRONG), trial(1)])
    torch.testing.assert_close(losses(train(engine, EPOCHS)[0]), expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize("strong", [{"augment_strength": 1.0}, {"mixup": 1.0}])
def test_they_act_on_the_training_loss_alone_and_not_at_all_at_zero(build, strong):
    """A learning rate of almost zero leaves the weights."""
    engine, without = build(), build(augment=[], knobs=frozenset({"dropout"}))
    still = {"learning_rate": 1e-12}
    engine.join([trial(0, **still), trial(1, **still, **strong)])
    without.join([trial(0, **still)])
    free, changed = engine.train_epoch()
    (plain,) = without.train_epoch()
    assert free.train_loss == pytest.approx(plain.train_loss, rel=1e-12)
    assert changed.train_loss != pytest.approx(free.train_loss, rel=1e-3)


def test_the_loss_of_mixed_rows_is_that_of_mixup(build):
    """One step on all rows, against torch's cross-entropy with probabilities as targets."""
    engine = build(augment=[], batch_size=1000, settings={"hidden": [], "norm": "none"})
    engine.join([trial(0, mixup=0.8, learning_rate=1e-12)])
    weights = {name: part[0].clone() for name, part in engine._tensors.parameters.items()}
    order, keys = engine._epochs.batches.of_epoch([Place(0, 1)])
    cpu = torch.device("cpu")
    rows, numbers = engine._epochs._validation.rows.on(cpu), order.of_lanes(cpu)
    x, y = rows.x[numbers], rows.y[numbers]
    share_B = own_shares(strength(0.8), next(keys)[-1], len(y))
    targets = nn.functional.one_hot(y, 3).double()
    targets = share_B[:, None] * targets + (1 - share_B[:, None]) * targets.roll(1, 0)
    weight, bias = (
        next(part for name, part in weights.items() if name.endswith(end))
        for end in ("weight", "bias")
    )
    logits = mixed(x, share_B).flatten(1) @ weight.T + bias
    expected = nn.functional.cross_entropy(logits, targets)
    assert engine.train_epoch()[0].train_loss == pytest.approx(float(expected))


def test_images_are_asked_for_where_there_are_none(make_engine):
    with pytest.raises(InvalidData, match=r"changes images .* but a row .* has the shape \(6,\)"):
        make_engine(augment=["flip"])
