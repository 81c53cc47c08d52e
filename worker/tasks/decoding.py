"""Images from their files to one array of bytes: in memory, or in a file that is mapped into it.

The file lies in the folder ``decoded`` of the data folder, under a hash of what is in the images'
own files and of how they are decoded. Whoever wants the same images again, another worker on the
machine too, finds it there.
"""

import errno
import fcntl
import hashlib
import io
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from time import perf_counter
from typing import TypeVar

import numpy as np
import PIL
import structlog
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from regtune.errors import InvalidData
from regtune.programs import cores
from regtune.task import Storage
from worker.errors import NoRoom
from worker.tasks.files import opened
from worker.tasks.locking import alone

log = structlog.get_logger()

MAPPED_BYTES = 2**30
"""Decoded images that take more than this lie in a file."""

BLOCK, BLOCK_BYTES = 64, 2**24
"""Images that a thread takes at a time, and what they take decoded; one may be larger than that."""

DECODING = 2
"""Changes with what is made of an image; what was kept before is decoded anew."""

FOLDER = "decoded"
"""Where those files lie in the data folder; ``images`` would be a likely name of somebody's own."""

_DRAFT, _LOCK = ".part", ".lock"

_FULL = (errno.ENOSPC, errno.EDQUOT)

Bytes = NDArray[np.uint8]
T = TypeVar("T")


@dataclass(frozen=True)
class ImageFiles:
    """Files of images, and what is to become of each: ``(channels, size, size)``.

    The shorter side is resized to ``size``, and the middle is cut out.
    """

    paths: Sequence[Path]
    channels: int
    size: int
    storage: Storage

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of all decoded images."""
        return len(self.paths), self.channels, self.size, self.size

    def decoded(self) -> Bytes:
        """Return all images, ``(rows, channels, size, size)``; raise InvalidData.

        What does not fit in ``MAPPED_BYTES`` can only be read, and lies in a file. Raises NoRoom if
        that file cannot be had on this machine.
        """
        if prod(self.shape) > MAPPED_BYTES:
            return self._mapped()
        whole = np.empty(self.shape, np.uint8)

        def decode(some: slice) -> None:
            for place, path in enumerate(self.paths[some], some.start):
                whole[place] = self._decoded(self._content(path), path)

        self._in_threads(decode)
        return whole

    def _mapped(self) -> Bytes:
        digests = [digest for some in self._in_threads(self._digests) for digest in some]
        how = f"{DECODING} {PIL.__version__} {self.channels} {self.size} {len(digests)}"
        key = hashlib.sha256(how.encode() + b"".join(digests)).hexdigest()
        folder = self.storage.data_dir / FOLDER
        target = folder / f"{key}.u8"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with alone(target.with_suffix(_LOCK)):
                if not target.is_file() or target.stat().st_size != prod(self.shape):
                    self._write(target, digests)
            return np.memmap(target, np.uint8, "r", shape=self.shape)
        except OSError as error:  # of this folder: what is wrong with an image is InvalidData
            raise NoRoom(f"decoded images cannot be kept in {str(folder)!r}: {error}") from error

    def _write(self, target: Path, digests: Sequence[bytes]) -> None:
        """Decode into a file that bears its name only once it is whole."""
        started = perf_counter()
        draft = target.with_suffix(_DRAFT)
        _remove_left_behind(target.parent)
        self._check_room(target.parent)

        def decode(some: slice) -> None:
            block = np.empty((some.stop - some.start, *self.shape[1:]), np.uint8)
            for place, path in enumerate(self.paths[some]):
                content = self._content(path)
                if hashlib.sha256(content).digest() != digests[some.start + place]:
                    raise InvalidData(f"{str(path)!r} was changed while it was read")
                block[place] = self._decoded(content, path)
            # Written, not mapped: on a disk that is full, a mapped page would kill the process.
            with draft.open("r+b") as file:
                file.seek(some.start * prod(self.shape[1:]))
                file.write(block.data)

        try:
            draft.write_bytes(b"")
            self._in_threads(decode)
            _reach_disk(draft)  # else the name might outlive a loss of power, and the bytes not
            draft.replace(target)
            _reach_disk(target.parent)
        except OSError as error:
            if error.errno in _FULL:
                raise self._no_room(target.parent) from error
            raise
        finally:
            draft.unlink(missing_ok=True)
        seconds = round(perf_counter() - started, 1)
        log.info("images_decoded", images=len(self.paths), seconds=seconds, file=str(target))

    def _check_room(self, folder: Path) -> None:
        if shutil.disk_usage(folder).free < prod(self.shape):
            raise self._no_room(folder)

    def _no_room(self, folder: Path) -> NoRoom:
        free = shutil.disk_usage(folder).free / 1e9
        return NoRoom(
            f"{len(self.paths)} images of {self.size} × {self.size} take "
            f"{prod(self.shape) / 1e9:.3g} GB decoded, but {str(folder)!r} has {free:.3g} GB free; "
            "make room there, let REGTUNE_DATA_DIR name a larger disk, or take a smaller "
            "task.data.size"
        )

    def _digests(self, some: slice) -> list[bytes]:
        return [hashlib.sha256(self._content(path)).digest() for path in self.paths[some]]

    def _content(self, path: Path) -> bytes:
        with opened(str(path), self.storage) as file:
            return file.read()

    def _decoded(self, content: bytes, path: Path) -> Bytes:
        try:
            image = _as_bytes(_upright(Image.open(io.BytesIO(content))), path)
            image = image.convert("RGB" if self.channels == 3 else "L")
        except (InvalidData, MemoryError):
            raise
        except Exception as error:  # noqa: BLE001 - of broken files Pillow raises anything
            raise InvalidData(f"{str(path)!r} cannot be read: {error}") from None
        fitted = ImageOps.fit(image, (self.size, self.size), Image.Resampling.BILINEAR)
        return np.asarray(fitted).reshape(self.size, self.size, self.channels).transpose(2, 0, 1)

    def _in_threads(self, work: Callable[[slice], T]) -> list[T]:
        """Return what ``work`` returns for each block of images, in their order.

        Threads do, since a codec holds no interpreter lock while it computes.
        """
        block = max(1, min(BLOCK, BLOCK_BYTES // prod(self.shape[1:])))
        begins = range(0, len(self.paths), block)
        pool = ThreadPoolExecutor(cores(), "images")
        try:
            futures = [
                pool.submit(work, slice(begin, min(begin + block, len(self.paths))))
                for begin in begins
            ]
            return [future.result() for future in futures]
        finally:
            pool.shutdown(cancel_futures=True)


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What EXIF's orientations ask for; 1 is upright."""


def _upright(image: Image.Image) -> Image.Image:
    """Return an image turned as its camera has noted, unless the notes cannot be read.

    ``ImageOps.exif_transpose`` also writes the other notes anew, and fails if one of them is wrong.
    """
    image.load()  # which turns a TIFF already, and takes the note away
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # noqa: BLE001 - of broken notes Pillow raises anything
        return image
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def _as_bytes(image: Image.Image, path: Path) -> Image.Image:
    """Return an image of 8 bits a channel: Pillow would cut more of them off, not scale them."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise InvalidData(
            f"{str(path)!r} has 32 bits a pixel, of which nobody knows what is white; write it "
            "with 8 or 16"
        )
    return image


def _reach_disk(path: Path) -> None:
    """Wait until what was written to a file, or renamed in a folder, would outlive a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_left_behind(folder: Path) -> None:
    """Remove drafts that nobody writes any more: of workers that were killed."""
    for draft in folder.glob(f"*{_DRAFT}"):
        with suppress(BlockingIOError), alone(draft.with_suffix(_LOCK), fcntl.LOCK_NB):
            draft.unlink(missing_ok=True)
