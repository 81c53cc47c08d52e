"""Small files in the formats in which the authors of data sets publish them."""

import gzip
import hashlib
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat
from torchvision.datasets import CIFAR10, SVHN

Rows = dict[str, tuple[np.ndarray, np.ndarray]]

RANDOM = np.random.default_rng(0)


def write_idx(folder: Path) -> Rows:
    """Files as those of MNIST; return inputs and labels by the name of the part."""
    raw = folder / "raw"
    raw.mkdir(parents=True)
    kept = {}
    for part, rows in (("train", 60), ("t10k", 30)):
        x, y = _pixels(rows, 28, 28), np.arange(rows, dtype=np.uint8) % 10
        kept[part] = x, y
        for name, head, values in (
            ("images-idx3", struct.pack(">IIII", 0x803, rows, 28, 28), x),
            ("labels-idx1", struct.pack(">II", 0x801, rows), y),
        ):
            (raw / f"{part}-{name}-ubyte").write_bytes(head + values.tobytes())
            with gzip.open(raw / f"{part}-{name}-ubyte.gz", "wb") as archive:
                archive.write(head + values.tobytes())
    return kept


def write_cifar(
    folder: Path, dataset: type[CIFAR10], key: str, classes: int, patch: pytest.MonkeyPatch
) -> Rows:
    """Files as those of CIFAR, whose checksums torchvision is made to expect."""
    kept = {}
    for which in ("train", "test"):
        listed, parts = [], []
        for name, _ in getattr(dataset, f"{which}_list"):
            x, y = _pixels(20, 3, 32, 32), np.arange(20) % classes
            parts.append((x, y))
            content = {"data": x.reshape(len(x), -1), key: y.tolist()}
            listed.append(_write(folder / dataset.base_folder / name, pickle.dumps(content)))
        kept[which] = tuple(map(np.concatenate, zip(*parts, strict=True)))
        patch.setattr(dataset, f"{which}_list", listed)
    names = {dataset.meta["key"]: [str(number) for number in range(classes)]}
    _, checksum = _write(
        folder / dataset.base_folder / dataset.meta["filename"], pickle.dumps(names)
    )
    patch.setattr(dataset, "meta", {**dataset.meta, "md5": checksum})
    return kept


def write_svhn(folder: Path, patch: pytest.MonkeyPatch) -> Rows:
    """Files as those of SVHN, whose checksums torchvision is made to expect."""
    kept, listed = {}, {}
    folder.mkdir()
    for which, rows in (("train", 12), ("test", 5)):
        x, y = _pixels(rows, 3, 32, 32), np.arange(rows) % 10 + 1
        address, name, _ = SVHN.split_list[which]
        savemat(folder / name, {"X": x.transpose(2, 3, 1, 0), "y": y[:, None].astype(np.uint8)})
        kept[which] = x, y
        listed[which] = [address, name, _checksum(folder / name)]
    patch.setattr(SVHN, "split_list", {**SVHN.split_list, **listed})
    return kept


def _pixels(*shape: int) -> np.ndarray:
    return RANDOM.integers(0, 256, size=shape, dtype=np.uint8)


def _write(path: Path, content: bytes) -> list[str]:
    """Write a file; return its name and checksum, as torchvision lists them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return [path.name, _checksum(path)]


def _checksum(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()
