"""When a study's trials have failed so often, one after the other, that no more should be tried."""

from collections.abc import Sequence


class Failures:
    """The trials that have failed since one was trained to an end, in the order of their numbers.

    Not in that of time: trials that are suspected of killing their workers wait until nothing else
    does, and then fail in a row even if they are few among many that were trained.
    """

    def __init__(self) -> None:
        self._last_trained = -1
        self._failed: list[int] = []

    def note(self, number: int, state: str) -> None:
        """Take in how a trial has ended; one that is open, or was cancelled, says nothing."""
        if state == "failed":
            self._failed.append(number)
        elif state in ("complete", "pruned") and number > self._last_trained:
            self._last_trained = number
            self._failed = [failed for failed in self._failed if failed > number]

    def in_a_row(self, suspects: Sequence[int] = ()) -> int:
        """Return how many have failed, ``suspects`` included, since one was trained to an end."""
        return sum(number > self._last_trained for number in (*self._failed, *suspects))
