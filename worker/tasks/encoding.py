"""From the columns of a table to numbers, fitted on the rows that one split trains on.

Numbers: missing ones become the median, then all are standardized. Categories: one-hot, a missing
value as one more category. A category that the training rows do not have, or that is not among the
most frequent of its column, counts as "other" where the column has such a group, and otherwise as
none at all. The work is scikit-learn's.
"""

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from regtune.task import Columns
from worker.errors import NoRoom
from worker.training.capacity import free_bytes, readable

MOST_CATEGORIES = 100
"""Columns that a categorical one becomes at most; the last one is for all rarer categories."""

Floats = NDArray[np.float32]


def encode(
    train: Columns, test: Columns, trained_on: Sequence[NDArray[np.int64]]
) -> tuple[Floats, Floats]:
    """Return training and test rows as each of S splits encodes them: ``(S, rows, features)``.

    ``trained_on`` are the numbers of the rows that each trains on. Splits that know other
    categories still have the same features: one that a split does not know is zero there. Raises
    NoRoom if the machine's memory has no room for that.
    """
    encodings = [_Encoding(train, rows) for rows in trained_on]
    places = {
        name: place
        for place, name in enumerate(dict.fromkeys(n for own in encodings for n in own.names))
    }
    _check_room(len(encodings), len(train) + len(test), len(places))
    # One large copy of a table is made at a time, and written to where it stays.
    encoded = []
    for rows in (train, test):
        whole = np.zeros((len(encodings), len(rows), len(places)), np.float32)
        for encoding, part in zip(encodings, whole, strict=True):
            encoding.write(rows, part, [places[name] for name in encoding.names])
        encoded.append(whole)
    return encoded[0], encoded[1]


def _check_room(splits: int, rows: int, features: int) -> None:
    needed, free = 4 * splits * rows * features, free_bytes(torch.device("cpu"))
    if needed > free:
        raise NoRoom(
            f"{rows} rows of {features} features take {readable(needed)} once they are encoded for "
            f"{splits} folds and repeats, but {readable(free)} of memory are free; take fewer of "
            "them, or leave out columns (task.data.ignore)"
        )


class _Encoding:
    """What the training rows of one split say of the columns; ``names`` are those of its features.

    The numbers come first.
    """

    def __init__(self, train: Columns, trained_on: NDArray[np.int64]) -> None:
        self._numbers = train.numbers.shape[1]
        self.names = [f"number {column}" for column in range(self._numbers)]
        self._one_hot: OneHotEncoder | None = None
        if self._numbers:
            self._scale = make_pipeline(
                SimpleImputer(strategy="median", keep_empty_features=True), StandardScaler()
            )
            self._scale.fit(train.numbers[trained_on])
        if train.categories.shape[1]:
            self._one_hot = OneHotEncoder(
                handle_unknown="infrequent_if_exist",
                max_categories=MOST_CATEGORIES,
                sparse_output=False,
                dtype=np.float32,
            )
            self._one_hot.fit(train.categories[trained_on])
            self.names += list(self._one_hot.get_feature_names_out())

    def write(self, rows: Columns, to: Floats, places: Sequence[int]) -> None:
        """Write rows as this split encodes them to ``(rows, features)``, each to its place."""
        if self._numbers:
            to[:, : self._numbers] = self._scale.transform(rows.numbers)
        if self._one_hot:
            to[:, places[self._numbers :]] = _silently(self._one_hot, rows.categories)


def _silently(one_hot: OneHotEncoder, categories: NDArray[np.int32]) -> Floats:
    """Encode, without the warning that some categories are unknown: validation rows may be."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found unknown categories")
        encoded: Floats = one_hot.transform(categories)
    return encoded
