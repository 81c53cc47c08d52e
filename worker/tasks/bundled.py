"""Small tables that ship inside scikit-learn; they need no files."""

from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine
from sklearn.model_selection import train_test_split

from regtune.task import Data, Storage

TEST_FRACTION = 0.2
SPLIT_SEED = 0


def breast_cancer(storage: Storage) -> Data:
    """Return 569 tumours with 30 measures each, malignant or benign.

    Source: W. Wolberg, O. Mangasarian, N. Street and W. Street, Breast Cancer Wisconsin
    (Diagnostic), UCI Machine Learning Repository (1993).
    """
    return _data(load_breast_cancer, classes=2)


def wine(storage: Storage) -> Data:
    """Return 178 wines with 13 measures each, from three growers.

    Source: S. Aeberhard and M. Forina, Wine, UCI Machine Learning Repository (1992).
    """
    return _data(load_wine, classes=3)


def diabetes(storage: Storage) -> Data:
    """Return 442 patients with 10 measures each, and how far their diabetes went in a year.

    A regression. Source: B. Efron, T. Hastie, I. Johnstone and R. Tibshirani, Least Angle
    Regression, Annals of Statistics 32 (2004).
    """
    return _data(load_diabetes, classes=None)


def _data(load: Callable[..., Any], classes: int | None) -> Data:
    """Take a fixed fifth of the rows for the test, stratified where there are classes."""
    x, y = load(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        x.astype(np.float32),
        y.astype(np.int64 if classes else np.float32),
        test_size=TEST_FRACTION,
        stratify=y if classes else None,
        random_state=SPLIT_SEED,
    )
    return Data(train_x, train_y, test_x, test_y, classes)
