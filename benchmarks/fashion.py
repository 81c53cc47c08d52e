"""Fashion-MNIST as a task of one's own: all rows split anew, and a perceptron."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.model_selection import train_test_split
from torch import nn

from regtune.task import Data, Storage
from worker.tasks.images import fashion_mnist
from worker.tasks.models.perceptron import mlp

TEST_SHARE = 0.2


class FashionSplitAnew:
    """All 70 000 rows, of which a stratified fifth is the test set."""

    def __init__(self, hidden: Sequence[int] = (512,) * 9, norm: str = "none") -> None:
        self._settings: dict[str, Any] = {"hidden": list(hidden), "norm": norm}

    def data(self, storage: Storage) -> Data:
        """Return the rows; the split is the same each time."""
        whole = fashion_mnist(storage)
        x = np.concatenate([np.asarray(whole.train_x), np.asarray(whole.test_x)])
        y = np.concatenate([whole.train_y, whole.test_y])
        train_x, test_x, train_y, test_y = train_test_split(
            x, y, test_size=TEST_SHARE, stratify=y, random_state=0
        )
        return Data(train_x, train_y, test_x, test_y, classes=whole.classes)

    def model(self, input_shape: tuple[int, ...], outputs: int) -> nn.Module:
        """Return a perceptron without dropout rates of its own."""
        return mlp(self._settings, input_shape, outputs)
