"""Test rows for data that come without any."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import train_test_split

from regtune.errors import InvalidData

TEST_SEED = 0


def hold_out(
    y: NDArray[Any], classes: int | None, fraction: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the numbers of training and test rows, ascending; the same for every study.

    They are stratified by class, if each class has two rows. Raises InvalidData for too few rows.
    """
    strata = y if classes and np.bincount(y).min() > 1 else None
    try:
        training, tested = train_test_split(
            np.arange(len(y)), test_size=fraction, stratify=strata, random_state=TEST_SEED
        )
    except ValueError as error:
        raise InvalidData(f"the rows cannot be split: {error}") from None
    return np.sort(training), np.sort(tested)
