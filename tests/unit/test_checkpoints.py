"""Where checkpoints are kept: any file system, whole or not at all."""

import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from math import inf, nan
from pathlib import Path

import fsspec
import pyarrow.fs
import pytest
import torch
from fsspec.implementations.arrow import ArrowFSWrapper
from structlog.testing import capture_logs

from regtune.errors import RegtuneError
from regtune.leasing import Lease
from regtune.studies import Study
from tests import builders
from worker.checkpoints import CheckpointStore, CheckpointWriter, Saved
from worker.training.checkpoint import Checkpoint

STUDY = Study(
    study_id=7,
    name="study",
    spec=builders.spec(),
    model=None,
    state="active",
    reason=None,
    priority=1,
    budget_trials=5,
    budget_seconds=None,
    budget_trial_epochs=None,
    appended=0,
    created_at=datetime.now(UTC),
    finished_at=None,
)
LEASE = Lease(3, 7, 2, 1, uuid.uuid4(), {"dropout": 0.25, "patience": 4})
NEXT = replace(LEASE, attempt=2, token=uuid.uuid4())


def saved(epochs: int, fill: float = 1.0, size: int = 10) -> Saved:
    state = {"epoch": epochs, "best_epoch": 0, "best_loss": inf, "best_score": nan}
    tensors = {"parameters": torch.full((1, size), fill), "seen": torch.tensor([epochs])}
    curve = [builders.epoch(number, 0.1 + 1 / number) for number in range(1, epochs + 1)]
    return Saved(Checkpoint(tensors, state), curve)


class Remote(ArrowFSWrapper):
    """Files that are reached as over SFTP: no option is known, and no folder made unasked."""

    protocol = "remote"

    def __init__(self) -> None:
        super().__init__(pyarrow.fs.LocalFileSystem())


fsspec.register_implementation("remote", Remote, clobber=True)


@pytest.fixture(params=["folder", "file://", "memory://", "s3://", "remote://"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> CheckpointStore:
    if request.param == "s3://":
        return CheckpointStore(request.getfixturevalue("folder_in_s3"))
    if request.param == "remote://":
        return CheckpointStore(f"remote://{tmp_path}/")
    path = f"{tmp_path}/deep/er"
    return CheckpointStore(path if request.param == "folder" else request.param + path)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_what_is_read_is_what_was_written(store: CheckpointStore) -> None:
    assert store.newest(STUDY, LEASE) is None
    store.write(STUDY, LEASE, saved(3))
    found = store.newest(STUDY, NEXT)
    assert found is not None
    assert found.epochs == saved(3).epochs
    assert found.checkpoint.state["best_loss"] == inf
    assert found.checkpoint.state["best_score"] != found.checkpoint.state["best_score"]
    for name, tensor in saved(3).checkpoint.tensors.items():
        assert torch.equal(found.checkpoint.tensors[name], tensor)
        assert found.checkpoint.tensors[name].dtype == tensor.dtype


def test_the_last_attempt_counts_and_the_last_of_its_epochs(store: CheckpointStore) -> None:
    last = replace(LEASE, attempt=11)
    for lease, epochs in [(LEASE, 9), (NEXT, 2), (NEXT, 10)]:
        store.write(STUDY, lease, saved(epochs, fill=lease.attempt))
    store.write(STUDY, LEASE, saved(90))  # a worker that does not know yet that it has lost it
    found = store.newest(STUDY, last)
    assert found is not None
    assert (len(found.epochs), found.checkpoint.tensors["parameters"][0, 0]) == (10, 2)
    before_it = store.newest(STUDY, NEXT)
    assert before_it is None or len(before_it.epochs) == 90


def test_what_is_over_is_removed_and_nothing_else(store: CheckpointStore) -> None:
    other = replace(LEASE, trial_id=4, number=3)
    for lease in (LEASE, other):
        store.write(STUDY, lease, saved(1))
    assert store.trials(STUDY) == {3, 4}
    store.remove(STUDY, [3, 5])
    assert store.trials(STUDY) == {4}
    assert store.newest(STUDY, replace(other, attempt=2)) is not None


@pytest.mark.parametrize(
    "another",
    [
        (STUDY, replace(NEXT, params={"dropout": 0.3, "patience": 4})),
        (replace(STUDY, spec=builders.spec(training={"seed": 1})), NEXT),
        (replace(STUDY, spec=builders.spec(task={"dataset": "mnist", "model": "mlp"})), NEXT),
    ],
)
def test_a_checkpoint_of_another_trial_is_passed_over(store: CheckpointStore, another) -> None:
    store.write(STUDY, LEASE, saved(3))
    assert store.newest(*another) is None
    assert store.newest(replace(STUDY, priority=9), NEXT) is not None


def test_a_checkpoint_of_another_shape_is_passed_over(store: CheckpointStore) -> None:
    params = {**LEASE.params, "batch_size": 64}
    store.write(STUDY, replace(LEASE, params=params), saved(3))
    assert store.newest(STUDY, replace(NEXT, params=params)) is not None
    assert store.newest(STUDY, replace(NEXT, params={**params, "batch_size": 256})) is None


def test_a_study_of_another_database_has_a_folder_of_its_own(store: CheckpointStore) -> None:
    store.write(STUDY, LEASE, saved(3))
    assert store.newest(replace(STUDY, created_at=datetime.now(UTC)), NEXT) is None


@pytest.mark.parametrize("harm", ["cut", "emptied", "one bit", "another file"])
def test_of_a_broken_checkpoint_the_one_before_it_is_taken(tmp_path: Path, harm: str) -> None:
    store = CheckpointStore(str(tmp_path))
    for epochs in (1, 2, 3):
        store.write(STUDY, LEASE, saved(epochs))
    before, newest = files(tmp_path)
    content = bytearray(newest.read_bytes())
    content[-3] ^= 4
    newest.write_bytes(
        {
            "cut": newest.read_bytes()[:-7],
            "emptied": b"",
            "one bit": bytes(content),
            "another file": before.read_bytes(),
        }[harm]
    )
    found = store.newest(STUDY, NEXT)
    assert found is not None
    assert len(found.epochs) == 2
    before.unlink()
    assert store.newest(STUDY, NEXT) is None


@contextmanager
def full_disk(folder: Path, size: str) -> Iterator[None]:
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("only root may mount a disk that is full")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_costs_a_warning_and_leaves_the_last_checkpoint_whole(
    tmp_path: Path,
) -> None:
    with full_disk(tmp_path, "100k"), capture_logs() as logs:
        store = CheckpointStore(str(tmp_path))
        writer = CheckpointWriter(store)
        writer.write(STUDY, [(LEASE, saved(1, size=10_000))])
        writer.write(STUDY, [(LEASE, saved(2, size=100_000))])
        writer.wait(30)
        assert not writer.busy
        assert len(files(tmp_path)) == 1  # nothing half written takes up what is left
        newest = store.newest(STUDY, NEXT)
        assert newest is not None
        assert len(newest.epochs) == 1
    assert [log["event"] for log in logs] == ["checkpoint_failed"]
    assert "No space left on device" in logs[0]["error"]


def test_a_checkpoint_that_cannot_be_written_keeps_none_of_the_others_from_it(
    tmp_path: Path,
) -> None:
    store = CheckpointStore(str(tmp_path))
    store.write(STUDY, LEASE, saved(1))
    (first,) = files(tmp_path)
    in_the_way = first.parent.parent / "4"
    in_the_way.write_text("no folder")
    fourth, fifth = (replace(LEASE, trial_id=id_, number=id_) for id_ in (4, 5))
    writer = CheckpointWriter(store)
    with capture_logs() as logs:
        writer.write(STUDY, [(LEASE, saved(2)), (fourth, saved(1)), (fifth, saved(1))])
        writer.wait(30)
    assert [log["event"] for log in logs] == ["checkpoint_failed"]
    assert store.newest(STUDY, replace(NEXT, trial_id=5, number=5)) is not None


def test_an_address_that_nothing_is_installed_for_is_refused() -> None:
    with pytest.raises(RegtuneError, match="REGTUNE_CHECKPOINTS is 'nothing://here'"):
        CheckpointStore("nothing://here")
