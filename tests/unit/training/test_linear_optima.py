"""A linear layer that is trained to the end is scikit-learn's linear model of the same strength.

How the strengths compare is worked out in docs/tasks.md.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import ElasticNet, Lasso, LogisticRegression, Ridge

from regtune.spec import SyntheticSettings, Validation
from regtune.task import Data, Storage
from tests.unit.training.conftest import train, trial
from worker.tasks.models import linear
from worker.tasks.synthetic import best_decay, synthetic
from worker.training.engine import Engine

FEATURES = 6
RATE = 0.1
OF_CLASSES = {"learning_rate": 1.0}


def draw(kind: str, classes: int = 3) -> Callable[[Storage], Data]:
    """Correlated features, of which the target depends on two."""
    random = np.random.default_rng(0)

    def rows(count: int) -> tuple[np.ndarray, np.ndarray]:
        x = random.normal(size=(count, FEATURES)) + 0.7 * random.normal(size=(count, 1))
        signal = 2 * x[:, 0] - x[:, 1] + random.normal(size=count)
        if kind == "regression":
            return x.astype(np.float32), (5 + 3 * signal).astype(np.float32)
        return x.astype(np.float32), np.digitize(signal, np.arange(classes - 1) * 1.5)

    data = Data(*rows(100), *rows(20), classes=None if kind == "regression" else classes)
    return lambda storage: data


@pytest.fixture
def build(make_engine, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Engine]:
    def with_data(data: Callable[[Storage], Data], **training: Any) -> Engine:
        monkeypatch.setattr("tests.unit.training.conftest.blobs", data)
        return make_engine(
            model=linear,
            settings={},
            knobs=frozenset({"weight_decay", "l1_lambda"}),
            **{
                "optimizer": "sgd",
                "momentum": 0.0,
                "learning_rate": RATE,
                "batch_size": 1000,
                "max_epochs": 10_000,
                **training,
            },
        )

    return with_data


def trained(engine: Engine, strengths: list[dict[str, float]], epochs: int = 400) -> Any:
    """Weights ``(K, outputs, features)`` and biases ``(K, outputs)`` of trials at their optima."""
    rate = engine._training.learning_rate
    engine.join([trial(key, learning_rate=rate, **own) for key, own in enumerate(strengths)])
    train(engine, epochs)
    parameters = engine._tensors.parameters
    return parameters["1.weight"].numpy(), parameters["1.bias"].numpy()


def seen(engine: Engine) -> tuple[np.ndarray, np.ndarray]:
    """The rows that are trained on, as the engine standardizes them."""
    rows = engine._epochs._validation.rows
    training = engine._epochs._splits[0].training
    return rows.x[training].numpy(), rows.y[training].numpy()


def test_with_weight_decay_it_is_ridge(build):
    engine = build(draw("regression"))
    x, y = seen(engine)
    alphas = [0.8, 8.0, 80.0]
    weights, biases = trained(engine, [{"weight_decay": 2 * a / len(y)} for a in alphas])
    for lane, alpha in enumerate(alphas):
        expected = Ridge(alpha=alpha, tol=1e-12).fit(x, y)
        np.testing.assert_allclose(weights[lane, 0], expected.coef_, atol=1e-8)
        np.testing.assert_allclose(biases[lane, 0], expected.intercept_, atol=1e-8)
    assert np.ptp(weights[:, 0, 0]) > 0.1


def test_momentum_leads_to_the_same_ridge(build):
    engine = build(draw("regression"), momentum=0.9)
    x, y = seen(engine)
    weights, _ = trained(engine, [{"weight_decay": 2 * 8 / len(y)}])
    np.testing.assert_allclose(weights[0, 0], Ridge(alpha=8, tol=1e-12).fit(x, y).coef_, atol=1e-8)


def test_with_l1_it_is_the_lasso_zeros_included(build):
    engine = build(draw("regression"))
    x, y = seen(engine)
    alphas = [0.02, 0.2]
    weights, _ = trained(engine, [{"l1_lambda": 2 * alpha} for alpha in alphas])
    zeros = []
    for lane, alpha in enumerate(alphas):
        expected = Lasso(alpha=alpha, tol=1e-14, max_iter=10**6).fit(x, y)
        np.testing.assert_allclose(weights[lane, 0], expected.coef_, atol=1e-7)
        np.testing.assert_array_equal(weights[lane, 0] == 0, expected.coef_ == 0)
        zeros.append(np.count_nonzero(expected.coef_ == 0))
    assert zeros[1] >= 2


def test_with_both_it_is_the_elastic_net(build):
    engine = build(draw("regression"))
    x, y = seen(engine)
    alpha, share = 0.2, 0.4
    weights, _ = trained(
        engine, [{"l1_lambda": 2 * alpha * share, "weight_decay": 2 * alpha * (1 - share)}]
    )
    expected = ElasticNet(alpha=alpha, l1_ratio=share, tol=1e-14, max_iter=10**6).fit(x, y)
    np.testing.assert_allclose(weights[0, 0], expected.coef_, atol=1e-7)


def test_sgd_with_momentum_makes_the_proximal_l1_weaker_by_its_share_of_new_gradient(build):
    """Behind a step of η·gradient/(1 − β) in the long run, the threshold is still η·λ₁."""
    engine = build(draw("regression"), momentum=0.5)
    x, y = seen(engine)
    weights, _ = trained(engine, [{"l1_lambda": 2 * 0.2}])
    expected = Lasso(alpha=0.2 * (1 - 0.5), tol=1e-14, max_iter=10**6).fit(x, y)
    np.testing.assert_allclose(weights[0, 0], expected.coef_, atol=1e-7)


@pytest.mark.parametrize("classes", [2, 3])
def test_of_classes_it_is_the_logistic_regression(build, classes: int):
    """Two classes have two rows of weights here, and one there, which is their difference."""
    engine = build(draw("classification", classes), momentum=0.5, **OF_CLASSES)
    x, y = seen(engine)
    inverse = [0.1, 1.0]
    pairs = 2 if classes == 2 else 1
    weights, _ = trained(engine, [{"weight_decay": pairs / (c * len(y))} for c in inverse], 800)
    for lane, c in enumerate(inverse):
        model = LogisticRegression(C=c, solver="newton-cholesky", tol=1e-12)
        expected = model.fit(x, y).coef_
        ours = weights[lane] if classes > 2 else weights[lane, 1:] - weights[lane, :1]
        np.testing.assert_allclose(ours, expected, atol=1e-6)


@pytest.mark.parametrize("classes", [2, 3])
def test_of_classes_with_l1_it_is_the_sparse_logistic_regression(build, classes: int):
    engine = build(draw("classification", classes), **OF_CLASSES)
    x, y = seen(engine)
    c = 0.3
    weights, _ = trained(engine, [{"l1_lambda": 1 / (c * len(y))}])
    expected = (
        LogisticRegression(C=c, l1_ratio=1, solver="saga", tol=1e-12, max_iter=10**5)
        .fit(x, y)
        .coef_
    )
    ours = weights[0] if classes > 2 else weights[0, 1:] - weights[0, :1]
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    assert np.count_nonzero(expected == 0) >= 1
    if classes > 2:
        np.testing.assert_array_equal(ours == 0, expected == 0)


@pytest.mark.slow
def test_of_synthetic_rows_the_known_decay_is_the_best_of_the_trials_on_average(build):
    asked = SyntheticSettings(rows=160, test_rows=1, features=40)
    factors, total = [1 / 16, 1 / 4, 1, 4, 16], np.zeros(5)
    for seed in range(6):
        engine = build(
            lambda storage, seed=seed: synthetic(
                storage, rows=asked.rows, test_rows=1, features=asked.features, seed=seed
            ),
            validation=Validation(fraction=0.5),
            learning_rate=0.05,
        )
        best = best_decay(asked, engine.training_rows)
        engine.join(
            [
                trial(key, learning_rate=0.05, weight_decay=factor * best)
                for key, factor in enumerate(factors)
            ]
        )
        curves = train(engine, 100)
        total += [curves[key][-1].validation_loss for key in range(len(factors))]
    assert total.argmin() == factors.index(1)
    assert np.all(total[[0, -1]] > 1.02 * total.min())
