from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from regtune.spec import Validation
from regtune.task import Data
from worker.tasks.preparation import Prepared, Split, prepare

CPU = torch.device("cpu")


def table(rows: int = 100) -> Data:
    random = np.random.default_rng(0)
    x = random.normal(loc=[0, 5, -3], scale=[1, 10, 0], size=(rows + 20, 3)).astype(np.float32)
    y = (np.arange(rows + 20) % 10 == 0).astype(np.int64)
    return Data(x[:rows], y[:rows], x[rows:], y[rows:], classes=2)


def prepared(data: Data, seed: int = 0, **validation: Any) -> Prepared:
    return prepare(data, Validation(**validation), seed, CPU, torch.float64)


def only(prepared: Prepared) -> Split:
    (split,) = prepared.splits
    return split


def trained_on(prepared: Prepared) -> torch.Tensor:
    return prepared.rows.x[only(prepared).training]


def test_every_row_trains_or_validates():
    split = only(prepared(table()))
    assert (len(split.training), len(split.validation)) == (80, 20)
    assert sorted([*split.training, *split.validation]) == list(range(100))


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.5])
def test_the_split_keeps_the_shares_of_the_classes(fraction):
    held_out = only(prepared(table(), fraction=fraction)).validation
    assert table().train_y[held_out].mean() == pytest.approx(0.1)
    assert len(held_out) == 100 * fraction


def test_the_split_is_a_pure_function_of_the_seed():
    first, again, other = (only(prepared(table(), seed)).validation for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_folds_hold_out_every_row_once_with_the_shares_of_the_classes():
    splits = prepared(table(), folds=5).splits
    assert len(splits) == 5
    held_out = np.concatenate([split.validation for split in splits])
    assert sorted(held_out) == list(range(100))
    for split in splits:
        assert sorted([*split.training, *split.validation]) == list(range(100))
        assert table().train_y[split.validation].mean() == pytest.approx(0.1)


@pytest.mark.parametrize("validation", [{"folds": 5}, {"fraction": 0.2}])
def test_repeats_hold_out_other_rows_and_the_first_one_the_same_as_without(validation):
    once = prepared(table(), **validation).splits
    thrice = prepared(table(), repeats=3, **validation).splits
    assert len(thrice) == 3 * len(once)
    for alone, first in zip(once, thrice, strict=False):
        assert np.array_equal(alone.validation, first.validation)
    held_out = {tuple(split.validation) for split in thrice}
    assert len(held_out) == len(thrice)


def test_folds_differ_in_size_by_one_row_at_most():
    sizes = [len(split.training) for split in prepared(table(103), folds=4).splits]
    assert set(sizes) == {77, 78}


def test_each_feature_of_a_table_is_standardized_by_the_training_rows_alone():
    before = prepared(table())
    x = trained_on(before)
    torch.testing.assert_close(x.mean(0), torch.zeros(3).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(x[:, :2].std(0, correction=0), torch.ones(2).double())

    data = table()
    elsewhere = prepared(replace(data, test_x=data.test_x * 100))
    assert torch.equal(elsewhere.rows.x, before.rows.x)


def test_validation_rows_have_no_part_in_the_statistics():
    data = table()
    before = prepared(data)
    x = data.train_x.copy()
    x[only(before).validation, 1] += 1000
    after = prepared(replace(data, train_x=x))
    assert torch.equal(trained_on(before), trained_on(after))
    assert not torch.equal(before.rows.x, after.rows.x)


def test_every_split_standardizes_by_its_own_training_rows():
    whole = prepared(table(), folds=4)
    for split in whole.splits:
        x = whole.rows.x[split.training] * split.scale + split.shift
        torch.testing.assert_close(x.mean(0), torch.zeros(3).double(), atol=1e-6, rtol=0)
        torch.testing.assert_close(x[:, :2].std(0, correction=0), torch.ones(2).double())


def test_a_feature_that_never_varies_becomes_zero():
    constant = prepared(table()).rows.x[:, 2]
    torch.testing.assert_close(constant, torch.zeros(100).double(), atol=1e-6, rtol=0)


def test_images_of_bytes_get_one_mean_and_deviation_for_each_channel():
    random = np.random.default_rng(0)
    x = random.integers(0, 256, size=(60, 2, 4, 4), dtype=np.uint8)
    x[:, 1] //= 8
    y = np.arange(60) % 3
    data = Data(x[:50], y[:50], x[50:], y[50:], classes=3)
    ready = prepare(data, Validation(folds=2), 0, CPU, torch.float32)
    assert ready.rows.x.dtype == torch.float32
    assert ready.rows.input_shape == (2, 4, 4)
    for split in ready.splits:
        training = ready.rows.x[split.training] * split.scale + split.shift
        mean = training.mean(dim=(0, 2, 3))
        deviation = training.std(dim=(0, 2, 3), correction=0)
        torch.testing.assert_close(mean, torch.zeros(2), atol=1e-5, rtol=0)
        torch.testing.assert_close(deviation, torch.ones(2))
        assert training[:, 0, 0].mean().abs() > 1e-3  # pixels are not standardized one by one


def test_the_data_set_itself_stays_as_it_is():
    data = table()
    before = data.train_x.copy(), data.test_x.copy()
    prepare(data, Validation(), 0, CPU, torch.float32)
    np.testing.assert_array_equal(data.train_x, before[0])
    np.testing.assert_array_equal(data.test_x, before[1])
