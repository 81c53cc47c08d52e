"""How lanes are spread over the device.

On a CPU, lanes are cut into chunks that one core computes by itself, without a word to the others
until the epoch ends; that is faster than to let all cores work on each operation together, and does
not wait for a core that another program has taken. Elsewhere all lanes are one chunk.
"""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from math import inf
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

CPU_CHUNK = 4
"""Most lanes in a chunk on a CPU: more have not been faster (measured)."""

_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index2/size")
"""A core's second-level cache, on Linux: ``1024K``."""

EPOCHS_TRIED = 3
"""Epochs after which the faster number of threads is chosen."""


@dataclass(frozen=True)
class Chunk:
    """Lanes that are computed together, each operation by so many threads."""

    lanes: slice
    threads: int


class Spread:
    """How many threads compute a chunk when there are more cores than chunks.

    Small matrix products lose more by being shared than they gain, convolutions gain. So one thread
    and all that there are get some epochs each, and from then on the faster. What has been compiled
    in the meantime may turn the result around, so then they try again.
    """

    def __init__(self) -> None:
        self._tried: dict[tuple[int, int], tuple[int, float]] = {}
        self._latest = (0, 0)

    def choose(self, chunks: int, most: int, *, trying: bool = True) -> int:
        """Return the threads for each of so many chunks, ``most`` at most.

        Unless ``trying``, it is one thread until more have turned out to be faster.
        """
        candidates = [(chunks, threads) for threads in dict.fromkeys((1, max(1, most)))]
        untried = [each for each in candidates if trying and self._of(each)[0] < EPOCHS_TRIED]
        self._latest = (untried or [min(candidates, key=lambda each: self._of(each)[1])])[0]
        return self._latest[1]

    def note(self, seconds: float) -> None:
        """Note how long the latest epoch took."""
        epochs, shortest = self._of(self._latest)
        self._tried[self._latest] = epochs + 1, min(shortest, seconds)

    def forget(self) -> None:
        """Try all again."""
        self._tried.clear()

    def _of(self, candidate: tuple[int, int]) -> tuple[int, float]:
        """Return after how many epochs, and the seconds of the shortest."""
        return self._tried.get(candidate, (0, inf))


class Cores:
    """Threads that compute chunks of lanes."""

    def __init__(self, threads: int, device: torch.device, chunk: int) -> None:
        """``threads`` are the CPU cores to use, ``chunk`` the most lanes that one of them takes."""
        self.threads = threads
        self._chunk = chunk
        self._on_cpu = device.type == "cpu"
        at_once = threads if self._on_cpu else 1
        self._pool = ThreadPoolExecutor(at_once, "lanes", prepare_thread, (device,))
        self._spread = Spread()

    def run(self, work: Callable[[Chunk], Tensor], lanes: int, *, trying: bool = True) -> Tensor:
        """Return what ``work`` returns for all lanes, ``(K, …)``, a chunk to a thread.

        All chunks come to an end before an exception of one of them is raised. ``trying`` says
        whether it may be found out if more threads for a chunk are faster, which costs some epochs.
        """
        return self._run(work, self._chunks(lanes, trying))

    def run_one(self, work: Callable[[Chunk], Tensor], size: int) -> Tensor:
        """Return what ``work`` returns for one chunk of this size, as it will be among others."""
        threads = 1 if self._on_cpu else self.threads
        return self._run(work, [Chunk(slice(0, size), threads)])

    def _run(self, work: Callable[[Chunk], Tensor], chunks: Sequence[Chunk]) -> Tensor:
        def in_thread(chunk: Chunk) -> Tensor:
            if torch.get_num_threads() != chunk.threads:
                torch.set_num_threads(chunk.threads)
            with torch.no_grad():
                return work(chunk)

        futures = [self._pool.submit(in_thread, chunk) for chunk in chunks]
        wait(futures)
        results = []
        try:
            for future in futures:
                results.append(future.result())
        finally:
            # An exception knows this frame. Were the frame to know the exception, whatever memory
            # its own frames hold would be kept until somebody collects garbage.
            del future, futures
        return torch.cat(results)

    def note(self, seconds: float) -> None:
        """Note how long the latest epoch took."""
        self._spread.note(seconds)

    def forget(self) -> None:
        """Find out again how many threads a chunk takes: operations are not what they were."""
        self._spread.forget()

    def close(self) -> None:
        """Give the threads back."""
        self._pool.shutdown(wait=False)

    def sizes(self, lanes: int) -> list[int]:
        """Return how many lanes each chunk takes."""
        return chunk_sizes(lanes, self.threads, self._chunk) if self._on_cpu else [lanes]

    def rarer_sizes(self, lanes: int) -> set[int]:
        """Return the sizes of chunks besides while there are fewer than so many lanes."""
        if not self._on_cpu:
            return set()
        fewer = {size for some in range(1, lanes) for size in self.sizes(some)}
        return fewer - {*self.sizes(lanes)}

    def _chunks(self, lanes: int, trying: bool) -> list[Chunk]:
        sizes = self.sizes(lanes)
        if not self._on_cpu:
            return [Chunk(slice(0, lanes), self.threads)]
        threads = self._spread.choose(len(sizes), self.threads // len(sizes), trying=trying)
        ends = accumulate(sizes)
        return [
            Chunk(slice(end - size, end), threads) for size, end in zip(sizes, ends, strict=True)
        ]


class Brake:
    """Keeps the host from running far ahead of a GPU: who waits there should know how far it is.

    Called once a step; it then waits for the step before the last ``ahead``. A whole epoch could
    else be launched within a moment, and nothing be heard of the worker until it is over.
    """

    def __init__(self, device: torch.device, ahead: int) -> None:
        self._device = device
        self._ahead = ahead
        self._computing: deque[torch.cuda.Event] = deque()

    def __call__(self) -> None:
        """Mark what has been started on the device so far, and wait for an earlier mark."""
        if mark := self._mark():
            self._computing.append(mark)
            if len(self._computing) > self._ahead:
                self._computing.popleft().synchronize()

    def _mark(self) -> torch.cuda.Event | None:
        """Return what says when the device has done all that it was given so far."""
        if self._device.type != "cuda":
            return None  # it is done when a call returns
        mark: torch.cuda.Event = torch.cuda.current_stream(self._device).record_event()
        return mark


class SideStreams(NamedTuple):
    """Streams beside the one that computes; never the same, as torch's own pool of 32 gives."""

    capturing: torch.cuda.Stream
    bringing: torch.cuda.Stream


def side_streams(device: torch.device) -> SideStreams:
    """Return the streams of a CUDA device, the same ones at every call."""
    return _side_streams(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _side_streams(index: int) -> SideStreams:
    return SideStreams(torch.cuda.Stream(index), torch.cuda.Stream(index))  # type: ignore[no-untyped-call]


def synchronize(device: torch.device) -> None:
    """Wait until a device has done all that was started on it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def chunk_for(weight_bytes: int) -> int:
    """Return the most lanes of so many bytes of weights to compute together on a core of a CPU.

    As many as keep their weights in its second-level cache, from where they are read to where they
    are written. Where not even two do, it is ``CPU_CHUNK``: there is nothing to be gained by fewer.
    """
    fitting = cache_bytes() // max(1, weight_bytes)
    return min(CPU_CHUNK, fitting) if fitting >= 2 else CPU_CHUNK


def cache_bytes() -> int:
    """Return the size of a core's second-level cache; 0 where the system does not say."""
    try:
        kilobytes = _CACHE.read_text().strip().removesuffix("K")
        return 1024 * int(kilobytes)
    except (OSError, ValueError):
        return 0


def chunk_sizes(lanes: int, threads: int, chunk: int) -> list[int]:
    """Return how many lanes each chunk takes: a thread's share, at most ``chunk``, or the rest.

    So only a few sizes have to be recorded and compiled, however many lanes there are.
    """
    size = min(chunk, -(-lanes // threads))
    rest = [lanes % size] if lanes % size else []
    return [size] * (lanes // size) + rest


def trials_computed(trials: int, device: torch.device) -> int:
    """Return how many are computed where so many are left: as many, or the next larger size.

    On a GPU each number of lanes is a program to record, to compile and to capture, and every lane
    that is computed for nothing costs little beside that. Sizes are powers of two and what lies
    midway between them, so at most a third is computed for nothing.
    """
    if device.type == "cpu" or not trials:
        return trials
    power = 1 << (trials - 1).bit_length()
    midway = 3 * power // 4
    return midway if trials <= midway else power


def prepare_thread(device: torch.device) -> None:
    """Let a new thread compute for a device.

    Numbers are taken for zero that are so small that a CPU would compute with them in microcode.
    CUDA's current device is a thread's own, the first one at the beginning; streams and graphs are
    made on it, whatever the tensors are on.
    """
    torch.set_flush_denormal(True)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
