"""Workers that come and go, with their checkpoints in an object store."""

import re
from collections import defaultdict

import fsspec
import pytest
from sqlalchemy import Engine, text

from tests import builders
from tests.audit import audit
from tests.object_store import BUCKET, object_store
from tests.system.test_workers import SECONDS, curves, is_over
from tests.waiting import wait_until
from tests.working import worker_process

CHANGES = {
    "task": {"dataset": "digits", "model": "mlp", "hidden": [16]},
    # Adam's first steps would make much of how a recorded step rounds.
    "training": {"max_epochs": 40, "batch_size": 32, "optimizer": "sgd"},
    "budget": {"trials": 2},
    "pruner": "none",
}
RESUMED = (
    "SELECT (detail ->> 'epoch')::int FROM regtune.events WHERE kind = 'trial_resumed'"
    " ORDER BY at, number"
)


class Bucket:
    """What workers keep in a folder of a bucket."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._files = fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False)

    def kept(self) -> list[list[str]]:
        """The checkpoints of each trial, by its id; the last one last."""
        trials = defaultdict(list)
        for path in sorted(self._files.find(self._folder)):
            if path.endswith(".safetensors"):  # an empty folder is found as itself
                trials[int(path.split("/")[-2])].append(path)
        return [trials[id_] for id_ in sorted(trials)]

    def cut_short(self, path: str) -> None:
        """Take the end of an object away."""
        self._files.pipe_file(path, self._files.cat_file(path)[:-100])


def epochs_of(path: str) -> int:
    """How many epochs a checkpoint's name says it holds."""
    (epochs,) = re.findall(r"/\d+-(\d+)-\w+\.safetensors$", path)
    return int(epochs)


def lose_leases(engine: Engine) -> None:
    """Let the time of all leases pass."""
    with engine.begin() as connection:
        connection.execute(text("UPDATE regtune.trials SET lease_expires_at = now()"))


@pytest.mark.usefixtures("scheduler")
@pytest.mark.slow
def test_trials_of_a_killed_and_of_a_stopped_worker_go_on_from_the_bucket_to_the_same_numbers(
    engine: Engine, database_url: str, folder_in_s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REGTUNE_CHECKPOINTS", folder_in_s3)
    monkeypatch.setenv("REGTUNE_CHECKPOINT_SECONDS", "0.5")
    bucket = Bucket(folder_in_s3)
    whole = builders.create(engine, "whole", **CHANGES)
    with worker_process(database_url, "steady"):
        wait_until(lambda: is_over(engine, whole), SECONDS)
        wait_until(lambda: not bucket.kept(), SECONDS)
    cut = builders.create(engine, "cut", **CHANGES)

    with worker_process(database_url, "doomed") as doomed:
        wait_until(lambda: [len(paths) for paths in bucket.kept()] == [2, 2], SECONDS)
        doomed.kill()
        doomed.wait()
    lose_leases(engine)
    wait_until(lambda: builders.states(engine, cut) == ["waiting"] * 2, SECONDS)
    (before, newest), (_, others) = bucket.kept()
    bucket.cut_short(newest)

    with worker_process(database_url, "spot") as spot:
        wait_until(lambda: len(builders.column(engine, RESUMED)) == 2, SECONDS)
        assert builders.column(engine, RESUMED) == [epochs_of(before), epochs_of(others)]
        spot.terminate()
        assert spot.wait(10) == 0
    assert builders.states(engine, cut) == ["waiting"] * 2

    with worker_process(database_url, "heir"):
        wait_until(lambda: is_over(engine, cut), SECONDS)
        wait_until(lambda: not bucket.kept(), SECONDS)
    for number in range(2):
        expected, curve = (curves(engine, study, number) for study in (whole, cut))
        last = [row for row in curve if row.attempt == 3]
        assert [row.epoch for row in last] == [row.epoch for row in expected]
        losses = [row.validation_loss for row in last]
        assert losses == pytest.approx([row.validation_loss for row in expected], rel=1e-3)
    assert audit(engine) == {}


@pytest.mark.usefixtures("scheduler")
@pytest.mark.slow
def test_training_goes_on_while_the_bucket_is_away(
    engine: Engine, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = builders.create(engine, **CHANGES)
    with object_store() as store:
        for name, value in store.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("REGTUNE_CHECKPOINTS", f"s3://{BUCKET}")
        monkeypatch.setenv("REGTUNE_CHECKPOINT_SECONDS", "0.5")
        bucket = Bucket(BUCKET)
        with worker_process(database_url, "spot") as spot:
            wait_until(lambda: len(bucket.kept()) == 2, SECONDS)
            spot.terminate()
            assert spot.wait(10) == 0
    assert builders.states(engine, study) == ["waiting"] * 2

    with worker_process(database_url, "heir") as heir:
        wait_until(lambda: is_over(engine, study), SECONDS)
        endless = {**CHANGES["training"], "max_epochs": 5000}
        more = builders.create(engine, "more", **{**CHANGES, "training": endless})
        trained = f"SELECT 1 FROM regtune.trials WHERE study_id = {more.study_id} AND epochs > 9"
        wait_until(lambda: builders.column(engine, trained), SECONDS)
        heir.terminate()
        assert heir.wait(10) == 0
    assert set(builders.states(engine, study)) == {"complete"}
    assert builders.states(engine, more) == ["waiting"] * 2
    assert builders.column(engine, "SELECT max(lost_leases) FROM regtune.trials") == [0]
    assert audit(engine) == {}
