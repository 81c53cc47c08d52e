from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge

from regtune.spec import SyntheticSettings
from regtune.task import Data, Storage
from worker.errors import NoRoom
from worker.tasks import synthetic as synthetic_module
from worker.tasks.synthetic import best_decay, synthetic


def load(**settings: Any) -> Data:
    return synthetic(Storage(Path("unused")), **settings)


def test_the_same_seed_draws_the_same_rows():
    assert load().content_hash() == load(seed=0).content_hash() != load(seed=1).content_hash()
    data = load(rows=30, test_rows=20, features=7)
    assert (data.train_x.shape, data.test_x.shape) == ((30, 7), (20, 7))
    assert (data.train_x.dtype, data.train_y.dtype, data.classes) == (np.float32, np.float32, None)


def test_signal_and_noise_are_as_large_as_they_are_asked_to_be():
    quiet, loud = (
        [load(rows=20, test_rows=2000, signal=2, noise=noise, seed=s).test_y for s in range(30)]
        for noise in (0, 3)
    )
    assert np.var(quiet) == pytest.approx(4, rel=0.1)
    assert np.var(loud) == pytest.approx(4 + 9, rel=0.1)


def test_classes_are_drawn_from_the_softmax_of_their_logits():
    data = load(kind="classification", classes=3, rows=20_000, features=2, signal=2)
    assert (data.train_y.dtype, data.classes) == (np.int64, 3)
    fitted = LogisticRegression(C=np.inf).fit(data.train_x, data.train_y)
    share = fitted.predict_proba(data.test_x).max(1).mean()
    assert fitted.score(data.test_x, data.test_y) == pytest.approx(share, abs=0.03)


FACTORS = [1 / 16, 1 / 4, 1, 4, 16]


def test_no_other_ridge_is_better_than_the_best_on_average():
    asked = SyntheticSettings(rows=80, test_rows=500, features=50, noise=2)
    best = best_decay(asked, asked.rows) * asked.rows / 2  # as scikit-learn measures it
    losses = np.zeros(len(FACTORS))
    for seed in range(40):
        data = load(**{**asked.model_dump(), "seed": seed})
        for place, factor in enumerate(FACTORS):
            ridge = Ridge(alpha=factor * best, fit_intercept=False).fit(data.train_x, data.train_y)
            losses[place] += np.mean((ridge.predict(data.test_x) - data.test_y) ** 2)
    assert losses.argmin() == FACTORS.index(1)
    assert np.all(losses[[0, -1]] > 1.02 * losses.min())


def test_of_classes_the_most_probable_weights_are_near_the_best_on_average():
    asked = SyntheticSettings(
        kind="classification", classes=3, rows=120, test_rows=500, features=20, signal=1.5
    )
    best = 1 / (best_decay(asked, asked.rows) * asked.rows)  # as scikit-learn measures it
    losses = np.zeros(len(FACTORS))
    for seed in range(20):
        data = load(**{**asked.model_dump(exclude={"noise"}), "seed": seed})
        for place, factor in enumerate(FACTORS):
            model = LogisticRegression(C=best / factor, fit_intercept=False)
            chances = model.fit(data.train_x, data.train_y).predict_proba(data.test_x)
            losses[place] -= np.log(chances[np.arange(len(data.test_y)), data.test_y]).mean()
    assert losses.argmin() == FACTORS.index(1)


def test_rows_that_the_memory_cannot_hold_are_not_drawn(monkeypatch):
    monkeypatch.setattr(synthetic_module, "free_bytes", lambda device: 10_000)
    with pytest.raises(NoRoom, match=r"250 and 2000 rows of 50 features take .* 10\.0 kB are free"):
        load()
