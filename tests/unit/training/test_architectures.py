"""Models that people have: the built-in ones, and those of a user's own."""

from collections.abc import Callable

import numpy as np
import pytest
import structlog
import torch
from torch import nn
from torchvision.models import VisionTransformer

from regtune.task import Data, Storage
from tests.unit.training.conftest import losses, train, trial
from worker.tasks import models as built_in
from worker.tasks.models.torchvision import torchvision
from worker.training import compiling
from worker.training.engine import Engine
from worker.training.model import loop

CLASSES = 4
STRONG = {"weight_decay": 0.3, "dropout": 0.4, "l1_lambda": 0.01, "label_smoothing": 0.1}
EPOCHS = 2


def small_images(storage: Storage) -> Data:
    """Colour images of 16 × 16 in which each class has a corner of its own."""
    random = np.random.default_rng(0)

    def draw(rows: int) -> tuple[np.ndarray, np.ndarray]:
        y = np.arange(rows) % CLASSES
        x = random.integers(0, 200, size=(rows, 3, 16, 16))
        for row, label in enumerate(y):
            top, left = 8 * (label // 2), 8 * (label % 2)
            x[row, :, top : top + 8, left : left + 8] += 40
        return x.astype(np.uint8), y.astype(np.int64)

    return Data(*draw(20), *draw(8), classes=CLASSES)


def convolutional(*_: object) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout2d(),
        nn.Conv2d(4, 8, 3, stride=2),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, CLASSES),
    )


def transformer(*_: object) -> nn.Module:
    network = VisionTransformer(
        image_size=16,
        patch_size=4,
        num_layers=2,
        num_heads=2,
        hidden_dim=16,
        mlp_dim=32,
        dropout=0.1,
        num_classes=CLASSES,
    )
    nn.init.normal_(network.heads.head.weight, std=0.1)  # it starts at zero, and would hide much
    return network


class SqueezeAndGate(nn.Module):
    """Nobody's standard layer: channels gated by what they are on average."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels, 1, 1))
        self.gate = nn.Linear(channels, channels)
        self.register_buffer("seen", torch.zeros(()))
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen.add_(1)
        gate = torch.sigmoid(self.gate(x.mean((2, 3))))
        return x * self.dropout(gate)[:, :, None, None] * self.scale


def own(*_: object) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 4, stride=4),
        SqueezeAndGate(6),
        nn.GELU(),
        nn.Flatten(),
        nn.LayerNorm(96),
        nn.Linear(96, CLASSES),
    )


class Encoder(nn.Module):
    """A layer of torch's own transformer, over patches; its attention drops weights."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        y: torch.Tensor = self.head(self.layer(tokens).mean(1))
        return y


def of(builder: Callable[..., nn.Module], **settings: object) -> Callable[..., nn.Module]:
    """A built-in model with these settings."""
    return lambda _, input_shape, outputs: builder(settings, input_shape, outputs)


SELF_NORMALIZING = {"hidden": [16, 16], "norm": "none", "activation": "selu"}
MODELS = {
    "own convolutions": (convolutional, 1),
    "own gates": (own, 1),
    "torchvision's transformer": (transformer, 7),
    "torch's transformer layer": (lambda *_: Encoder(), 4),
    "mlp": (of(built_in.mlp, hidden=[16, 16]), 2),
    "mlp, groups": (of(built_in.mlp, hidden=[16], norm="group", activation="silu"), 1),
    "mlp, selu": (of(built_in.mlp, **SELF_NORMALIZING), 2),
    "linear": (of(built_in.linear), 0),
    "cnn": (of(built_in.cnn, channels=[4, 8], norm="group", groups=2), 3),
    "vit_tiny": (of(built_in.vit_tiny, width=16, heads=2, depth=2), 9),
    "tabular_resnet": (of(built_in.tabular_resnet, width=16), 4),
    "resnet18": (of(torchvision, architecture="resnet18"), 1),
    "mobilenet_v3_small": (of(torchvision, architecture="mobilenet_v3_small"), 1),
    "shufflenet_v2_x0_5": (of(torchvision, architecture="shufflenet_v2_x0_5"), 1),
}
"""Models, and how many dropout sites each has."""

SLOW = ("resnet18", "mobilenet_v3_small")
"""They also pool images channels last to a single pixel, for which ``vmap`` takes a loop."""

NO_FALLBACK = pytest.mark.filterwarnings("error:There is a performance drop")


@pytest.fixture
def build(make_engine, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Engine]:
    monkeypatch.setattr("tests.unit.training.conftest.blobs", small_images)
    return lambda name, max_epochs=EPOCHS: make_engine(
        model=MODELS[name][0], batch_size=8, max_epochs=max_epochs
    )


@pytest.mark.parametrize("name", MODELS)
def test_its_lanes_are_one_batched_model_and_its_dropouts_are_sites(build, name):
    with structlog.testing.capture_logs() as lines:
        engine = build(name)
    assert engine.model.vectorized
    assert lines == []
    assert len(engine.model.sites) == MODELS[name][1]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in SLOW else NO_FALLBACK)
        for name in sorted(MODELS)
    ],
)
def test_a_trial_is_the_same_alone_in_company_and_lane_by_lane(build, name):
    alone, company, looped = (build(name) for _ in range(3))
    alone.join([trial(0, **STRONG)])
    expected = losses(train(alone, EPOCHS)[0])
    company.join([trial(1), trial(2, dropout=0.7), trial(0, **STRONG)])
    torch.testing.assert_close(losses(train(company, EPOCHS)[0]), expected, rtol=1e-8, atol=0)
    for step in list(looped._epochs._replicas.queue):
        step._model._over_lanes = loop
    looped.join([trial(1), trial(0, **STRONG)])
    torch.testing.assert_close(losses(train(looped, EPOCHS)[0]), expected, rtol=1e-8, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["own convolutions", "torchvision's transformer"])
def test_a_trial_is_the_same_refilled_and_resumed_elsewhere_over_a_whole_training(
    build, monkeypatch, name
):
    """With steps that are recorded on the way."""
    monkeypatch.setattr(compiling, "CALLS_BEFORE_RECORDING", 4)
    epochs, moved_after = 12, 5
    alone, refilled, resumed = (build(name, max_epochs=epochs) for _ in range(3))
    alone.join([trial(0, **STRONG)])
    expected = losses(train(alone, epochs)[0])
    refilled.join([trial(1), trial(2, dropout=0.7)])
    train(refilled, 3)
    refilled.leave([1])
    refilled.join([trial(0, **STRONG)])
    curve = train(refilled, moved_after)[0]
    resumed.join([trial(3, weight_decay=0.1)])
    train(resumed, 1)
    resumed.join([trial(0, **STRONG)], {0: refilled.checkpoint([0])[0]})
    curve += train(resumed, epochs - moved_after)[0]
    torch.testing.assert_close(losses(curve), expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_penalized_and_biases_and_norms_are_spared(build, name):
    engine = build(name)
    module = engine.model._model
    norms = (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)
    for path in engine.model.penalized:
        owner, _, leaf = path.rpartition(".")
        assert leaf != "bias"
        assert not isinstance(module.get_submodule(owner), norms)
    assert {path for path in engine.model.spared if path.endswith("bias")}
