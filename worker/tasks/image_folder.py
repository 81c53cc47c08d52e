"""The data set ``image_folder``: a folder of the user's own, with a folder of images per class."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torchvision.datasets import ImageFolder

from regtune.errors import DataMissing, InvalidData
from regtune.spec import ImageFolderSettings
from regtune.task import Data, Storage
from worker.tasks.decoding import ImageFiles
from worker.tasks.files import folder
from worker.tasks.holdout import hold_out


def image_folder(storage: Storage, **settings: Any) -> Data:
    """Return the images of a folder, ``(rows, channels, size, size)``, uint8.

    Classes are numbered in the order of their folders' names. What is done with the images is said
    at ``ImageFolderSettings``. Raises InvalidData.
    """
    asked = ImageFolderSettings.model_validate(settings)
    found = _Found(asked.path, storage)
    if asked.test_path is None:
        training, tested = hold_out(found.labels, len(found.classes), asked.test_fraction)
        return Data(
            found.images(training, asked),
            found.labels[training],
            found.images(tested, asked),
            found.labels[tested],
            classes=len(found.classes),
        )
    other = _Found(asked.test_path, storage)
    if other.classes != found.classes:
        raise InvalidData(
            f"the classes in {asked.path!r} are {', '.join(found.classes)}, but those in "
            f"{asked.test_path!r} are {', '.join(other.classes)}"
        )
    return Data(
        found.images(np.arange(len(found.labels)), asked),
        found.labels,
        other.images(np.arange(len(other.labels)), asked),
        other.labels,
        classes=len(found.classes),
    )


class _Found:
    """The images of a folder, before any is read."""

    def __init__(self, address: str, storage: Storage) -> None:
        self._storage = storage
        root = folder(address, storage)
        try:
            listing = ImageFolder(root)
        except FileNotFoundError as error:
            # Of a class without images; or of none at all, as where nothing is mounted.
            has_classes = any(entry.is_dir() for entry in root.iterdir())
            kind = InvalidData if has_classes else DataMissing
            raise kind(f"{address!r} cannot be read: {error}") from None
        except OSError as error:
            raise DataMissing(f"{address!r} cannot be read: {error}") from None
        self.classes: Sequence[str] = listing.classes
        self.labels: NDArray[np.int64] = np.array(listing.targets, dtype=np.int64)
        self._paths = [Path(path) for path, _ in listing.samples]

    def images(self, numbers: NDArray[np.int64], asked: ImageFolderSettings) -> NDArray[np.uint8]:
        """Return the images of these numbers."""
        paths = [self._paths[number] for number in numbers]
        return ImageFiles(paths, asked.channels, asked.size, self._storage).decoded()
