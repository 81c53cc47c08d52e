"""From a data set to tensors: which rows train and which validate, and how inputs are standardized.

A trial may be trained several times, as *members* with other rows and other noise: on each fold of
a cross-validation, and again with another seed. A member's rows are its split.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.model_selection import KFold, StratifiedKFold, train_test_split
from torch import Tensor

from regtune.errors import InvalidData
from regtune.spec import Validation
from regtune.task import Columns, Data
from worker.tasks.encoding import encode
from worker.tasks.holdout import strata
from worker.tasks.rows import Rows, Standardization, blocks, statistics
from worker.training.noise import member_seed

RowNumbers = NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """Which rows one member of a trial trains on, validates on and is tested on, by number.

    Steps get inputs as the first split standardizes them; ``scale`` and ``shift``, of the inputs'
    type and broadcast over rows, turn them into what this one would have made of them. A table is
    stored once for each split instead, because encodings differ by more than that.
    """

    training: RowNumbers
    validation: RowNumbers
    test: RowNumbers
    scale: Tensor
    shift: Tensor

    def to(self, device: torch.device) -> "Split":
        """Return the same with scale and shift on ``device``."""
        return replace(self, scale=self.scale.to(device), shift=self.shift.to(device))


@dataclass(frozen=True)
class Prepared:
    """The rows of one study, its splits, and the rows that are looked at once at the end.

    Rows are on the host until they are put ``on`` a device. ``outputs`` is how many numbers a model
    returns for a row. Targets of a regression are standardized by the first split's training rows,
    ``unit`` being their standard deviation there. ``class_weights`` are those that make all classes
    weigh the same in those rows, 1 on average.
    """

    rows: Rows
    splits: tuple[Split, ...]
    test: Rows
    outputs: int
    unit: float = 1.0
    class_weights: Tensor | None = None

    def on(
        self,
        device: torch.device,
        memory_format: torch.memory_format = torch.contiguous_format,
        *,
        keep_bytes: bool = False,
    ) -> "Prepared":
        """Return the same with all rows on ``device``, see ``Rows.on``."""
        rows, test = (
            each.on(device, memory_format, keep_bytes=keep_bytes) for each in (self.rows, self.test)
        )
        return replace(self, rows=rows, test=test)


def prepare(
    data: Data,
    validation: Validation,
    seed: int,
    dtype: torch.dtype,
    *,
    own_loss: bool = False,
) -> Prepared:
    """Split the training rows and find out how inputs are standardized to numbers of ``dtype``.

    Splits are stratified by class and a pure function of ``seed``, so every trial of a study sees
    the same rows. Mean and standard deviation come from the rows trained on alone: one pair for
    each feature of a table ``(N, features)``, one for each channel of images
    ``(N, channels, height, width)``. A feature that never varies is left at zero. Columns of a
    table are encoded, see ``encoding``. For an ``own_loss``, targets stay as they are. Raises
    InvalidData for what cannot be trained on.
    """
    check(data, own_loss=own_loss)
    chosen = list(_split(data, validation, seed))
    train_y, test_y, unit = data.train_y, data.test_y, 1.0
    if data.classes is None and not own_loss:
        train_y, test_y, unit = _standardize_targets(data, chosen[0][0])
    if isinstance(data.train_x, Columns) and isinstance(data.test_x, Columns):
        train_x, test_x, splits = _encode(data.train_x, data.test_x, chosen, dtype)
        copies, pending = len(splits), Standardization(dtype)
    else:
        assert isinstance(data.train_x, np.ndarray)
        assert isinstance(data.test_x, np.ndarray)
        train_x, test_x = _as_tensor(data.train_x), _as_tensor(data.test_x)
        splits, pending = _standardize(data, data.train_x, chosen, dtype)
        copies = 1

    def rows(x: Tensor, y: NDArray[Any]) -> Rows:
        targets = torch.from_numpy(np.concatenate([y] * copies))
        if data.classes is not None:
            targets = targets.long()
        elif targets.is_floating_point() or not own_loss:
            targets = targets.to(dtype)
        return Rows(x, targets, pending)

    return Prepared(
        rows=rows(train_x, train_y),
        splits=tuple(splits),
        test=rows(test_x, test_y),
        outputs=data.outputs,
        unit=unit,
        class_weights=_weights(train_y[chosen[0][0]], data.classes) if data.classes else None,
    )


def check(data: Data, *, own_loss: bool = False) -> None:
    """Raise InvalidData, with what is wrong, for a data set that nothing can be learned from."""
    if not isinstance(data, Data):
        raise InvalidData(f"data() must return a regtune.task.Data, not {type(data).__name__}")
    for name, x, y in (
        ("training", data.train_x, data.train_y),
        ("test", data.test_x, data.test_y),
    ):
        if not len(y):
            raise InvalidData(f"there are no {name} rows")
        if len(x) != len(y) or (y.ndim != 1 and not own_loss):
            raise InvalidData(
                f"the {name} inputs have {len(x)} rows, but the targets have the shape {y.shape}"
            )
        if wrong := _not_finite(y):
            raise InvalidData(f"{wrong} of {y.size} {name} targets are no numbers")
        if not isinstance(x, Columns) and (wrong := _not_finite(x)):
            raise InvalidData(f"{wrong} of {x.size} {name} inputs are no numbers")
    shapes = _row_shape(data.train_x), _row_shape(data.test_x)
    if shapes[0] != shapes[1]:
        raise InvalidData(f"training rows have the shape {shapes[0]}, test rows {shapes[1]}")
    if data.classes is None:
        if not own_loss and np.ptp(data.train_y) == 0:
            raise InvalidData(f"the target is {data.train_y[0]:g} in all training rows")
        return
    for y in (data.train_y, data.test_y):
        if not np.issubdtype(y.dtype, np.integer) or y.min() < 0 or y.max() >= data.classes:
            raise InvalidData(f"labels must be whole numbers from 0 to {data.classes - 1}")
    if len(np.unique(data.train_y)) < 2:
        raise InvalidData("all training rows are of one class; there is nothing to tell apart")


Chosen = tuple[RowNumbers, RowNumbers]


def _split(data: Data, validation: Validation, seed: int) -> Iterator[Chosen]:
    """Yield, for each member, the rows to train on and those to validate on, both ascending."""
    every_row = np.arange(len(data.train_y))
    for repeat in range(validation.repeats):
        repeat_seed = member_seed(seed, repeat * (validation.folds or 1))
        try:
            if validation.folds:
                kind = KFold if data.classes is None else StratifiedKFold
                folds = kind(validation.folds, shuffle=True, random_state=repeat_seed)
                yield from folds.split(every_row, _strata(data, validation.folds))
            else:
                training, validated = train_test_split(
                    every_row,
                    test_size=validation.fraction,
                    stratify=_strata(data, 2, validation.fraction),
                    random_state=repeat_seed,
                )
                yield np.sort(training), np.sort(validated)
        except ValueError as error:
            field = "folds" if validation.folds else "fraction"
            raise InvalidData(
                f"the training rows cannot be split as validation.{field} says: {error}"
            ) from None


def _strata(data: Data, parts: int, fraction: float | None = None) -> NDArray[np.int64] | None:
    return None if data.classes is None else strata(data.train_y, parts, fraction)


def _standardize_targets(
    data: Data, training: RowNumbers
) -> tuple[NDArray[Any], NDArray[Any], float]:
    """Return training and test targets, standardized, and the unit that they are in."""
    mean = data.train_y[training].mean(dtype=np.float64)
    unit = float(data.train_y[training].std(dtype=np.float64)) or 1.0
    return (data.train_y - mean) / unit, (data.test_y - mean) / unit, unit


def _standardize(
    data: Data, train_x: NDArray[Any], chosen: Sequence[Chosen], dtype: torch.dtype
) -> tuple[list[Split], Standardization]:
    """Return how the first split standardizes inputs, and how the others differ from it."""
    tested = np.arange(len(data.test_y))
    found = [
        _statistics(train_x, training) if data.standardize else _nothing(train_x)
        for training, _ in chosen
    ]
    mean, deviation = found[0]
    splits = [
        Split(
            training,
            validated,
            tested,
            scale=(deviation / own_deviation)[0].to(dtype),
            shift=((mean - own_mean) / own_deviation)[0].to(dtype),
        )
        for (training, validated), (own_mean, own_deviation) in zip(chosen, found, strict=True)
    ]
    return splits, Standardization.by(mean, deviation, dtype, _as_tensor(train_x[:0]).dtype)


def _encode(
    train_x: Columns, test_x: Columns, chosen: Sequence[Chosen], dtype: torch.dtype
) -> tuple[Tensor, Tensor, list[Split]]:
    """Return the rows as each split encodes them, one behind the other; numbers go on counting."""
    train, test = encode(train_x, test_x, [training for training, _ in chosen])
    features = train.shape[2]
    splits = [
        Split(
            training + number * len(train_x),
            validated + number * len(train_x),
            np.arange(len(test_x)) + number * len(test_x),
            scale=torch.ones(features, dtype=dtype),
            shift=torch.zeros(features, dtype=dtype),
        )
        for number, (training, validated) in enumerate(chosen)
    ]
    train, test = (part.reshape(-1, features) for part in (train, test))
    return torch.from_numpy(train), torch.from_numpy(test), splits


def _statistics(x: NDArray[Any], training: RowNumbers) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of some rows; 1 for a feature that never varies."""
    mean, deviation = statistics(x, training)
    return torch.from_numpy(mean), torch.from_numpy(np.where(deviation > 0, deviation, 1.0))


def _nothing(x: NDArray[Any]) -> tuple[Tensor, Tensor]:
    """Return the mean and standard deviation that leave inputs as they are."""
    shape = (1,) * x.ndim
    return torch.zeros(shape, dtype=torch.float64), torch.ones(shape, dtype=torch.float64)


def _weights(y: NDArray[Any], classes: int) -> Tensor:
    """Return rows / (classes that occur × rows of the class), as scikit-learn's ``balanced``."""
    counts = np.bincount(y, minlength=classes)
    return torch.from_numpy(len(y) / (np.count_nonzero(counts) * np.maximum(counts, 1)))


def _row_shape(x: NDArray[Any] | Columns) -> tuple[int, ...]:
    if isinstance(x, Columns):
        return (x.numbers.shape[1], x.categories.shape[1])
    return x.shape[1:]


def _not_finite(values: NDArray[Any]) -> int:
    """Return how many numbers are infinite or none at all."""
    if np.issubdtype(values.dtype, np.integer):
        return 0
    return sum(int((~np.isfinite(values[some])).sum()) for some in blocks(values.shape))


def _as_tensor(x: NDArray[Any]) -> Tensor:
    """Return an array as a tensor, over the same memory if it lies there row by row."""
    x = np.ascontiguousarray(x, x.dtype.newbyteorder("="))
    with warnings.catch_warnings():  # a file may be mapped for reading alone; nobody writes here
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(x)
