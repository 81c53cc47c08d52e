"""Images that are known by a name, as ``(rows, channels, height, width)``."""

from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torchvision.datasets import CIFAR10, CIFAR100, KMNIST, MNIST, SVHN, FashionMNIST, VisionDataset

from regtune.errors import DataMissing
from regtune.task import Data, Storage
from worker.tasks.locking import alone

DIGITS_TEST_FRACTION = 0.2
DIGITS_SPLIT_SEED = 0


def digits(storage: Storage) -> Data:
    """Return the 1 797 digits of 8 × 8 pixels that ship inside scikit-learn; needs no files.

    A fixed, stratified fifth of the rows is the test set. Source: E. Alpaydin and C. Kaynak,
    Optical Recognition of Handwritten Digits, UCI Machine Learning Repository (1998).
    """
    bunch = load_digits()
    train_x, test_x, train_y, test_y = train_test_split(
        bunch.images.astype(np.float32)[:, None],
        bunch.target.astype(np.int64),
        test_size=DIGITS_TEST_FRACTION,
        stratify=bunch.target,
        random_state=DIGITS_SPLIT_SEED,
    )
    return Data(train_x, train_y, test_x, test_y, classes=10)


def mnist(storage: Storage) -> Data:
    """Return MNIST, 60 000 + 10 000 digits of 28 × 28 pixels; downloaded on first use.

    Source: Y. LeCun, C. Cortes and C. Burges, The MNIST database of handwritten digits (1998).
    """
    return _mnist(MNIST, storage)


def fashion_mnist(storage: Storage) -> Data:
    """Return Fashion-MNIST, 60 000 + 10 000 clothes of 28 × 28 pixels; downloaded on first use.

    Source: H. Xiao, K. Rasul and R. Vollgraf, Fashion-MNIST (2017), arXiv 1708.07747.
    """
    return _mnist(FashionMNIST, storage)


def kmnist(storage: Storage) -> Data:
    """Return KMNIST, 60 000 + 10 000 cursive characters of 28 × 28 pixels; downloaded on first use.

    Source: T. Clanuwat et al., Deep Learning for Classical Japanese Literature (2018), arXiv
    1812.01718.
    """
    return _mnist(KMNIST, storage)


def cifar10(storage: Storage) -> Data:
    """Return CIFAR-10, 50 000 + 10 000 photographs of 32 × 32 pixels; downloaded on first use.

    Source: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images (2009).
    """
    return _cifar(CIFAR10, storage)


def cifar100(storage: Storage) -> Data:
    """Return CIFAR-100, 50 000 + 10 000 photographs of 32 × 32 pixels; downloaded on first use.

    Source: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images (2009).
    """
    return _cifar(CIFAR100, storage)


def svhn(storage: Storage) -> Data:
    """Return SVHN, 73 257 + 26 032 house numbers of 32 × 32 pixels; downloaded on first use.

    Source: Y. Netzer et al., Reading Digits in Natural Images with Unsupervised Feature Learning,
    NIPS Workshop on Deep Learning (2011).
    """
    train, test = (
        _got(SVHN, storage.data_dir / "SVHN", split=split) for split in ("train", "test")
    )
    return Data(train.data, _labels(train.labels), test.data, _labels(test.labels), classes=10)


def _mnist(dataset: type[MNIST], storage: Storage) -> Data:
    train, test = (_got(dataset, storage.data_dir, train=train) for train in (True, False))
    return Data(
        train_x=train.data.numpy()[:, None],
        train_y=train.targets.numpy(),
        test_x=test.data.numpy()[:, None],
        test_y=test.targets.numpy(),
        classes=len(train.classes),
    )


def _cifar(dataset: type[CIFAR10], storage: Storage) -> Data:
    train, test = (_got(dataset, storage.data_dir, train=train) for train in (True, False))
    train_x, test_x = (
        np.ascontiguousarray(part.data.transpose(0, 3, 1, 2)) for part in (train, test)
    )
    train_y, test_y = (_labels(part.targets) for part in (train, test))
    return Data(train_x, train_y, test_x, test_y, classes=len(train.classes))


def _got(dataset: type[VisionDataset], folder: Path, **which: Any) -> Any:
    """Download what is missing in ``folder``; verify and unpack archives that lie there.

    One worker at a time: two would write into each other's files, or read half of one.
    """
    with ExitStack() as stack:
        with suppress(OSError):  # as in a folder that may only be read, where all is unpacked
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(alone(folder / f"{dataset.__name__}.lock"))
        try:
            return dataset(folder, download=True, **which)
        except RuntimeError as error:  # what torchvision makes of a failed download
            raise DataMissing(f"{dataset.__name__} cannot be had: {error}") from error


def _labels(labels: Any) -> NDArray[np.int64]:
    return np.asarray(labels, dtype=np.int64)
