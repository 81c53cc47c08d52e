"""Child processes that never outlive their parent, whatever way it ends."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Self

from regtune import guard
from regtune.errors import RegtuneError

TAIL_LINES = 20
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 30.0
"""Before a child that has crashed is started again; doubled each time that it crashes soon."""
REFUSALS = (2, 3)
"""Exit codes of a program that cannot start: its options or settings are wrong, no database."""
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Child:
    """A child process, at the head of a session of its own; ``log`` is where its output goes."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path | None
    again: Callable[[], "Child"] | None = None
    crashes: int = 0
    started_at: float = field(default_factory=time.monotonic)

    @property
    def ended(self) -> bool:
        """Whether it has ended, by itself or not."""
        return self.process.poll() is not None

    @property
    def crashed(self) -> bool:
        """Whether it has ended, was to be started again then, and it makes sense."""
        if self.again is None or not self.ended or self.exit_code == 0:
            return False
        return self.exit_code not in REFUSALS or self.crashes > 0

    @property
    def exit_code(self) -> int:
        """Its exit code, as a shell would have it, once it has ended."""
        code = self.process.wait()
        return 128 - code if code < 0 else code

    def kill(self) -> None:
        """Kill it and whatever it has started, also if it has ended itself."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def tail(self) -> str:
        """Return the last lines of its log."""
        if self.log is None:
            return ""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-TAIL_LINES:])


class ChildDied(RegtuneError):
    """A child process ended that should not have."""

    def __init__(self, child: Child) -> None:
        super().__init__(f"the {child.name} ended unexpectedly ({_how(child.process.returncode)})")
        self.child = child


class Crew:
    """Starts child processes and ends them.

    Each is the head of its own session, so Ctrl-C in a terminal reaches the parent alone. Should
    the parent be killed, a guard ends them, and then stops the embedded database under ``home``.
    ``lock`` is a file descriptor that the guard holds open too, so that it stays locked until then.
    """

    def __init__(self, *, home: Path | None = None, lock: int | None = None) -> None:
        self.children: list[Child] = []
        self._ended_at: dict[int, float] = {}
        self._guard = subprocess.Popen(
            [sys.executable, "-P", "-m", guard.__name__, *([str(home.resolve())] if home else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=() if lock is None else (lock,),
            start_new_session=True,
            text=True,
            bufsize=1,
        )

    def start(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        log: Path | None = None,
        revive: bool = False,
    ) -> Child:
        """Start a child; its output goes to a file, or where the parent's goes.

        With ``revive`` it is one that ``revive()`` starts again after a crash.
        """
        child = self._start(name, command, environment, log, "wb", revive)
        self.children.append(child)
        return child

    def revive(self) -> None:
        """Start those again that have crashed, each after a pause of its own."""
        for place, child in enumerate(self.children):
            if not child.crashed or child.again is None:
                continue
            if child.process.pid not in self._ended_at:
                self._ended_at[child.process.pid] = time.monotonic()
                self._end_what_is_left(child)
            ended_at = self._ended_at[child.process.pid]
            pause = min(FIRST_PAUSE_SECONDS * 2 ** min(child.crashes, 10), LONGEST_PAUSE_SECONDS)
            if time.monotonic() < ended_at + pause:
                continue
            lasted = ended_at - child.started_at
            crashes = 1 if lasted > 2 * LONGEST_PAUSE_SECONDS else child.crashes + 1
            self.children[place] = replace(child.again(), crashes=crashes)

    def _end_what_is_left(self, child: Child) -> None:
        """End what a crashed child had started: it may hold the device that the next one needs."""
        child.kill()
        self._tell_guard(f"forget {child.process.pid}")

    def _start(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: Path | None,
        mode: str,
        revive: bool,
    ) -> Child:
        with log.open(mode) if log else nullcontext() as output:
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._tell_guard(f"watch {process.pid}")
        again = partial(self._start, name, command, environment, log, "ab", revive)
        return Child(name, process, log, again if revive else None)

    @property
    def working(self) -> bool:
        """Whether any child has not ended, or will be started again."""
        return not all(child.ended and not child.crashed for child in self.children)

    def check(self) -> None:
        """Raise ChildDied if any child has ended that will not be started again."""
        for child in self.children:
            if child.ended and not child.crashed:
                raise ChildDied(child)

    def forward(self, signum: int) -> None:
        """Send a signal to every child that has not ended."""
        for child in self.children:
            child.process.send_signal(signum)

    def end(
        self,
        children: Sequence[Child],
        grace_seconds: float,
        *,
        hurry: Callable[[], bool] = lambda: False,
    ) -> None:
        """Ask children to end; kill them after the grace period, or once ``hurry`` says so."""
        for child in children:
            child.process.terminate()
        due = time.monotonic() + grace_seconds
        while not all(child.ended for child in children):
            if time.monotonic() > due or hurry():
                break
            time.sleep(_POLL_SECONDS)
        for child in children:
            child.kill()
        self.children = [child for child in self.children if child not in children]

    def close(self) -> None:
        """Kill whoever is left, and dismiss the guard."""
        self.end(self.children, 0)
        self._tell_guard(guard.DONE)
        with suppress(BrokenPipeError):
            self._guard.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _tell_guard(self, line: str) -> None:
        assert self._guard.stdin is not None
        with suppress(BrokenPipeError):
            self._guard.stdin.write(line + "\n")


def _how(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
