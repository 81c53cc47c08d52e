import pytest
import structlog
import torch
from torch import nn
from torch.func import vmap

from worker.tasks.models import mlp
from worker.tasks.preparation import Rows
from worker.training.model import Batch, DropoutRates, LaneModel, UnsupportedModel, loop
from worker.training.regularizers import dropout_threshold

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


def lane_model(model: nn.Module) -> LaneModel:
    return LaneModel(model.double(), Rows(rows().x[:4], rows().y[:4]))


def batch(lanes: int, sites: int, per_lane: bool) -> Batch:
    generator = torch.Generator().manual_seed(1)
    keys = torch.randint(-(2**31), 2**31, (lanes, sites, 2), dtype=torch.int32, generator=generator)
    if not per_lane:
        return Batch(rows().x, rows().y, keys[0], per_lane)
    shuffled = torch.stack([torch.randperm(12, generator=generator) for _ in range(lanes)])
    return Batch(rows().x[shuffled], rows().y[shuffled], keys, per_lane)


def stack(model: LaneModel, lanes: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Lanes whose weights differ."""
    factors = torch.linspace(0.5, 1.5, lanes, dtype=torch.float64)[:, None]
    buffers = {name: torch.stack([b] * lanes) for name, b in model.initial_buffers.items()}
    return model.initial_parameters * factors, buffers


def rates() -> DropoutRates:
    return DropoutRates(dropout_threshold(RATES), 1 / (1 - RATES.double()))


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
        gradient, loss = model.gradients(
            parameters, buffers, rates(), batch(3, model.sites, per_lane)
        )
        evaluated = model.evaluate(parameters, buffers, rows(), lambda: None)
        results.append([gradient, loss, *buffers.values(), *evaluated])
    for mapped, looped in zip(*results, strict=True):
        torch.testing.assert_close(mapped, looped, rtol=1e-9, atol=1e-12)


def test_a_lane_is_the_model_that_autograd_would_train():
    torch.manual_seed(0)
    plain = cnn().double()
    plain[3].p = 0.0
    torch.manual_seed(0)
    model = lane_model(cnn())
    parameters, buffers = stack(model, 1)
    parameters *= 2
    gradient, loss = model.gradients(
        parameters,
        buffers,
        DropoutRates(dropout_threshold(RATES[:1]), torch.ones(1, dtype=torch.float64)),
        batch(1, 1, per_lane=False),
    )
    expected_loss = nn.functional.cross_entropy(plain(rows().x), rows().y)
    expected_loss.backward()
    named = dict(plain.named_parameters())
    order = ["0.weight", "5.weight", "0.bias", "1.weight", "1.bias", "5.bias"]
    expected = torch.cat([named[name].grad.flatten() for name in order])
    torch.testing.assert_close(loss[0], expected_loss.detach())
    torch.testing.assert_close(gradient[0], expected)
    assert model.weights == named["0.weight"].numel() + named["5.weight"].numel()
    for name, expected_buffer in plain.named_buffers():
        torch.testing.assert_close(buffers[name][0], expected_buffer)


def test_evaluation_leaves_running_statistics_and_weights_as_they_are():
    model = lane_model(cnn())
    parameters, buffers = stack(model, 2)
    before = [parameters.clone(), *(b.clone() for b in buffers.values())]
    model.evaluate(parameters, buffers, rows(), lambda: None)
    for old, now in zip(before, [parameters, *buffers.values()], strict=True):
        assert torch.equal(old, now)


def test_evaluation_has_no_dropout_even_right_after_a_training_step():
    model = lane_model(CalledTwice())
    parameters, buffers = stack(model, 3)
    before = model.evaluate(parameters, buffers, rows(), lambda: None)
    model.gradients(parameters, buffers, rates(), batch(3, 1, per_lane=False))
    after = model.evaluate(parameters, buffers, rows(), lambda: None)
    assert torch.equal(before[0], after[0])


def test_evaluation_in_several_batches_is_the_mean_over_all_rows(monkeypatch):
    model = lane_model(cnn())
    parameters, buffers = stack(model, 2)
    whole = model.evaluate(parameters, buffers, rows(), lambda: None)
    monkeypatch.setattr("worker.training.model.EVALUATION_ROWS", 5)
    in_batches = model.evaluate(parameters, buffers, rows(), lambda: None)
    torch.testing.assert_close(whole, in_batches)


def test_lanes_that_share_a_batch_share_their_noise_at_rates_of_their_own():
    """At a higher rate the same elements drop, and more."""
    model = lane_model(CalledTwice())
    parameters, buffers = stack(model, 3)
    parameters = parameters[1].expand(3, -1).clone()
    same = DropoutRates(rates().threshold_K[[1, 1, 1]], rates().scale_K[[1, 1, 1]])
    _, loss_K = model.gradients(parameters, buffers, same, batch(3, 1, per_lane=False))
    torch.testing.assert_close(loss_K, loss_K[:1].expand(3))
    _, loss_K = model.gradients(parameters, buffers, rates(), batch(3, 1, per_lane=False))
    assert len(loss_K.unique()) == 3


def test_a_model_that_vmap_refuses_runs_in_a_loop_and_says_so_once(lines):
    model = lane_model(Branching())
    assert model._over_lanes is loop
    assert [line["event"] for line in lines] == ["lanes_run_one_by_one"]
    parameters, buffers = stack(model, 2)
    model.evaluate(parameters, buffers, rows(), lambda: None)
    assert len(lines) == 1


@pytest.mark.parametrize("build", [FunctionalDropout, lambda: Attention(dropout=0.1)])
def test_a_model_with_noise_of_its_own_is_refused(build):
    with pytest.raises(UnsupportedModel, match="dropout modules"):
        lane_model(build())


def test_an_error_inside_the_model_is_the_users_to_see():
    class Broken(Branching):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        lane_model(Broken())
