"""L1 and L2 at once, against their closed form and scikit-learn's own."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.linear_model import ElasticNet
from torch import nn

from regtune.task import Data, Storage
from tests.unit.training.conftest import losses, train, trial
from worker.training import regularizers
from worker.training.engine import Engine

KNOBS = frozenset({"weight_decay", "l1_lambda"})
STRENGTHS = [(0.0, 0.0), (0.5, 0.1), (0.1, 0.5), (2.0, 0.02), (0.0, 0.4), (1.0, 0.0)]
"""λ₂ and λ₁ of each lane."""


def sparse_regression(storage: Storage) -> Data:
    """A target that two of six features make, and noise."""
    random = np.random.default_rng(0)
    x = random.normal(size=(60, 6)).astype(np.float32)
    y = 2 * x[:, 0] - 0.7 * x[:, 3] + 0.5 * random.normal(size=60) + 1
    return Data(x, y.astype(np.float32), x[:20], y[:20].astype(np.float32), classes=None)


def linear(settings: object, input_shape: tuple[int, ...], outputs: int) -> nn.Module:
    return nn.Linear(*input_shape, outputs)


@pytest.fixture
def build(make_engine, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Engine]:
    monkeypatch.setattr("tests.unit.training.conftest.blobs", sparse_regression)
    plain = {"optimizer": "sgd", "momentum": 0.0, "learning_rate": 0.1, "batch_size": 1000}
    return lambda **training: make_engine(
        model=linear, settings={"depth": 1}, max_epochs=2000, knobs=KNOBS, **plain | training
    )


@pytest.mark.parametrize("decay", ["coupled", "decoupled"])
def test_a_linear_model_ends_where_scikit_learn_s_elastic_net_does(build, decay):
    """Ours is the mean squared error, scikit-learn's the half of it."""
    engine = build(decay=decay)
    engine.join(
        [
            trial(k, weight_decay=l2, l1_lambda=l1, learning_rate=0.1)
            for k, (l2, l1) in enumerate(STRENGTHS)
        ]
    )
    for _ in range(400):
        engine.train_epoch()
    rows = engine._epochs._validation.rows
    training = engine._epochs._splits[0].training
    for lane, (l2, l1) in enumerate(STRENGTHS):
        alpha, ratio = (l1 + l2) / 2, l1 / (l1 + l2) if l1 + l2 else 0.0
        expected = ElasticNet(alpha=alpha or 1e-15, l1_ratio=ratio, tol=1e-12, max_iter=100_000)
        expected.fit(rows.x[training].numpy(), rows.y[training].numpy())
        weights, bias = (engine._tensors.parameters[n][lane] for n in ("weight", "bias"))
        np.testing.assert_allclose(weights[0].numpy(), expected.coef_, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(bias.item(), expected.intercept_, rtol=1e-4, atol=1e-6)
        assert torch.equal(weights[0] == 0, torch.from_numpy(expected.coef_ == 0))


def test_its_gradient_and_proximal_step_is_the_closed_form():
    """One step of w²/2·λ₂ + λ₁·|w| from v: soft((1 − η·λ₂)·v − η·g, η·λ₁)."""
    v, g = torch.randn(2, 3, 9, dtype=torch.float64)
    rate = 0.3
    l2, l1 = (
        torch.tensor(s, dtype=torch.float64)[:, None] for s in ([0.0, 0.5, 2.0], [0.4, 1.0, 0.0])
    )
    w, gradient = v.clone(), g.clone()
    regularizers.add_coupled_decay_(gradient, w, l2)
    w.sub_(gradient, alpha=rate)
    regularizers.soft_threshold_(w, rate * l1)
    moved = (1 - rate * l2) * v - rate * g
    expected = moved.sign() * (moved.abs() - rate * l1).clamp(min=0)
    torch.testing.assert_close(w, expected)


def test_both_forms_of_decay_are_one_for_plain_sgd_and_differ_with_momentum(make_engine):
    for momentum, same in ((0.0, True), (0.9, False)):
        curves = []
        for decay in ("coupled", "decoupled"):
            engine = make_engine(optimizer="sgd", momentum=momentum, decay=decay)
            engine.join([trial(0, weight_decay=0.5, l1_lambda=0.01)])
            curves.append(losses(train(engine, 5)[0]))
        assert torch.allclose(*curves, rtol=1e-9) == same
