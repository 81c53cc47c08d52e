import errno
import fcntl
import io
import multiprocessing
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from regtune.errors import DataMissing, InvalidData
from regtune.task import Data, Storage
from worker.errors import NoRoom
from worker.tasks import decoding
from worker.tasks.decoding import ImageFiles
from worker.tasks.image_folder import image_folder

COLOURS = {"blue": (0, 0, 250), "green": (0, 200, 0), "red": (250, 0, 0)}


def paint(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (40, 24)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """Ten images of each colour, in files of several kinds and sizes."""
    for name, colour in COLOURS.items():
        for number in range(10):
            kind = ("png", "jpg", "bmp")[number % 3]
            paint(tmp_path / "data" / "all" / name / f"{number}.{kind}", colour, (24 + number, 24))
        paint(tmp_path / "data" / "tests" / name / "deeper" / "0.png", colour)
    return Storage(tmp_path / "data")


def load(storage: Storage, **settings: Any) -> Data:
    return image_folder(storage, **{"path": "all", "size": 16, **settings})


def test_each_folder_is_a_class_and_a_fixed_fifth_is_for_the_test(storage):
    data = load(storage)
    assert (data.train_x.shape, data.test_x.shape) == ((24, 3, 16, 16), (6, 3, 16, 16))
    assert (data.train_x.dtype, data.train_y.dtype) == (np.uint8, np.int64)
    assert data.classes == 3
    assert np.bincount(data.test_y).tolist() == [2, 2, 2]
    colours = np.array(list(COLOURS.values()))
    np.testing.assert_allclose(data.train_x.mean((2, 3)), colours[data.train_y], atol=3)
    assert data.content_hash() == load(storage).content_hash()


def test_the_test_rows_may_have_a_folder_of_their_own(storage):
    data = load(storage, test_path="tests")
    assert (len(data.train_y), data.test_y.tolist()) == (30, [0, 1, 2])


def test_images_may_be_of_brightness_alone(storage):
    assert load(storage, channels=1).train_x.shape == (24, 1, 16, 16)


def save_two_classes(folder: Path, image: Image.Image, kind: str, **options: Any) -> None:
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        for number in range(5):
            image.save(folder / name / f"{number}.{kind}", **options)


@pytest.mark.parametrize("kind", ["png", "tif"])
def test_sixteen_bits_are_scaled_to_eight(storage, kind):
    ramp = np.arange(256, dtype=np.uint16)[:, None] * 256 + np.zeros((1, 256), np.uint16)
    save_two_classes(storage.data_dir / "deep", Image.fromarray(ramp), kind)
    data = load(storage, path="deep", size=256, channels=1)
    np.testing.assert_array_equal(data.train_x[0, 0, :, 0], np.arange(256))


def test_thirty_two_bits_are_refused(storage):
    save_two_classes(storage.data_dir / "deep", Image.new("F", (20, 20), 0.5), "tif")
    with pytest.raises(InvalidData, match="32 bits a pixel"):
        load(storage, path="deep")


def test_an_image_is_turned_as_its_camera_was(storage):
    image = Image.new("L", (20, 20))
    image.paste(255, (0, 0, 20, 10))  # the upper half is white
    exif = image.getexif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned by 90 degrees, clockwise
    save_two_classes(storage.data_dir / "turned", image, "png", exif=exif)
    x = load(storage, path="turned", size=20, channels=1).train_x
    assert x[..., 12:].min() == 255
    assert x[..., :8].max() == 0


@pytest.mark.parametrize("kind", ["png", "tiff", "webp", "jpeg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_as_pillow_turns_it(orientation, kind):
    rng = np.random.default_rng(0)
    image, file = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8)), io.BytesIO()
    exif = image.getexif()
    exif[ExifTags.Base.Orientation] = orientation
    image.save(file, kind, exif=exif)
    turned = decoding._upright(Image.open(file))
    assert np.array_equal(np.asarray(turned), np.asarray(ImageOps.exif_transpose(Image.open(file))))


def entry(tag: int, kind: int, count: int, value: bytes) -> bytes:
    """One of the notes of EXIF, in little-endian TIFF."""
    return struct.pack("<HHI", tag, kind, count) + value.ljust(4, b"\0")


TURNED = entry(ExifTags.Base.Orientation, 3, 1, b"\6")
RESOLVED_AS_TEXT = entry(ExifTags.Base.XResolution, 2, 4, b"fine")


@pytest.mark.parametrize(
    "notes", [b"garbage", b"II*\0\x08\0\0\0\2\0" + TURNED + RESOLVED_AS_TEXT + bytes(4)]
)
def test_no_image_is_refused_for_what_its_camera_has_noted(storage, notes):
    image = Image.new("RGB", (20, 20), (9, 9, 9))
    save_two_classes(storage.data_dir / "noted", image, "png", exif=b"Exif\0\0" + notes)
    assert load(storage, path="noted", size=20).train_x.shape[1:] == (3, 20, 20)


def test_a_broken_image_is_named_whatever_pillow_raises(storage):
    broken = storage.data_dir / "all" / "red" / "broken.ppm"
    broken.write_bytes(b"P6\n12 x\n255\n")
    with pytest.raises(InvalidData, match=r"broken\.ppm' cannot be read"):
        load(storage)


def test_the_shorter_side_is_resized_and_the_middle_cut_out(storage, tmp_path):
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 255
    for name in ("a", "b"):
        for number in range(5):
            path = tmp_path / "data" / "wide" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(wide).save(path)
    data = load(storage, path="wide", size=20)
    np.testing.assert_array_equal(data.train_x, 255)


def test_a_folder_must_lie_under_a_root_and_so_must_what_it_links_to(storage, tmp_path):
    paint(tmp_path / "secret" / "a" / "0.png", (1, 2, 3))
    for outside in ("../secret", str(tmp_path / "secret")):
        with pytest.raises(InvalidData, match="not under a root"):
            load(storage, path=outside)
    (tmp_path / "data" / "all" / "red" / "link.png").symlink_to(tmp_path / "secret" / "a" / "0.png")
    with pytest.raises(InvalidData, match="not under a root"):
        load(storage)


def test_what_is_wrong_is_said(storage, tmp_path):
    with pytest.raises(InvalidData, match="there is no folder 'gone'"):
        load(storage, path="gone")
    with pytest.raises(InvalidData, match="folder of the worker's own machine"):
        load(storage, path="s3://bucket/all")
    (tmp_path / "data" / "empty" / "a").mkdir(parents=True)
    with pytest.raises(InvalidData, match="no valid file for the classes a") as wrong:
        load(storage, path="empty")
    assert wrong.type is InvalidData  # wherever the folder is
    (tmp_path / "data" / "flat").mkdir()
    with pytest.raises(DataMissing, match="'flat' cannot be read: Couldn't find any class folder"):
        load(storage, path="flat")
    paint(tmp_path / "data" / "tests" / "yellow" / "0.png", (200, 200, 0))
    with pytest.raises(InvalidData, match=re.escape("are blue, green, red, but those in 'tests'")):
        load(storage, test_path="tests")
    (tmp_path / "data" / "all" / "red" / "broken.png").write_bytes(b"not an image")
    with pytest.raises(InvalidData, match=r"broken\.png' cannot be read: cannot identify image"):
        load(storage)


@pytest.fixture
def mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all images lie in files."""
    monkeypatch.setattr(decoding, "MAPPED_BYTES", 0)
    monkeypatch.setattr(decoding, "BLOCK", 5)


def files(storage: Storage) -> list[Path]:
    return sorted((storage.data_dir / decoding.FOLDER).glob("*.u8"))


def test_images_that_take_much_memory_are_mapped_from_a_file_and_are_the_same(storage, monkeypatch):
    in_memory = load(storage)
    assert not isinstance(in_memory.train_x, np.memmap)
    assert files(storage) == []
    monkeypatch.setattr(decoding, "MAPPED_BYTES", 24 * 3 * 16 * 16 - 1)
    data = load(storage)
    assert isinstance(data.train_x, np.memmap)
    assert not isinstance(data.test_x, np.memmap)
    assert data.content_hash() == in_memory.content_hash()
    assert [path.stat().st_size for path in files(storage)] == [24 * 3 * 16 * 16]


def test_the_file_is_found_again_for_the_same_images_and_for_no_others(
    storage, mapped, monkeypatch
):
    first = load(storage)
    with monkeypatch.context() as patch:
        patch.setattr(decoding.Image, "open", lambda *_: 1 / 0)
        assert load(storage).content_hash() == first.content_hash()
        with pytest.raises(InvalidData, match="division by zero"):
            load(storage, size=8)
    assert len(files(storage)) == 2
    paint(storage.data_dir / "all" / "red" / "0.png", (0, 0, 0))
    assert load(storage).content_hash() != first.content_hash()
    assert len(files(storage)) > 2


def test_a_file_that_is_not_whole_is_written_anew(storage, mapped):
    whole = load(storage).content_hash()
    for path in files(storage):
        path.write_bytes(b"cut off")
    assert load(storage).content_hash() == whole


def test_of_a_file_that_could_not_be_finished_nothing_stays(storage, mapped):
    (storage.data_dir / "all" / "red" / "broken.png").write_bytes(b"not an image")
    with pytest.raises(InvalidData, match=r"broken\.png' cannot be read"):
        load(storage)
    assert not list((storage.data_dir / decoding.FOLDER).glob("*.part"))


def test_a_file_bears_its_name_only_once_it_would_outlive_a_loss_of_power(
    storage, mapped, monkeypatch
):
    folder = storage.data_dir / decoding.FOLDER
    steps: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def note_fsync(descriptor: int) -> None:
        steps.append("folder" if os.path.samestat(os.fstat(descriptor), folder.stat()) else "file")
        fsync(descriptor)

    def note_replace(self: Path, target: Path) -> Path:
        steps.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "replace", note_replace)
    load(storage)
    assert steps == ["file", "rename", "folder"] * 2  # the training rows, and the test rows


def test_what_a_killed_worker_had_begun_is_removed_and_what_another_writes_is_not(storage, mapped):
    folder = storage.data_dir / decoding.FOLDER
    folder.mkdir()
    for name in ("killed", "writing"):
        (folder / f"{name}.part").write_bytes(b"half")
    with (folder / "writing.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        load(storage)
    assert [path.name for path in folder.glob("*.part")] == ["writing.part"]


def test_a_thread_holds_no_more_than_some_bytes_of_images_at_a_time(tmp_path, monkeypatch):
    paths = [Path(str(number)) for number in range(130)]
    for size, count in ((16, decoding.BLOCK), (1024, 5), (8192, 1)):
        images = ImageFiles(paths, 3, size, Storage(tmp_path))
        blocks = images._in_threads(lambda some: some.stop - some.start)
        assert (sum(blocks), max(blocks)) == (130, count)


def _load_mapped(data_dir: Path, start: Any, told: Any) -> None:
    decoding.MAPPED_BYTES, decoding.BLOCK = 0, 2
    written, write = [], decoding.ImageFiles._write

    def count(*arguments: Any) -> None:
        written.append(1)
        write(*arguments)

    decoding.ImageFiles._write = count
    start.wait(60)
    told.put((load(Storage(data_dir)).content_hash(), len(written)))


@pytest.mark.slow
def test_workers_that_want_the_same_images_at_once_decode_them_once(storage, mapped):
    context = multiprocessing.get_context("spawn")
    start, told = context.Barrier(3), context.Queue()
    workers = [
        context.Process(target=_load_mapped, args=(storage.data_dir, start, told)) for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    hashes, written = zip(*(told.get(timeout=120) for _ in workers), strict=True)
    for worker in workers:
        worker.join()
    assert set(hashes) == {load(storage).content_hash()}
    assert sum(written) == 2  # the training rows, and the test rows


def full_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    free = SimpleNamespace(total=10, used=3, free=7)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)


def full_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a file system says it when there was room at first."""
    replace = Path.replace

    def fail(self: Path, target: Path) -> Path:
        if self.suffix == ".part":
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail)


@pytest.mark.parametrize("fill", [full_at_once, full_in_the_middle])
def test_a_full_disk_is_said_with_sizes_and_what_to_do(
    storage, mapped, monkeypatch, fill: Callable[[pytest.MonkeyPatch], None]
):
    fill(monkeypatch)
    with pytest.raises(NoRoom, match=r"24 images of 16 × 16 take .* GB decoded, but .* free"):
        load(storage)
    assert {path.suffix for path in (storage.data_dir / decoding.FOLDER).iterdir()} == {".lock"}


def test_images_that_change_while_they_are_read_are_noticed(storage, mapped, monkeypatch):
    digests = decoding.ImageFiles._digests

    def paint_over(self: decoding.ImageFiles, some: slice) -> list[bytes]:
        found = digests(self, some)
        for path in self.paths[some]:
            paint(path, (9, 9, 9))
        return found

    monkeypatch.setattr(decoding.ImageFiles, "_digests", paint_over)
    with pytest.raises(InvalidData, match="was changed while it was read"):
        load(storage)
