"""One worker at a time in what several of a machine share."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def alone(path: Path, or_else: int = 0) -> Iterator[None]:
    """Wait until no other process of this machine is in here; the system ends the wait if it dies.

    The file stays: whoever removed it would let in two at once. With ``LOCK_NB``, raise
    BlockingIOError instead of waiting. Another user's file is locked as well as one's own.
    """
    try:
        lock = path.open("a")
    except PermissionError:
        lock = path.open()
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX | or_else)
        yield
