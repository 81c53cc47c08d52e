"""Files that a study names, opened only where the worker's own configuration allows it.

A study comes from whoever reaches the service; what it names is read by this process, with this
process's rights. So a path counts only under a root: the data folder, or one that
``REGTUNE_DATA_ROOTS`` names.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO
from urllib.parse import unquote

import fsspec

from regtune.errors import DataMissing, InvalidData
from regtune.task import Storage

_LOCAL = ("file://", "local://")


@contextmanager
def opened(address: str, storage: Storage) -> Iterator[IO[bytes]]:
    """Open a file for reading; raise DataMissing if it is not there, or not under a root.

    What is not under a root is refused before it is looked at, so that nobody learns whether it is
    there.
    """
    where = _local(address, storage) if _is_local(address) else _remote(address, storage)
    with ExitStack() as stack:
        try:
            # fsspec would see more in the name of a local file than a name, as in `link::x`.
            file = where.open("rb") if isinstance(where, Path) else fsspec.open(where, "rb")
            opened_file = stack.enter_context(file)
        except FileNotFoundError:
            raise DataMissing(f"there is no file {address!r}") from None
        except MemoryError:
            raise
        except Exception as error:  # each file system has errors of its own, of rights or network
            raise DataMissing(f"{address!r} cannot be read: {error}") from error
        try:
            yield opened_file
        except OSError as error:
            raise DataMissing(f"{address!r} cannot be read: {error}") from error


def folder(address: str, storage: Storage) -> Path:
    """Return a folder of this machine; raise DataMissing if it is not there, or not under a root.

    Links in it are not looked at: each file is to be ``opened``. Raise InvalidData for an address
    that is no machine's own.
    """
    if not _is_local(address):
        raise InvalidData(f"{address!r} must be a folder of the worker's own machine")
    path = _local(address, storage)
    if not path.is_dir():
        raise DataMissing(f"there is no folder {address!r}")
    return path


def _is_local(address: str) -> bool:
    return "://" not in address or address.startswith(_LOCAL)


def _local(address: str, storage: Storage) -> Path:
    """Return the path without links and dots; a relative one begins in the data folder."""
    path = (storage.data_dir / _without_protocol(address)).resolve()
    local = [Path(_without_protocol(root)) for root in storage.roots if _is_local(root)]
    if not any(path.is_relative_to(root.resolve()) for root in (storage.data_dir, *local)):
        raise _not_allowed(address)
    return path


def _remote(address: str, storage: Storage) -> str:
    """Return the address; one with dots, or of one file system inside another, is not taken."""
    steps = unquote(address).replace("\\", "/").split("/")
    roots = (root.rstrip("/") + "/" for root in storage.roots if not _is_local(root))
    if "::" in address or ".." in steps or not address.startswith(tuple(roots)):
        raise _not_allowed(address)
    return address


def _without_protocol(address: str) -> str:
    for protocol in _LOCAL:
        address = address.removeprefix(protocol)
    return address


def _not_allowed(address: str) -> DataMissing:
    return DataMissing(
        f"{address!r} is not under a root that this worker may read from; its REGTUNE_DATA_ROOTS "
        "says which those are"
    )
