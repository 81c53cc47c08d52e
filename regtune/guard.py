"""``python -m regtune.guard``: outlives a crew's parent by the seconds that tidying up takes.

It reads its parent's end from a pipe, which closes in whatever way the parent ends, SIGKILL
included. A parent that has tidied up itself says so before; else the guard ends the process groups
that were named to it and stops the embedded database.

Lines read: ``watch GROUP``, ``forget GROUP``, ``done``.
"""

import os
import signal
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

GRACE_SECONDS = 10.0
"""From asking to killing. Trials that are not released in time come back by their leases' end."""

DONE = "done"


def main() -> None:
    """Read lines until the pipe closes; tidy up unless the parent said that it has."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    words = [line.split() for line in sys.stdin]
    if [DONE] in words:
        return
    groups: set[int] = set()
    for verb, *rest in words:  # in order: a number may be given again
        if verb == "watch":
            groups.add(int(rest[0]))
        elif verb == "forget":
            groups.discard(int(rest[0]))
    end(groups, GRACE_SECONDS)
    for home in sys.argv[1:]:
        _stop_database(Path(home))


def end(groups: Iterable[int], grace_seconds: float) -> None:
    """Ask process groups to end; kill what is left of them after the grace period."""
    left = _signal(groups, signal.SIGTERM)
    due = time.monotonic() + grace_seconds
    while left and time.monotonic() < due:
        time.sleep(0.05)
        left = _signal(left, 0)
    _signal(left, signal.SIGKILL)


def _signal(groups: Iterable[int], signum: int) -> set[int]:
    """Signal process groups; return those that are still there."""
    there = set()
    for group in groups:
        with suppress(ProcessLookupError):
            os.killpg(group, signum)
            there.add(group)
    return there


def _stop_database(home: Path) -> None:
    # Only now: what it imports would make every start of a crew slower.
    from regtune.embedded import EmbeddedServer

    EmbeddedServer(home).stop()


if __name__ == "__main__":
    main()
