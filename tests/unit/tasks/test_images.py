import gzip
import hashlib
import os
import pickle
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat
from torchvision.datasets import CIFAR10, CIFAR100, SVHN

from regtune.task import DatasetLoader, Storage
from worker.tasks.images import cifar10, cifar100, digits, fashion_mnist, kmnist, mnist, svhn

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


RANDOM = np.random.default_rng(0)


def pixels(*shape: int) -> np.ndarray:
    return RANDOM.integers(0, 256, size=shape, dtype=np.uint8)


def checksum(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def write(path: Path, content: bytes) -> list[str]:
    """Write a file; return its name and checksum, as torchvision's lists have them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return [path.name, checksum(path)]


def test_kmnist_is_read_from_the_files_of_its_authors(tmp_path: Path):
    raw = tmp_path / "KMNIST" / "raw"
    raw.mkdir(parents=True)
    kept = {}
    for part, rows in (("train", 7), ("t10k", 3)):
        x, y = pixels(rows, 28, 28), pixels(rows) % 10
        kept[part] = x, y
        for name, head, values in (
            ("images-idx3", struct.pack(">IIII", 0x803, rows, 28, 28), x),
            ("labels-idx1", struct.pack(">II", 0x801, rows), y),
        ):
            (raw / f"{part}-{name}-ubyte").write_bytes(head + values.tobytes())
            with gzip.open(raw / f"{part}-{name}-ubyte.gz", "wb") as archive:
                archive.write(head + values.tobytes())
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
    """Files as large as need be, so their checksums are others."""
    folder = tmp_path / dataset.base_folder

    def batch(name: str) -> tuple[list[str], np.ndarray, list[int]]:
        x, y = pixels(4, 3, 32, 32), (pixels(4) % classes).tolist()
        content = pickle.dumps({"data": x.reshape(4, -1), key: y})
        return write(folder / name, content), x, y

    parts = {
        which: [batch(name) for name, _ in getattr(dataset, f"{which}_list")]
        for which in ("train", "test")
    }
    for which, batches in parts.items():
        monkeypatch.setattr(dataset, f"{which}_list", [listed for listed, _, _ in batches])
    names = {dataset.meta["key"]: [str(number) for number in range(classes)]}
    name, found = write(folder / dataset.meta["filename"], pickle.dumps(names))
    monkeypatch.setattr(dataset, "meta", {**dataset.meta, "filename": name, "md5": found})
    data = loader(Storage(tmp_path))
    assert data.train_x.flags.c_contiguous
    for which, x, y in (
        ("train", data.train_x, data.train_y),
        ("test", data.test_x, data.test_y),
    ):
        np.testing.assert_array_equal(x, np.concatenate([part for _, part, _ in parts[which]]))
        np.testing.assert_array_equal(y, np.concatenate([labels for _, _, labels in parts[which]]))
    assert (data.train_x.dtype, data.train_y.dtype, data.classes) == (np.uint8, np.int64, classes)


def test_svhn_is_read_from_the_files_of_its_authors(tmp_path: Path, monkeypatch):
    """Files as large as need be, so their checksums are others. Their label of a zero is 10."""
    folder, parts, listed = tmp_path / "SVHN", {}, {}
    folder.mkdir()
    for which, rows in (("train", 12), ("test", 5)):
        x, y = pixels(rows, 3, 32, 32), np.arange(1, rows + 1) % 10 + 1
        address, name, _ = SVHN.split_list[which]
        savemat(folder / name, {"X": x.transpose(2, 3, 1, 0), "y": y[:, None].astype(np.uint8)})
        parts[which], listed[which] = (x, y), [address, name, checksum(folder / name)]
    monkeypatch.setattr(SVHN, "split_list", {**SVHN.split_list, **listed})
    data = svhn(Storage(tmp_path))
    np.testing.assert_array_equal(data.train_x, parts["train"][0])
    np.testing.assert_array_equal(data.train_y, parts["train"][1] % 10)
    np.testing.assert_array_equal(data.test_x, parts["test"][0])
    assert (data.train_x.dtype, data.train_y.dtype, data.classes) == (np.uint8, np.int64, 10)
