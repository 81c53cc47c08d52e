from dataclasses import replace

import numpy as np
import pytest
import torch

from regtune.task import Data
from worker.tasks.preparation import Prepared, prepare

CPU = torch.device("cpu")


def table(rows: int = 100) -> Data:
    random = np.random.default_rng(0)
    x = random.normal(loc=[0, 5, -3], scale=[1, 10, 0], size=(rows + 20, 3)).astype(np.float32)
    x[:, 0] = np.arange(rows + 20)  # tells the rows apart
    y = (np.arange(rows + 20) % 10 == 0).astype(np.int64)
    return Data(x[:rows], y[:rows], x[rows:], y[rows:], classes=2)


def prepared(data: Data, fraction: float = 0.2, seed: int = 0) -> Prepared:
    return prepare(data, fraction, seed, CPU, torch.float64)


def test_every_training_row_trains_or_validates():
    split = prepared(table())
    assert (len(split.training), len(split.validation), len(split.test)) == (80, 20, 20)
    seen = torch.cat([split.training.x[:, 0], split.validation.x[:, 0]])
    assert len(seen.unique()) == 100


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.5])
def test_the_split_keeps_the_shares_of_the_classes(fraction):
    validation = prepared(table(), fraction).validation
    assert validation.y.double().mean() == pytest.approx(0.1)
    assert len(validation) == 100 * fraction


def test_the_split_is_a_pure_function_of_the_seed():
    first, again, other = (prepared(table(), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.validation.x, again.validation.x)
    assert not torch.equal(first.validation.x, other.validation.x)


def test_each_feature_of_a_table_is_standardized_by_the_training_rows_alone():
    split = prepared(table())
    torch.testing.assert_close(split.training.x.mean(0), torch.zeros(3).double(), atol=1e-6, rtol=0)
    varying = split.training.x[:, :2].std(0, correction=0)
    torch.testing.assert_close(varying, torch.ones(2).double())
    assert not torch.allclose(split.validation.x.mean(0)[:2], torch.zeros(2).double(), atol=1e-2)

    data = table()
    elsewhere = prepared(replace(data, test_x=data.test_x * 100))
    assert torch.equal(elsewhere.training.x, split.training.x)
    assert torch.equal(elsewhere.validation.x, split.validation.x)


def test_validation_rows_have_no_part_in_the_statistics():
    data = table()
    before = prepared(data)
    x = data.train_x.copy()
    x[validation_rows(before), 1] += 1000
    after = prepared(replace(data, train_x=x))
    assert torch.equal(before.training.x, after.training.x)
    assert not torch.equal(before.validation.x, after.validation.x)


def validation_rows(split: Prepared) -> np.ndarray:
    """Their numbers: the first feature only counts the rows, so its ranks are those numbers."""
    first = torch.cat([split.training.x[:, 0], split.validation.x[:, 0]])
    return first.argsort().argsort()[len(split.training) :].numpy()


def test_a_feature_that_never_varies_becomes_zero():
    constant = prepared(table()).training.x[:, 2]
    torch.testing.assert_close(constant, torch.zeros(80).double(), atol=1e-6, rtol=0)


def test_images_of_bytes_get_one_mean_and_deviation_for_each_channel():
    random = np.random.default_rng(0)
    x = random.integers(0, 256, size=(60, 2, 4, 4), dtype=np.uint8)
    x[:, 1] //= 8
    y = np.arange(60) % 3
    data = Data(x[:50], y[:50], x[50:], y[50:], classes=3)
    training = prepare(data, 0.2, 0, CPU, torch.float32).training
    assert training.x.dtype == torch.float32
    assert training.input_shape == (2, 4, 4)
    mean = training.x.mean(dim=(0, 2, 3))
    deviation = training.x.std(dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(mean, torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(deviation, torch.ones(2))
    assert training.x[:, 0, 0].mean().abs() > 1e-3  # pixels are not standardized one by one


def test_the_data_set_itself_stays_as_it_is():
    data = table()
    before = data.train_x.copy(), data.test_x.copy()
    prepare(data, 0.2, 0, CPU, torch.float32)
    np.testing.assert_array_equal(data.train_x, before[0])
    np.testing.assert_array_equal(data.test_x, before[1])
