import fcntl
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torchvision.datasets import CIFAR10, CIFAR100, KMNIST

from regtune.task import DatasetLoader, Storage
from tests.unit.tasks.files_of_others import write_cifar, write_idx, write_svhn
from worker.tasks import images
from worker.tasks.images import cifar10, cifar100, digits, fashion_mnist, kmnist, mnist, svhn
from worker.tasks.locking import alone

ARCHIVES = Path(
    os.environ.get("REGTUNE_TEST_DATA", Path(__file__).parents[3].parent / "shared" / "data")
)


def test_the_digits_are_split_the_same_every_time_with_all_classes_in_both_parts():
    first, again = digits(Storage(Path("unused"))), digits(Storage(Path("unused")))
    assert first.train_x.shape == (1437, 1, 8, 8)
    assert first.test_x.shape == (360, 1, 8, 8)
    assert (first.train_x.dtype, first.train_y.dtype) == (np.float32, np.int64)
    assert first.train_x.max() == 16
    np.testing.assert_array_equal(first.test_x, again.test_x)
    for labels in (first.train_y, first.test_y):
        shares = np.bincount(labels, minlength=first.classes) / len(labels)
        np.testing.assert_allclose(shares, 0.1, atol=0.005)


@pytest.mark.parametrize(
    ("loader", "folder", "first_labels"),
    [(mnist, "MNIST", [5, 0, 4, 1, 9]), (fashion_mnist, "FashionMNIST", [9, 0, 0, 3, 0])],
)
def test_archives_that_lie_there_are_verified_and_unpacked(
    loader: DatasetLoader, folder: str, first_labels: list[int], tmp_path: Path
):
    raw = ARCHIVES / folder / "raw"
    if not raw.is_dir():
        pytest.skip(f"needs the original archives under {raw}; REGTUNE_TEST_DATA may say where")
    shutil.copytree(raw, tmp_path / folder / "raw")
    data = loader(Storage(tmp_path))
    assert data.train_x.shape == (60_000, 1, 28, 28)
    assert data.test_x.shape == (10_000, 1, 28, 28)
    assert (data.train_x.dtype, data.train_y.dtype) == (np.uint8, np.int64)
    assert data.train_y[:5].tolist() == first_labels
    assert data.classes == 10


def test_kmnist_is_read_from_the_files_of_its_authors(tmp_path: Path):
    kept = write_idx(tmp_path / "KMNIST")
    data = kmnist(Storage(tmp_path))
    np.testing.assert_array_equal(data.train_x, kept["train"][0][:, None])
    np.testing.assert_array_equal(data.test_y, kept["t10k"][1])
    assert (data.train_y.dtype, data.classes) == (np.int64, 10)


@pytest.mark.parametrize(
    ("loader", "dataset", "key", "classes"),
    [(cifar10, CIFAR10, "labels", 10), (cifar100, CIFAR100, "fine_labels", 100)],
)
def test_cifar_is_read_from_the_files_of_its_authors(
    loader: DatasetLoader,
    dataset: type[CIFAR10],
    key: str,
    classes: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    kept = write_cifar(tmp_path, dataset, key, classes, monkeypatch)
    data = loader(Storage(tmp_path))
    assert data.train_x.flags.c_contiguous
    np.testing.assert_array_equal(data.train_x, kept["train"][0])
    np.testing.assert_array_equal(data.train_y, kept["train"][1])
    np.testing.assert_array_equal(data.test_x, kept["test"][0])
    np.testing.assert_array_equal(data.test_y, kept["test"][1])
    assert (data.train_x.dtype, data.train_y.dtype, data.classes) == (np.uint8, np.int64, classes)


def test_svhn_is_read_from_the_files_of_its_authors(tmp_path: Path, monkeypatch):
    """In these files the label of a zero is 10."""
    kept = write_svhn(tmp_path / "SVHN", monkeypatch)
    data = svhn(Storage(tmp_path))
    np.testing.assert_array_equal(data.train_x, kept["train"][0])
    np.testing.assert_array_equal(data.train_y, kept["train"][1] % 10)
    np.testing.assert_array_equal(data.test_x, kept["test"][0])
    assert (data.train_x.dtype, data.train_y.dtype, data.classes) == (np.uint8, np.int64, 10)


def test_files_are_fetched_and_unpacked_by_one_worker_at_a_time(tmp_path: Path, monkeypatch):
    kept = write_idx(tmp_path / "KMNIST")
    alone_in = []

    def noted(folder: Path, **options: Any) -> KMNIST:
        with suppress(BlockingIOError), alone(folder / "KMNIST.lock", fcntl.LOCK_NB):
            pytest.fail("anybody may come in")
        alone_in.append(folder)
        return KMNIST(folder, **options)

    noted.__name__ = "KMNIST"
    monkeypatch.setattr(images, "KMNIST", noted)
    np.testing.assert_array_equal(kmnist(Storage(tmp_path)).test_y, kept["t10k"][1])
    assert alone_in == [tmp_path] * 2


def test_files_are_read_where_no_lock_can_be_made(tmp_path: Path):
    """As in a folder that may only be read."""
    kept = write_idx(tmp_path / "KMNIST")
    (tmp_path / "KMNIST.lock").mkdir()
    np.testing.assert_array_equal(kmnist(Storage(tmp_path)).test_y, kept["t10k"][1])
