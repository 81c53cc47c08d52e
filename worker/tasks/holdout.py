"""Test rows for data that come without any, and by what rows are stratified in any split."""

from math import ceil
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

    They are stratified by class. Raises InvalidData for too few rows.
    """
    try:
        training, tested = train_test_split(
            np.arange(len(y)),
            test_size=fraction,
            stratify=strata(y, 2, fraction) if classes else None,
            random_state=TEST_SEED,
        )
    except ValueError as error:
        raise InvalidData(
            f"the rows cannot be split as task.data.test_fraction says: {error}"
        ) from None
    return np.sort(training), np.sort(tested)


def strata(
    labels: NDArray[np.int64], parts: int, fraction: float | None = None
) -> NDArray[np.int64]:
    """Return by what rows are stratified: the class, if it has a row for each part.

    Rarer classes are one stratum together, and if that is too small it joins the largest class.
    ``fraction`` is the share of one of two parts, the smaller of which cannot have a row of each
    stratum if there are more of them than rows: then the smallest classes are one as well.
    """
    counts = np.bincount(labels)
    rare = (counts < parts) & (counts > 0)
    if fraction is not None:
        drawn = ceil(fraction * len(labels))
        most = min(drawn, len(labels) - drawn)
        if np.count_nonzero(counts >= parts) + rare.any() > most:
            rare = counts > 0
            rare[np.argsort(-counts, kind="stable")[: max(0, most - 1)]] = False
    if not rare.any():
        return labels
    together = len(counts) if counts[rare].sum() >= parts else counts.argmax()
    return np.where(rare[labels], together, labels)
