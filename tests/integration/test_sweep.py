"""Checkpoints that nobody needs any more go away, though whoever wrote them is gone."""

from datetime import timedelta
from pathlib import Path

import pytest
import torch
from sqlalchemy import Engine

from regtune import studies
from regtune.database import transaction
from regtune.leasing import Lease
from regtune.settings import Settings
from regtune.studies import Study
from tests import builders
from tests.threads import working
from tests.waiting import wait_until
from worker.checkpoints import CheckpointStore, Saved
from worker.training.checkpoint import Checkpoint

SAVED = Saved(Checkpoint({"weights": torch.ones(2)}, {"epoch": 1}), [builders.epoch(1)])


def begun(engine: Engine, name: str, store: CheckpointStore, trials: int) -> list[Lease]:
    """Trials of a new study, leased by a worker that has checkpointed them."""
    study = builders.create(engine, name)
    builders.append(engine, study, trials)
    leases = list(builders.lease(engine, study, trials, "gone"))
    for lease in leases:
        store.write(study, lease, SAVED)
    return leases


def find(engine: Engine, name: str) -> Study:
    with transaction(engine) as session:
        return studies.find(session, name)


def cancel(engine: Engine, name: str) -> None:
    with transaction(engine) as session:
        studies.act(session, name, "cancel", "test")


@pytest.fixture(params=["folder", "s3://"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where checkpoints are kept."""
    if request.param == "folder":
        return str(tmp_path / "checkpoints")
    folder: str = request.getfixturevalue("folder_in_s3")
    return folder


def test_what_is_over_is_swept_and_nothing_that_is_needed_or_of_another_database(
    engine: Engine, database_url: str, tmp_path: Path, root: str, monkeypatch
) -> None:
    monkeypatch.setenv("REGTUNE_CHECKPOINTS", root)
    store = CheckpointStore(root)
    ended, running = begun(engine, "live", store, 2)
    begun(engine, "over", store, 1)
    begun(engine, "deleted", store, 1)
    builders.complete(engine, [ended])
    live, over, deleted = (find(engine, name) for name in ("live", "over", "deleted"))
    strangers = [
        Study(**{**vars(one), "created_at": one.created_at + timedelta(microseconds=1)})
        for one in (live, over, deleted)
    ]
    for stranger in strangers:
        store.write(stranger, ended, SAVED)
    for name in ("over", "deleted"):
        cancel(engine, name)
    with transaction(engine) as session:
        studies.delete(session, "deleted", "test")

    settings = Settings(data_dir=tmp_path, sweep_seconds=0.1, poll_seconds=0.1)
    with working(database_url, settings):
        wait_until(lambda: not store.trials(over) and not store.trials(deleted))
        wait_until(lambda: store.trials(live) == {running.trial_id})
        for _ in range(
            2
        ):  # by a worker that does not know yet; so the sweep before was a whole one
            store.write(over, ended, SAVED)
            wait_until(lambda: not store.trials(over))
    assert store.trials(live) == {running.trial_id}
    assert {one.created_at for one in store.studies()} == {
        live.created_at,
        *(stranger.created_at for stranger in strangers),
    }
    for stranger in strangers:
        assert store.trials(stranger) == {ended.trial_id}
