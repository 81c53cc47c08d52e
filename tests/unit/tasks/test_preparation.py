import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight

from regtune.errors import InvalidData
from regtune.spec import Validation
from regtune.task import Data
from worker.tasks.holdout import hold_out
from worker.tasks.preparation import Prepared, Split, prepare

CPU = torch.device("cpu")


def table(rows: int = 100) -> Data:
    random = np.random.default_rng(0)
    x = random.normal(loc=[0, 5, -3], scale=[1, 10, 0], size=(rows + 20, 3)).astype(np.float32)
    y = (np.arange(rows + 20) % 10 == 0).astype(np.int64)
    return Data(x[:rows], y[:rows], x[rows:], y[rows:], classes=2)


def prepared(data: Data, seed: int = 0, **validation: Any) -> Prepared:
    return prepare(data, Validation(**validation), seed, torch.float64).on(CPU)


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
    ready = prepare(data, Validation(folds=2), 0, torch.float32).on(CPU)
    assert ready.rows.x.dtype == torch.float32
    assert ready.rows.input_shape == (2, 4, 4)
    for split in ready.splits:
        training = ready.rows.x[split.training] * split.scale + split.shift
        mean = training.mean(dim=(0, 2, 3))
        deviation = training.std(dim=(0, 2, 3), correction=0)
        torch.testing.assert_close(mean, torch.zeros(2), atol=1e-5, rtol=0)
        torch.testing.assert_close(deviation, torch.ones(2))
        assert training[:, 0, 0].mean().abs() > 1e-3  # pixels are not standardized one by one


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_rows_lie_as_they_are_wanted_in_memory_that_asks_for_huge_pages(memory_format):
    x = np.random.default_rng(0).random((2000, 3, 30, 30))
    y = np.arange(2000) % 2
    data = Data(x, y, x[:5], y[:5], classes=2, standardize=False)
    rows = prepare(data, Validation(), 0, torch.float32).on(CPU, memory_format).rows
    assert rows.x.is_contiguous(memory_format=memory_format)
    assert torch.equal(rows.x, torch.from_numpy(x).float())
    if Path("/sys/kernel/mm/transparent_hugepage").exists():
        assert "hg" in memory_flags(rows.x.data_ptr() + rows.x.nbytes // 2)


def memory_flags(address: int) -> list[str]:
    """What the system has been told of the memory at an address, see ``man 5 proc_pid_smaps``."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            first, end = (int(number, 16) for number in span.groups())
            inside = first <= address < end
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise LookupError(hex(address))


def test_the_data_set_itself_stays_as_it_is():
    data = table()
    before = data.train_x.copy(), data.test_x.copy()
    prepare(data, Validation(), 0, torch.float32).on(CPU)
    np.testing.assert_array_equal(data.train_x, before[0])
    np.testing.assert_array_equal(data.test_x, before[1])


def numbers(rows: int = 50) -> Data:
    """A regression."""
    random = np.random.default_rng(0)
    x = random.normal(size=(rows + 10, 3)).astype(np.float32)
    y = (100 + 20 * x[:, 0] + random.normal(size=rows + 10)).astype(np.float32)
    return Data(x[:rows], y[:rows], x[rows:], y[rows:], classes=None)


@pytest.mark.parametrize("validation", [{"folds": 5}, {"fraction": 0.2}])
def test_targets_of_a_regression_are_standardized_by_the_rows_trained_on(validation):
    data = numbers()
    whole = prepared(data, **validation)
    trained_on = whole.splits[0].training
    own = data.train_y[trained_on].astype(np.float64)
    assert whole.outputs == 1
    assert whole.unit == pytest.approx(own.std())
    np.testing.assert_allclose(whole.rows.y[trained_on], (own - own.mean()) / own.std())
    np.testing.assert_allclose(whole.test.y, (data.test_y - own.mean()) / own.std())
    held_out = np.concatenate([split.validation for split in whole.splits])
    assert len(set(held_out)) == len(held_out)


def test_balanced_weights_are_scikit_learns_and_average_one():
    whole = prepared(table())
    y = table().train_y[only(whole).training]
    expected = compute_class_weight("balanced", classes=np.array([0, 1]), y=y)
    np.testing.assert_allclose(whole.class_weights, expected)
    assert whole.class_weights[y].mean() == pytest.approx(1)


@pytest.mark.parametrize("validation", [{"folds": 5}, {"fraction": 0.2}])
def test_classes_too_rare_to_be_stratified_are_split_together(validation):
    data = table()
    y = data.train_y.copy()
    y[:3], y[3] = 2, 3
    splits = prepared(replace(data, train_y=y, classes=4), **validation).splits
    for split in splits:
        assert sorted([*split.training, *split.validation]) == list(range(100))
        assert 0.05 <= (y[split.validation] == 1).mean() <= 0.15


@pytest.mark.parametrize("rarest", [1, 2])
def test_a_class_of_one_row_takes_stratification_from_no_other(rarest):
    y = np.repeat([0, 1, 2], [960, 39, rarest])
    _, tested = hold_out(y, 3, 0.2)
    assert len(tested) == pytest.approx(200, abs=1)
    assert np.bincount(y[tested])[1] == 8


def test_more_classes_than_the_smaller_part_has_rows_can_be_split():
    y = np.repeat(np.arange(100), 4)
    assert [len(part) for part in hold_out(np.arange(6) % 3, 3, 0.55)] == [2, 4]
    for tested in (hold_out(y, 100, 0.2)[1], hold_out(y, 100, 0.8)[0]):
        assert len(tested) == 80
        assert np.bincount(y[tested])[:79].max() == 1
    data = Data(np.random.rand(400, 2), y, np.zeros((1, 2)), y[:1], classes=100)
    split = only(prepared(data, fraction=0.1))
    assert len(split.validation) == 40


@pytest.mark.parametrize("shape", [(100,), (100, 2)])
def test_targets_of_a_loss_of_ones_own_may_be_of_any_type(shape):
    y = np.arange(np.prod(shape)).reshape(shape) % 3 == 0
    data = Data(table().train_x, y, table().train_x[:9], y[:9], None)
    assert prepare(data, Validation(), 0, torch.float64, own_loss=True).rows is not None


@pytest.mark.parametrize("kind", [">f4", ">f8", ">i2"])
def test_inputs_may_be_of_the_other_byte_order(kind):
    data = table()
    x = (data.train_x * 100).astype(kind), (data.test_x * 100).astype(kind)
    swapped = prepared(replace(data, train_x=x[0], test_x=x[1]))
    native = prepared(replace(data, train_x=x[0].astype(kind[1:]), test_x=x[1].astype(kind[1:])))
    torch.testing.assert_close(swapped.rows.x, native.rows.x, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"train_y": np.zeros(100, np.int64)}, "all training rows are of one class"),
        ({"classes": 1}, "whole numbers from 0 to 0"),
        ({"train_y": np.full(100, 0.5)}, "whole numbers from 0 to 1"),
        ({"test_y": np.full(20, -1)}, "whole numbers from 0 to 1"),
        ({"train_y": np.full(100, np.nan)}, "100 of 100 training targets are no numbers"),
        ({"classes": None, "train_y": np.ones(100)}, "the target is 1 in all training rows"),
        ({"train_x": np.full((100, 3), np.inf)}, "300 of 300 training inputs are no numbers"),
        ({"test_x": np.zeros((20, 4))}, r"have the shape \(3,\), test rows \(4,\)"),
        ({"train_x": np.zeros((99, 3))}, "inputs have 99 rows, but the targets"),
        ({"train_y": np.zeros((100, 1))}, r"the targets have the shape \(100, 1\)"),
        ({"test_x": np.zeros((0, 3)), "test_y": np.zeros(0, int)}, "there are no test rows"),
        ({"train_x": np.zeros((0, 3)), "train_y": np.zeros(0, int)}, "there are no training rows"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_with_the_reason(change, says):
    with pytest.raises(InvalidData, match=says):
        prepared(replace(table(), **change))


def test_fewer_rows_than_folds_are_refused():
    data = replace(numbers(), train_x=numbers().train_x[:3], train_y=numbers().train_y[:3])
    with pytest.raises(
        InvalidData, match=r"cannot be split as validation.folds says: .* n_splits=5"
    ):
        prepared(data, folds=5)


def test_rows_that_differ_in_a_bit_or_in_their_order_have_another_hash():
    data = table()
    x = data.train_x.copy()
    x[7, 1] = np.nextafter(x[7, 1], np.float32(np.inf))
    others = [replace(data, train_x=x), replace(data, test_x=data.test_x[::-1])]
    hashes = {d.content_hash() for d in (data, *others, replace(data, classes=3))}
    assert len(hashes) == 4
    assert replace(data, train_x=data.train_x.copy()).content_hash() in hashes


@pytest.mark.parametrize("kind", [np.int64, np.float64])
def test_inputs_with_more_digits_than_float32_keep_them_until_they_are_standardized(kind):
    """Moments of one hour, in seconds since 1970: float32 knows one every 128 seconds."""
    seconds = (1_700_000_000 + np.arange(100)).astype(kind)[:, None]
    y = np.arange(100) % 2
    data = Data(seconds, y, seconds, y, classes=2)
    rows = prepare(data, Validation(), 0, torch.float32).rows.on(torch.device("cpu")).x
    assert len(rows.unique()) == 100
