from pathlib import Path

import fsspec
import pytest

from regtune.errors import InvalidData
from regtune.settings import Settings
from regtune.task import Storage
from worker.tasks.files import opened


def read(address: str, storage: Storage) -> bytes:
    with opened(address, storage) as file:
        return file.read()


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    for folder in ("data", "tables", "tables-of-others", "secret"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "t.csv").write_text(folder)
    fsspec.filesystem("memory").pipe("/open/t.csv", b"remote")
    fsspec.filesystem("memory").pipe("/opener/t.csv", b"remote, elsewhere")
    return Storage(tmp_path / "data", (str(tmp_path / "tables"), "memory://open"))


def test_what_is_under_a_root_is_read_whatever_way_it_is_named(storage, tmp_path):
    assert read("t.csv", storage) == b"data"
    assert read(f"{tmp_path}/data/../data/t.csv", storage) == b"data"
    assert read(f"{tmp_path}/tables/t.csv", storage) == b"tables"
    assert read(f"file://{tmp_path}/tables/t.csv", storage) == b"tables"
    assert read("memory://open/t.csv", storage) == b"remote"


@pytest.mark.parametrize(
    "address",
    [
        "/etc/passwd",
        "../secret/t.csv",
        "{tmp_path}/secret/t.csv",
        "file://{tmp_path}/secret/t.csv",
        "local://{tmp_path}/tables/../secret/t.csv",
        "{tmp_path}/tables-of-others/t.csv",
        "link/t.csv",
        "memory://opener/t.csv",
        "memory://open/../opener/t.csv",
        "memory://open/%2e%2e/opener/t.csv",
        "memory://elsewhere/t.csv",
        "simplecache::memory://open/t.csv",
        "http://169.254.169.254/latest/meta-data",
        "FILE://{tmp_path}/secret/t.csv",
    ],
)
def test_what_is_not_under_a_root_is_refused_there_or_not(address, storage, tmp_path):
    (tmp_path / "data" / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(InvalidData, match="not under a root that this worker may read from"):
        read(address.format(tmp_path=tmp_path), storage)


def test_the_name_of_a_local_file_is_nothing_but_a_name(storage, tmp_path):
    """To fsspec, what follows a double colon is another file system's."""
    (tmp_path / "data" / "link.csv").symlink_to(tmp_path / "secret" / "t.csv")
    with pytest.raises(InvalidData, match=r"there is no file 'link.csv::y'"):
        read("link.csv::y", storage)
    (tmp_path / "data" / "own.csv::y").write_text("own")
    assert read("own.csv::y", storage) == b"own"


def test_a_file_that_is_not_there_is_said_to_be_missing(storage):
    with pytest.raises(InvalidData, match=r"there is no file 'gone.csv'"):
        read("gone.csv", storage)


def test_roots_come_from_the_environment_with_commas_between(monkeypatch):
    monkeypatch.setenv("REGTUNE_DATA_ROOTS", "/mnt/tables, s3://bucket/tables,")
    assert Settings().data_roots == ("/mnt/tables", "s3://bucket/tables")
    monkeypatch.delenv("REGTUNE_DATA_ROOTS")
    assert Settings().data_roots == ()
