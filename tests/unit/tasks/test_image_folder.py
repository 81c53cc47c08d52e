import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from regtune.errors import InvalidData
from regtune.task import Data, Storage
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
    with pytest.raises(InvalidData, match="no valid file for the classes a"):
        load(storage, path="empty")
    (tmp_path / "data" / "flat").mkdir()
    with pytest.raises(InvalidData, match="'flat' cannot be read: Couldn't find any class folder"):
        load(storage, path="flat")
    paint(tmp_path / "data" / "tests" / "yellow" / "0.png", (200, 200, 0))
    with pytest.raises(InvalidData, match=re.escape("are blue, green, red, but those in 'tests'")):
        load(storage, test_path="tests")
    (tmp_path / "data" / "all" / "red" / "broken.png").write_bytes(b"not an image")
    with pytest.raises(InvalidData, match=r"broken\.png' cannot be read: cannot identify image"):
        load(storage)
