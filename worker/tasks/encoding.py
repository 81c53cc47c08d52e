"""From the columns of a table to numbers, fitted on the rows that one split trains on.

Numbers: missing ones become the median, then all are standardized. Categories: one-hot, a missing
value as one more category. A category that the training rows do not have, or that is not among the
most frequent of its column, counts as "other" where the column has such a group, and otherwise as
none at all. The work is scikit-learn's.
"""

import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from regtune.task import Columns

MOST_CATEGORIES = 100
"""Columns that a categorical one becomes at most; the last one is for all rarer categories."""

Floats = NDArray[np.float32]


def encode(
    train: Columns, test: Columns, trained_on: Sequence[NDArray[np.int64]]
) -> tuple[Floats, Floats]:
    """Return training and test rows as each of S splits encodes them: ``(S, rows, features)``.

    ``trained_on`` are the numbers of the rows that each trains on. Splits that know other
    categories still have the same features: one that a split does not know is zero there.
    """
    encoded = [_encoded(train, test, rows) for rows in trained_on]
    names = list(dict.fromkeys(name for own, _, _ in encoded for name in own))
    aligned = [
        np.zeros((len(encoded), len(rows), len(names)), np.float32) for rows in (train, test)
    ]
    for split, (own, *parts) in enumerate(encoded):
        places = [names.index(name) for name in own]
        for whole, part in zip(aligned, parts, strict=True):
            whole[split][:, places] = part
    return aligned[0], aligned[1]


def _encoded(
    train: Columns, test: Columns, trained_on: NDArray[np.int64]
) -> tuple[list[str], Floats, Floats]:
    """Return the features' names, and training and test rows as one split encodes them."""
    names: list[str] = []
    parts: list[list[Floats]] = [[], []]
    if train.numbers.shape[1]:
        scale = make_pipeline(
            SimpleImputer(strategy="median", keep_empty_features=True), StandardScaler()
        )
        scale.fit(train.numbers[trained_on])
        names += [f"number {column}" for column in range(train.numbers.shape[1])]
        for part, rows in zip(parts, (train, test), strict=True):
            part.append(scale.transform(rows.numbers))
    if train.categories.shape[1]:
        one_hot = OneHotEncoder(
            handle_unknown="infrequent_if_exist",
            max_categories=MOST_CATEGORIES,
            sparse_output=False,
            dtype=np.float32,
        )
        one_hot.fit(train.categories[trained_on])
        names += list(one_hot.get_feature_names_out())
        for part, rows in zip(parts, (train, test), strict=True):
            part.append(_silently(one_hot, rows.categories))
    return names, np.hstack(parts[0]), np.hstack(parts[1])


def _silently(one_hot: OneHotEncoder, categories: NDArray[np.int32]) -> Floats:
    """Encode, without the warning that some categories are unknown: validation rows may be."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found unknown categories")
        encoded: Floats = one_hot.transform(categories)
    return encoded
