from pathlib import Path

import numpy as np
import pytest

from regtune.task import DatasetLoader, Storage
from worker.tasks.bundled import breast_cancer, diabetes, wine


@pytest.mark.parametrize(
    ("load", "rows", "features", "classes"),
    [(breast_cancer, 569, 30, 2), (wine, 178, 13, 3), (diabetes, 442, 10, None)],
)
def test_the_bundled_tables_are_split_the_same_every_time(
    load: DatasetLoader, rows: int, features: int, classes: int | None
):
    data, again = (load(Storage(Path("unused"))) for _ in range(2))
    assert data.content_hash() == again.content_hash()
    assert data.classes == classes
    assert len(data.train_y) + len(data.test_y) == rows
    assert data.train_x.shape == (len(data.train_y), features)
    if classes:
        shares = [np.bincount(y) / len(y) for y in (data.train_y, data.test_y)]
        np.testing.assert_allclose(*shares, atol=0.02)
    else:
        assert data.train_y.std() > 70  # as they are, in their own unit
