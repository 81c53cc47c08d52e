"""The built-in data sets: handwritten digits and Fashion-MNIST, as ``(rows, 1, height, width)``."""

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torchvision.datasets import MNIST, FashionMNIST

from regtune.task import Data, Storage

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
    return _torchvision(MNIST, storage)


def fashion_mnist(storage: Storage) -> Data:
    """Return Fashion-MNIST, 60 000 + 10 000 clothes of 28 × 28 pixels; downloaded on first use.

    Source: H. Xiao, K. Rasul and R. Vollgraf, Fashion-MNIST (2017), arXiv 1708.07747.
    """
    return _torchvision(FashionMNIST, storage)


def _torchvision(dataset: type[MNIST], storage: Storage) -> Data:
    """Download what is missing under the data folder; verify and unpack archives that lie there."""
    train = dataset(storage.data_dir, train=True, download=True)
    test = dataset(storage.data_dir, train=False, download=True)
    return Data(
        train_x=train.data.numpy()[:, None],
        train_y=train.targets.numpy(),
        test_x=test.data.numpy()[:, None],
        test_y=test.targets.numpy(),
        classes=len(train.classes),
    )
