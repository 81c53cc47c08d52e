"""Which GPUs this machine has and which of them is free, found without torch."""

import fcntl
import itertools
import os
import subprocess
from pathlib import Path

from regtune.errors import FolderUnusable


def count() -> int:
    """Return how many NVIDIA GPUs a program started here would see; 0 without a driver."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return _listed(visible)
    try:
        listing = subprocess.run(
            ["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=30, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in listing.splitlines())


def claim(folder: Path) -> int | None:
    """Return the GPU that the fewest processes have claimed in a folder; None without any.

    The claim is a lock that lasts as long as this process, also through ``exec``. Raise
    FolderUnusable if the folder cannot be written to.
    """
    known = count()
    if not known:
        return None
    try:
        return _claimed_in(folder, known)
    except OSError as error:
        raise FolderUnusable(
            f"no GPU can be claimed in {folder} ({error.strerror}); name another folder with "
            "REGTUNE_HOME, or the GPU by its number"
        ) from None


def _claimed_in(folder: Path, known: int) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    for place in itertools.count():  # of every GPU the first, then of every GPU the second, …
        gpu = place % known
        claim = os.open(folder / f"gpu-{gpu}-{place // known}.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(claim)
        else:
            os.set_inheritable(claim, True)
            return gpu
    raise AssertionError("there is always one more place")


def _listed(visible: str) -> int:
    """Count the devices before the first invalid one, as CUDA does."""
    names = [name.strip() for name in visible.split(",")]
    return next((i for i, name in enumerate(names) if name in ("", "-1")), len(names))
