"""Checkpoints in an object store that others use as well, and that may be slow."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path

import fsspec
import pytest
from sqlalchemy import Engine, text

from regtune.errors import InvalidData
from regtune.settings import Settings
from regtune.studies import Study
from regtune.task import Storage
from tests import builders
from tests.audit import audit
from tests.object_store import ObjectStore
from tests.threads import working
from tests.unit.test_checkpoints import LEASE, STUDY, saved
from tests.waiting import wait_until
from worker.checkpoints import CheckpointStore
from worker.tasks.files import opened

LEASE_SECONDS = 6.0
SECONDS = 120


def test_what_another_process_has_written_meanwhile_is_seen_and_removed(folder_in_s3: str) -> None:
    store = CheckpointStore(folder_in_s3)
    store.write(STUDY, LEASE, saved(1))
    assert store.trials(STUDY) == {3}
    (study,) = store.studies()
    elsewhere = fsspec.filesystem("s3", skip_instance_cache=True)
    (folder,) = elsewhere.ls(folder_in_s3, detail=False)
    for trial in ("4", "31"):
        elsewhere.copy(f"{folder}/3/", f"{folder}/{trial}/", recursive=True)
    assert store.trials(STUDY) == {3, 4, 31}
    store.remove(STUDY, [4])
    assert store.trials(STUDY) == {3, 31}
    store.remove(STUDY, [3])
    assert store.trials(STUDY) == {31}
    store.remove_study(study)
    assert store.studies() == set()


def test_a_bucket_that_is_not_there_is_told_by_its_first_write(folder_in_s3: str) -> None:
    store = CheckpointStore("s3://no-such-bucket/checkpoints")
    assert store.studies() == set()
    with pytest.raises(OSError, match="bucket does not exist"):
        store.write(STUDY, LEASE, saved(1))


def test_a_table_is_read_from_a_bucket_under_a_root_of_the_worker(
    folder_in_s3: str, tmp_path: Path
) -> None:
    fsspec.filesystem("s3").pipe_file(f"{folder_in_s3}/t.csv", b"a,y")
    storage = Storage(tmp_path, (folder_in_s3,))
    with opened(f"{folder_in_s3}/t.csv", storage) as file:
        assert file.read() == b"a,y"
    with pytest.raises(InvalidData, match="there is no file"):
        opened(f"{folder_in_s3}/u.csv", storage).__enter__()


@contextmanager
def silent(store: ObjectStore) -> Iterator[None]:
    """A time in which a store takes whatever it is sent, and says nothing."""
    store.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        store.process.send_signal(signal.SIGCONT)


@pytest.fixture
def settings(tmp_path: Path, folder_in_s3: str, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Of workers that keep checkpoints in the store."""
    monkeypatch.setenv("REGTUNE_CHECKPOINTS", folder_in_s3)
    return Settings(data_dir=tmp_path, lanes=1, poll_seconds=0.1, lease_seconds=LEASE_SECONDS)


def given_back(engine: Engine, database_url: str, settings: Settings, max_epochs: int) -> Study:
    """A study with one trial, begun and checkpointed by a worker that was told to stop."""
    study = builders.create(engine, training={"max_epochs": max_epochs}, pruner="none")
    builders.append(engine, study, 1)
    with working(database_url, settings, "first"):
        wait_until(lambda: of_the_trial(engine, "epochs"), 60)
    assert of_the_trial(engine, "state") == "waiting"
    return study


@pytest.mark.slow
def test_leases_are_renewed_while_checkpoints_are_read_for_longer_than_they_last(
    engine: Engine, database_url: str, settings: Settings, s3: ObjectStore
) -> None:
    study = given_back(engine, database_url, settings, max_epochs=100)
    with silent(s3), working(database_url, settings, "second"):
        wait_until(lambda: of_the_trial(engine, "worker") == "second", SECONDS)
        first: datetime = of_the_trial(engine, "lease_expires_at")
        longer = first + timedelta(seconds=LEASE_SECONDS)
        wait_until(lambda: of_the_trial(engine, "lease_expires_at") > longer, SECONDS)
        s3.process.send_signal(signal.SIGCONT)
        wait_until(lambda: builders.states(engine, study) == ["complete"], SECONDS)
    assert (of_the_trial(engine, "attempt"), of_the_trial(engine, "lost_leases")) == (2, 0)
    with engine.connect() as connection:
        resumed = "SELECT 1 FROM regtune.events WHERE kind = 'trial_resumed'"
        assert connection.execute(text(resumed)).all()
    assert audit(engine) == {}


def test_a_worker_that_is_told_to_stop_while_it_reads_checkpoints_gives_their_trials_back(
    engine: Engine, database_url: str, settings: Settings, s3: ObjectStore
) -> None:
    given_back(engine, database_url, settings, max_epochs=300)
    with silent(s3):
        with working(database_url, settings, "second"):
            wait_until(lambda: of_the_trial(engine, "worker") == "second", 60)
        assert of_the_trial(engine, "state") == "waiting"
    assert (of_the_trial(engine, "attempt"), of_the_trial(engine, "lost_leases")) == (2, 0)
    assert audit(engine) == {}


def of_the_trial(engine: Engine, column: str):
    """A column of the only trial that there is."""
    with engine.connect() as connection:
        return connection.execute(text(f"SELECT {column} FROM regtune.trials")).scalar_one()
