from typing import Any

import pytest
import structlog
import torch
from torch import nn
from torch.func import vmap

from worker.tasks.models import mlp
from worker.tasks.rows import Rows
from worker.training.dropout import dropout_threshold
from worker.training.model import (
    Batch,
    LaneModel,
    UnsupportedModel,
    loop,
    neutral_strengths,
)
from worker.training.noise import random_bits, standard_normal
from worker.training.objective import classification

IMAGES = (1, 8, 8)
CLASSES = 4
RATES = torch.tensor([0.0, 0.3, 0.8])


class Attention(nn.Module):
    """A small transformer for rows of pixels."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.attention = nn.MultiheadAttention(16, 2, dropout=dropout, batch_first=True)
        self.norm = nn.LayerNorm(16)
        self.dropout = nn.Dropout()
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x.flatten(1, 2))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.dropout(self.norm(x)).mean(1))


class Branching(nn.Module):
    """Looks at the data to choose its way, which vmap cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp({"hidden": [16]}, IMAGES, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.body(x)
        return -y if float(y.sum()) > 1e9 else y


class FunctionalDropout(Branching):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.body(x)
        return nn.functional.dropout(y, 0.1, self.training)


class OwnDropout(nn.Dropout):
    """One mask for all rows, which is not what nn.Dropout does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.bernoulli(torch.full_like(x[0], 0.9)) if self.training else x


class Centred(nn.Module):
    """Takes a running mean off, which it keeps as one would write it down."""

    running: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running", torch.zeros(64))
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        if self.training:
            self.running = 0.9 * self.running + 0.1 * x.mean(0).detach()
        return self.head(x - self.running)


class CalledTwice(nn.Module):
    """A user's own module, which uses one dropout in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        self.layers = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64)])
        self.dropout = nn.Dropout()
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.flatten(x)
        for layer in self.layers:
            x = self.dropout(torch.relu(layer(x)))
        return self.head(x)


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout2d(),
        nn.Flatten(),
        nn.Linear(144, CLASSES),
    )


def rows(n: int = 12) -> Rows:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, *IMAGES, dtype=torch.float64, generator=generator)
    return Rows(x, torch.arange(n) % CLASSES)


def lane_model(model: nn.Module, **options: Any) -> LaneModel:
    return LaneModel(
        model.double(), Rows(rows().x[:4], rows().y[:4]), classification(CLASSES), **options
    )


def batch(lanes: int, model: LaneModel, per_lane: bool) -> Batch:
    generator = torch.Generator().manual_seed(1)
    shape = (lanes, model.keys, 2)
    keys = torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, generator=generator)
    if not per_lane:
        return Batch(rows().x, rows().y, keys[0], per_lane)
    shuffled = torch.stack([torch.randperm(12, generator=generator) for _ in range(lanes)])
    return Batch(rows().x[shuffled], rows().y[shuffled], keys, per_lane)


def stack(model: LaneModel, lanes: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Lanes whose weights differ."""
    factors = torch.linspace(0.5, 1.5, lanes, dtype=torch.float64)
    weights, buffers = model.parameters_of(model._model), model.buffers_of(model._model)
    return (
        {
            name: torch.stack([part * factor for factor in factors])
            for name, part in weights.items()
        },
        {name: torch.stack([part] * lanes) for name, part in buffers.items()},
    )


def strengths(
    rates: torch.Tensor = RATES, input_dropout: float = 0.0, **others: float
) -> dict[str, torch.Tensor]:
    neutral = neutral_strengths(len(rates), torch.float64)
    input_rates = torch.full_like(neutral["input_noise"], input_dropout)
    return {
        **neutral,
        "dropout_threshold": dropout_threshold(rates),
        "dropout_scale": 1 / (1 - rates.double()),
        "input_dropout_threshold": dropout_threshold(input_rates),
        "input_dropout_scale": 1 / (1 - input_rates),
        **{name: torch.full_like(neutral[name], value) for name, value in others.items()},
    }


def measured(
    model: LaneModel, parameters: dict[str, torch.Tensor], buffers: dict[str, torch.Tensor]
) -> torch.Tensor:
    """Mean losses and accuracies over all rows."""
    weight = torch.ones(len(rows()), dtype=torch.float64)
    total = model.measure(parameters, buffers, rows().x, rows().y, weight, per_lane=False)
    return total / len(rows())


@pytest.fixture
def lines() -> list:
    with structlog.testing.capture_logs() as captured:
        yield captured


MODELS = {
    "mlp, batch norm": lambda: mlp({"hidden": [16, 8], "norm": "batch"}, IMAGES, CLASSES),
    "mlp, layer norm": lambda: mlp({"hidden": [16, 8], "norm": "layer"}, IMAGES, CLASSES),
    "mlp, no norm": lambda: mlp({"hidden": [], "norm": "none"}, IMAGES, CLASSES),
    "cnn": cnn,
    "attention": Attention,
    "attention with dropout": lambda: Attention(dropout=0.1),
    "called twice": CalledTwice,
}


@pytest.mark.parametrize("per_lane", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_the_loop_over_lanes_gives_the_numbers_of_vmap(name, per_lane, lines):
    model = lane_model(MODELS[name]())
    assert not lines
    results = []
    for over_lanes in (vmap, loop):
        model._over_lanes = over_lanes
        parameters, buffers = stack(model, 3)
        gradients, loss = model.gradients(
            parameters, buffers, strengths(), batch(3, model, per_lane)
        )
        evaluated = measured(model, parameters, buffers)
        results.append([*gradients.values(), loss, *buffers.values(), evaluated])
    for mapped, looped in zip(*results, strict=True):
        torch.testing.assert_close(mapped, looped, rtol=1e-9, atol=1e-12)


def test_a_lane_is_the_model_that_autograd_would_train():
    torch.manual_seed(0)
    plain = cnn().double()
    plain[3].p = 0.0
    torch.manual_seed(0)
    model = lane_model(cnn())
    parameters, buffers = stack(model, 1)
    gradients, loss = model.gradients(
        {name: 2 * halved for name, halved in parameters.items()},
        buffers,
        strengths(RATES[:1]),
        batch(1, model, per_lane=False),
    )
    expected_loss = nn.functional.cross_entropy(plain(rows().x), rows().y)
    expected_loss.backward()
    named = dict(plain.named_parameters())
    torch.testing.assert_close(loss[0], expected_loss.detach())
    assert list(gradients) == ["0.weight", "5.weight", "0.bias", "1.weight", "1.bias", "5.bias"]
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient[0], named[name].grad)
    assert model.penalized == ("0.weight", "5.weight")
    for name, expected_buffer in plain.named_buffers():
        torch.testing.assert_close(buffers[name][0], expected_buffer)


@pytest.mark.parametrize("over_lanes", [loop, vmap])
def test_a_buffer_that_the_model_replaces_is_kept(over_lanes):
    model = lane_model(Centred())
    model._over_lanes = over_lanes
    parameters, buffers = stack(model, 2)
    for _ in range(2):
        model.gradients(parameters, buffers, strengths(RATES[:2]), batch(2, model, per_lane=False))
    mean = rows().x.flatten(1).mean(0)
    for running in buffers["running"]:
        torch.testing.assert_close(running, 0.19 * mean)
    measured(model, parameters, buffers)
    torch.testing.assert_close(buffers["running"][0], 0.19 * mean)


def test_evaluation_leaves_running_statistics_and_weights_as_they_are():
    model = lane_model(cnn())
    parameters, buffers = stack(model, 2)
    held = [*parameters.values(), *buffers.values()]
    before = [part.clone() for part in held]
    measured(model, parameters, buffers)
    for old, now in zip(before, held, strict=True):
        assert torch.equal(old, now)


def test_evaluation_has_no_dropout_even_right_after_a_training_step():
    model = lane_model(CalledTwice())
    parameters, buffers = stack(model, 3)
    before = measured(model, parameters, buffers)
    model.gradients(parameters, buffers, strengths(), batch(3, model, per_lane=False))
    assert torch.equal(before, measured(model, parameters, buffers))


def test_rows_that_only_fill_up_a_batch_do_not_count():
    model = lane_model(cnn())
    parameters, buffers = stack(model, 2)
    x = torch.cat([rows().x, 9 * rows().x[:3]])
    y = torch.cat([rows().y, rows().y[:3]])
    weight = torch.tensor([1.0] * len(rows()) + [0.0] * 3, dtype=torch.float64)
    filled = model.measure(parameters, buffers, x, y, weight, per_lane=False)
    torch.testing.assert_close(filled / len(rows()), measured(model, parameters, buffers))


def test_lanes_that_share_a_batch_share_their_noise_at_rates_of_their_own():
    """At a higher rate the same elements drop, and more."""
    model = lane_model(CalledTwice())
    parameters, buffers = stack(model, 3)
    parameters = {name: torch.stack([part[1]] * 3) for name, part in parameters.items()}
    same = strengths(RATES[[1, 1, 1]])
    _, loss_K = model.gradients(parameters, buffers, same, batch(3, model, per_lane=False))
    torch.testing.assert_close(loss_K, loss_K[:1].expand(3))
    _, loss_K = model.gradients(parameters, buffers, strengths(), batch(3, model, per_lane=False))
    assert len(loss_K.unique()) == 3


def test_a_lack_of_memory_is_not_taken_for_a_model_that_vmap_refuses(monkeypatch, lines):
    usual = LaneModel._try

    def on_a_full_device(self: LaneModel, over_lanes: object, sample: object) -> object:
        if over_lanes is not loop:
            raise RuntimeError("CUDA error: out of memory")
        return usual(self, over_lanes, sample)

    monkeypatch.setattr(LaneModel, "_try", on_a_full_device)
    with pytest.raises(RuntimeError, match="out of memory"):
        lane_model(CalledTwice())
    assert not lines


def test_a_model_that_vmap_refuses_runs_in_a_loop_and_says_so_once(lines):
    model = lane_model(Branching())
    assert not model.vectorized
    assert [line["event"] for line in lines] == ["lanes_run_one_by_one"]
    measured(model, *stack(model, 2))
    assert len(lines) == 1


@pytest.mark.parametrize(
    "build",
    [
        FunctionalDropout,
        lambda: nn.Sequential(nn.Flatten(), OwnDropout(), nn.Linear(64, CLASSES)),
    ],
)
def test_a_model_with_noise_of_its_own_is_refused(build):
    with pytest.raises(UnsupportedModel, match="dropout modules"):
        lane_model(build())


def test_an_error_inside_the_model_is_the_users_to_see():
    class Broken(Branching):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        lane_model(Broken())


def test_replicas_compute_the_same_and_share_nothing():
    model = lane_model(CalledTwice())
    twin = model.replica()
    results = []
    for each in (model, twin):
        parameters, buffers = stack(model, 3)
        results.append(
            each.gradients(parameters, buffers, strengths(), batch(3, model, per_lane=False))
        )
    torch.testing.assert_close(*results)
    modules = set(model._model.modules())
    assert modules.isdisjoint(twin._model.modules())
    assert set(twin._sites.values()).isdisjoint(modules)


@pytest.mark.parametrize("per_lane", [False, True])
@pytest.mark.parametrize(
    "knob", ["input_noise", "weight_noise", "label_smoothing", "input_dropout", "mixup"]
)
def test_a_knob_acts_in_training_alone_and_is_exactly_off_at_zero(knob, per_lane):
    """Against a model without the knob, and against the loop over lanes."""
    plain, with_knob = (lane_model(cnn(), knobs=knobs) for knobs in ((), (knob,)))
    parameters, buffers = stack(plain, 3)

    def gradients(model: LaneModel, strength: float) -> list[torch.Tensor]:
        own = {name: buffer.clone() for name, buffer in buffers.items()}
        chosen = strengths(**{knob: strength})
        gradients, loss = model.gradients(parameters, own, chosen, batch(3, model, per_lane))
        return [loss, *gradients.values()]

    off, unknown = gradients(with_knob, 0.0), gradients(plain, 0.0)
    for ours, theirs in zip(off, unknown, strict=True):
        torch.testing.assert_close(ours, theirs)
    on = gradients(with_knob, 0.3)
    assert not torch.allclose(on[0], off[0], rtol=1e-3)
    assert torch.equal(
        measured(with_knob, parameters, buffers), measured(plain, parameters, buffers)
    )
    with_knob._over_lanes = loop
    for mapped, looped in zip(on, gradients(with_knob, 0.3), strict=True):
        torch.testing.assert_close(mapped, looped, rtol=1e-9, atol=1e-12)


def test_each_weight_draws_noise_of_its_own():
    """Two layers of the same shape: the second one's noise is not the first one's again."""
    twins = nn.Sequential(nn.Flatten(), nn.Linear(64, 64, bias=False), nn.Linear(64, 64))
    model = lane_model(twins, knobs=("weight_noise",))
    key, none = torch.tensor([3, 7], dtype=torch.int32), torch.zeros(64, 64, dtype=torch.float64)
    still = {"1.weight": none, "2.weight": none, "2.bias": none[0]}
    noisy = model._with_noise(still, torch.tensor(1.0, dtype=torch.float64), key)
    drawn = standard_normal(key, (2, 64, 64), torch.float64)
    assert torch.equal(torch.stack([noisy["1.weight"], noisy["2.weight"]]), drawn)
    assert torch.equal(noisy["2.bias"], none[0])


def test_input_and_weight_noise_are_what_their_names_say():
    """One linear layer: noise on inputs and weights can be undone by hand."""
    linear = nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES))
    model = lane_model(linear, knobs=("input_noise", "weight_noise"))
    parameters, _ = stack(model, 1)
    seen = batch(1, model, per_lane=False)
    chosen = strengths(RATES[:1], input_noise=0.5, weight_noise=0.2)
    _, loss = model.gradients(parameters, {}, chosen, seen)
    input_key, weight_key = seen.keys[:2]
    x = rows().x + 0.5 * standard_normal(input_key, rows().x.shape, torch.float64)
    weights = parameters["1.weight"][0]
    weights = weights + 0.2 * standard_normal(weight_key, weights.shape, torch.float64)
    logits = x.flatten(1) @ weights.T + parameters["1.bias"][0]
    torch.testing.assert_close(loss[0], nn.functional.cross_entropy(logits, rows().y))


def test_dropout_on_inputs_is_dropout_on_what_the_model_gets():
    """One linear layer, at lanes of different rates: what is left of its inputs is known."""
    rates = torch.tensor([0.0, 0.2, 0.6], dtype=torch.float64)
    model = lane_model(
        nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES)), knobs=("input_dropout",)
    )
    parameters, _ = stack(model, 3)
    seen = batch(3, model, per_lane=False)
    chosen = strengths() | {
        "input_dropout_threshold": dropout_threshold(rates),
        "input_dropout_scale": 1 / (1 - rates),
    }
    _, loss_K = model.gradients(parameters, {}, chosen, seen)
    uniform = (random_bits(seen.keys[2], rows().x.shape).double() + 2**31) / 2**32
    shares = []
    for lane, rate in enumerate(rates.tolist()):
        keep = uniform >= rate
        shares.append(1 - float(keep.double().mean()))
        x = torch.where(keep, rows().x / (1 - rate), 0.0)
        logits = x.flatten(1) @ parameters["1.weight"][lane].T + parameters["1.bias"][lane]
        torch.testing.assert_close(loss_K[lane], nn.functional.cross_entropy(logits, rows().y))
    assert shares == pytest.approx(rates.tolist(), abs=4.5 * 0.5 / uniform.numel() ** 0.5)


def test_bfloat16_keeps_weights_and_losses_in_full_precision():
    torch.manual_seed(0)
    sample = Rows(rows().x[:4].float(), rows().y[:4])
    model, full = (
        LaneModel(
            mlp({"hidden": [16]}, IMAGES, CLASSES),
            sample,
            classification(CLASSES),
            autocast=autocast,
        )
        for autocast in (torch.bfloat16, None)
    )
    assert model.vectorized
    parameters, buffers = stack(model, 2)
    parameters = {name: part.float() for name, part in parameters.items()}
    seen = batch(2, model, per_lane=False)
    seen = Batch(seen.x.float(), seen.y, seen.keys, per_lane=False)
    chosen = {
        name: value.float() if value.is_floating_point() else value
        for name, value in strengths(RATES[:2]).items()
    }
    gradients, loss = model.gradients(parameters, buffers, chosen, seen)
    exact_gradients, exact_loss = full.gradients(parameters, buffers, chosen, seen)
    gradient, exact = (
        torch.cat([part.flatten() for part in parts.values()])
        for parts in (gradients, exact_gradients)
    )
    assert gradient.dtype == loss.dtype == torch.float32
    assert not torch.equal(loss, exact_loss)
    torch.testing.assert_close(loss, exact_loss, rtol=0.05, atol=0)
    assert (gradient - exact).norm() < 0.1 * exact.norm()
