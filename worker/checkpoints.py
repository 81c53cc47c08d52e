"""Checkpoints in a folder or an object store, so that a trial can go on on another machine.

``<store>/<study>/<trial>/<attempt>-<epoch>-<digest>.safetensors``: tensors as safetensors keeps
them, everything else as JSON in the file's metadata; nothing is unpickled. The digest is that of
the file's content, so one that was cut short or has changed is told by its name and passed over.
The attempt is part of the name, so a worker that has lost its lease overwrites nobody's.
"""

import hashlib
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial

import fsspec
import structlog
from fsspec.implementations.local import LocalFileSystem
from safetensors import SafetensorError
from safetensors.torch import load, save

from regtune.errors import RegtuneError
from regtune.leasing import Lease
from regtune.reporting import Epoch
from regtune.studies import Born, Study
from worker.training.checkpoint import Checkpoint

log = structlog.get_logger()

KEPT = 2
"""Checkpoints of a trial: the newest, and the one before it should that one be broken."""

_SUFFIX = ".safetensors"
_TIME = "%Y%m%dT%H%M%S.%f"
_STUDY = re.compile(r"(\d+)-(\d{8}T\d{6}\.\d{6})")
_LENGTH_BYTES = 8
"""Of a safetensors file: the header's length, little-endian; then the header, as JSON."""


@dataclass(frozen=True)
class Saved:
    """A trial at the end of an epoch, and its curve up to there."""

    checkpoint: Checkpoint
    epochs: Sequence[Epoch]


class Broken(Exception):
    """A file in the store is not, or not any more, what was written."""


class CheckpointStore:
    """The checkpoints of all trials, at any address that fsspec knows.

    Every method raises whatever the file system raises; a disk may be full, a network gone.
    """

    def __init__(self, address: str) -> None:
        """``address`` is a folder, or a URL such as ``s3://bucket/folder``.

        Raises RegtuneError if nothing is installed for such addresses.
        """
        try:
            self._files, root = fsspec.core.url_to_fs(address)
        except (ImportError, ValueError) as error:
            raise RegtuneError(f"REGTUNE_CHECKPOINTS is {address!r}: {error}") from None
        self._root = root.rstrip("/")

    def write(self, study: Study, lease: Lease, saved: Saved) -> None:
        """Keep a checkpoint; older ones go, all but the last before it."""
        metadata = {
            "identity": _identity(study, lease),
            "state": json.dumps(saved.checkpoint.state),
            "epochs": json.dumps([asdict(epoch) for epoch in saved.epochs]),
        }
        content = save(dict(saved.checkpoint.tensors), metadata)
        folder = self._trial_folder(study, lease.trial_id)
        key = f"{lease.attempt:06}-{len(saved.epochs):06}"
        self._put(f"{folder}/{key}-{_digest(content)}{_SUFFIX}", content)
        older = [path for path in self._files_of(folder) if _name(path) < key]
        for path in older[KEPT - 1 :]:
            with suppress(FileNotFoundError):
                self._files.rm_file(path)

    def newest(self, study: Study, lease: Lease) -> Saved | None:
        """Return the last checkpoint of a trial's earlier attempts that is whole, if there is one.

        What is broken, or of another trial, is logged and passed over.
        """
        for path in self._files_of(self._trial_folder(study, lease.trial_id)):
            if int(_name(path).partition("-")[0]) >= lease.attempt:
                continue
            try:
                return _read(self._files.cat_file(path), _name(path), _identity(study, lease))
            except (Broken, OSError) as error:
                log.warning("checkpoint_ignored", checkpoint=path, error=str(error))
        return None

    def remove(self, study: Study | Born, trial_ids: Collection[int]) -> None:
        """Remove all that is kept of some trials."""
        for trial_id in trial_ids:
            self._remove(self._trial_folder(study, trial_id))

    def studies(self) -> set[Born]:
        """Return the studies of which anything is kept, of this database or of another."""
        names = (_STUDY.fullmatch(_name(path)) for path in self._list(self._root))
        return {Born(int(name[1]), _as_time(name[2])) for name in names if name}

    def trials(self, study: Study | Born) -> set[int]:
        """Return the trials of a study of which anything is kept."""
        names = (_name(path) for path in self._list(self._folder(study)))
        return {int(name) for name in names if name.isdecimal()}

    def remove_study(self, study: Born) -> None:
        """Remove all that is kept of a study."""
        self._remove(self._folder(study))

    def _files_of(self, folder: str) -> list[str]:
        """Return a trial's checkpoints, the last attempt first, and its last epoch first."""
        found = [path for path in self._list(folder) if path.endswith(_SUFFIX)]
        return sorted(found, key=_name, reverse=True)

    def _list(self, folder: str) -> list[str]:
        self._files.invalidate_cache()  # others write and remove here too
        try:
            paths: list[str] = self._files.ls(folder, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return paths

    def _put(self, path: str, content: bytes) -> None:
        """Let a file appear whole or not at all, as a single put does in an object store."""
        if not isinstance(self._files, LocalFileSystem):
            try:
                self._files.pipe_file(path, content)
            except FileNotFoundError:
                self._make_folders(path.rpartition("/")[0])
                self._files.pipe_file(path, content)
            return
        self._files.makedirs(self._files._parent(path), exist_ok=True)
        part = f"{path}.part"
        try:
            self._files.pipe_file(part, content)
            self._files.mv(part, path)
        except BaseException:
            self._remove(part)
            raise

    def _make_folders(self, folder: str) -> None:
        """Make a folder, as deep as it is under the root; not the root, which may be a bucket."""
        path = self._root
        for name in folder.removeprefix(f"{path}/").split("/"):
            path = f"{path}/{name}"
            with suppress(FileExistsError):
                self._files.mkdir(path, create_parents=False)

    def _remove(self, path: str) -> None:
        self._files.invalidate_cache()
        with suppress(FileNotFoundError):
            self._files.rm(path, recursive=True)

    def _folder(self, study: Study | Born) -> str:
        """Return the folder of a study; another database's study may have its id, or its name."""
        return f"{self._root}/{study.study_id}-{study.created_at.astimezone(UTC):{_TIME}}"

    def _trial_folder(self, study: Study | Born, trial_id: int) -> str:
        return f"{self._folder(study)}/{trial_id}"


class CheckpointWriter:
    """Writes and removes checkpoints in a thread, in order, so that training need not wait.

    What fails is logged; training goes on.
    """

    def __init__(self, store: CheckpointStore) -> None:
        self._store = store
        self._pool = ThreadPoolExecutor(1, "checkpoints")
        self._latest: Future[None] | None = None

    @property
    def busy(self) -> bool:
        """Whether what it was told last is not done yet."""
        return self._latest is not None and not self._latest.done()

    def write(self, study: Study, saved: Sequence[tuple[Lease, Saved]]) -> None:
        """Write checkpoints of trials."""

        for lease, one in saved:
            self._submit(partial(self._store.write, study, lease, one), "checkpoint_failed", study)

    def remove(self, study: Study, trial_ids: Collection[int]) -> None:
        """Remove all checkpoints of trials that are over."""
        self._submit(
            partial(self._store.remove, study, trial_ids), "checkpoint_removal_failed", study
        )

    def wait(self, seconds: float) -> None:
        """Wait until everything is done, but not for longer than so many seconds."""
        if self._latest is not None:
            wait([self._latest], seconds)

    def close(self) -> None:
        """Let go of the thread."""
        self._pool.shutdown(wait=False)

    def _submit(self, work: Callable[[], None], failure: str, study: Study) -> None:
        def attempt() -> None:
            try:
                work()
            except Exception as error:  # noqa: BLE001 - a file system may raise anything
                log.warning(failure, study=study.name, error=str(error) or type(error).__name__)

        self._latest = self._pool.submit(attempt)


def _identity(study: Study, lease: Lease) -> str:
    """Return what must be the same for a checkpoint to be of this trial."""
    spec = study.spec.model_dump(mode="json", include={"name", "task", "training", "validation"})
    what = {"trial": lease.number, "params": dict(lease.params), **spec}
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _read(content: bytes, name: str, identity: str) -> Saved:
    """Return what a file holds; raise Broken if it is not what was written."""
    if not name.endswith(f"-{_digest(content)}{_SUFFIX}"):
        raise Broken("its content is not what was written")
    try:
        header_bytes = int.from_bytes(content[:_LENGTH_BYTES], "little")
        header = content[_LENGTH_BYTES : _LENGTH_BYTES + header_bytes]
        metadata: Mapping[str, str] = json.loads(header)["__metadata__"]
        if metadata["identity"] != identity:
            raise Broken("it is of another trial, or of the same one in another study")
        return Saved(
            Checkpoint(load(content), json.loads(metadata["state"])),
            [Epoch(**epoch) for epoch in json.loads(metadata["epochs"])],
        )
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise Broken(f"{type(error).__name__}: {error}") from error


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _as_time(word: str) -> datetime:
    return datetime.strptime(word, _TIME).replace(tzinfo=UTC)


def _name(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]
