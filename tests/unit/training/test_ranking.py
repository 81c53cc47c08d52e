"""The area under the ROC curve of whole epochs, members of their own rows included."""

from collections.abc import Callable

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from regtune.errors import InvalidData
from regtune.spec import Validation
from regtune.task import Data, Storage
from tests.unit.training.conftest import trial
from worker.tasks.models import linear
from worker.training.engine import Engine

KEYS = 3


def two_classes(storage: Storage) -> Data:
    random = np.random.default_rng(0)

    def rows(count: int) -> tuple[np.ndarray, np.ndarray]:
        x = random.normal(size=(count, 4)).astype(np.float32)
        return x, (x[:, 0] + random.normal(size=count) > 0.7).astype(np.int64)

    return Data(*rows(61), *rows(40), classes=2)


@pytest.fixture
def build(make_engine, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Engine]:
    def with_rows(data: Callable[[Storage], Data], validation: Validation) -> Engine:
        monkeypatch.setattr("tests.unit.training.conftest.blobs", data)
        return make_engine(
            model=linear, settings={"score": "auroc"}, validation=validation, max_lanes=16
        )

    return with_rows


@pytest.mark.parametrize("rows_at_once", [1, 7])
@pytest.mark.parametrize("validation", [Validation(), Validation(folds=3)])
def test_it_is_that_of_all_rows_whatever_batches_they_come_in(
    build, validation: Validation, rows_at_once: int
):
    engine = build(two_classes, validation)
    engine._epochs._evaluation_rows = rows_at_once
    engine.join([trial(key, weight_decay=30 * key) for key in range(KEYS)])
    for _ in range(10):  # so that what measures is recorded
        epochs = engine.train_epoch()
    weights, biases = (
        engine._tensors.parameters[f"1.{name}"].numpy() for name in ("weight", "bias")
    )
    rows, splits = engine._epochs._validation.rows, engine._epochs._splits
    for key, epoch in enumerate(epochs):
        found = []
        for member, split in enumerate(splits):
            lane = key * len(splits) + member
            x = rows.x[split.validation] * split.scale + split.shift
            logits = x.numpy() @ weights[lane].T + biases[lane]
            found.append(roc_auc_score(rows.y[split.validation], logits[:, 1] - logits[:, 0]))
        assert epoch.validation_score == pytest.approx(np.mean(found), abs=1e-12)
    assert len({epoch.validation_score for epoch in epochs}) > 1
    assert engine.score == "auroc"
    assert 0.5 < engine.results([0])[0].test_score < 1


def test_rows_of_one_class_have_none_to_rank(build):
    data = two_classes(Storage(None))
    of_one = Data(data.train_x, data.train_y, data.test_x, np.zeros_like(data.test_y), classes=2)
    with pytest.raises(InvalidData, match="auroc compares two classes, but the test rows have one"):
        build(lambda storage: of_one, Validation())
