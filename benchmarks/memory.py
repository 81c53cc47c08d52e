"""How much memory lanes take: worked out, and measured on either kind of device.

``python benchmarks/memory.py mlp 16 2`` trains 16 lanes on 2 threads of a CPU and prints the
largest resident set in bytes, and 1 if lanes were computed one by one, else 0.
"""

import gc
import os
import resource
import subprocess
import sys
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import structlog
import torch

from benchmarks.peers import BATCH_ROWS, CLASSES
from benchmarks.problems import (
    PROBLEMS,
    SEED,
    Problem,
    Setting,
    build_engine,
    some_trials,
)
from regtune.task import Data
from worker.training import compiling
from worker.training.capacity import Footprint, free_bytes
from worker.training.cores import chunk_sizes
from worker.training.engine import Engine

MEMORY_ROWS = 800
"""Rows on which a process of its own trains to see how much memory that takes."""

MOST_MEMORY = 0.5
"""Of the memory that a CPU has free, what lanes may take."""

EXACT_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
"""Lets glibc give memory back at once, as PyTorch frees it, and not keep it for the next tensor."""


def main() -> None:
    """Print the largest resident set of this process with some lanes, and how they trained."""
    problem, lanes, threads = sys.argv[1:]
    ways: list[int] = []

    def listen(logger: object, method: str, event: MutableMapping[str, Any]) -> str:
        if event["event"] == "recorded" and event["program"] == "step":
            ways.append(event["way"])
        raise structlog.DropEvent

    structlog.configure(processors=[listen])
    compiling.CALLS_BEFORE_RECORDING = 0
    torch.set_flush_denormal(True)
    print(peak_bytes(PROBLEMS[problem], int(lanes), int(threads)), max(ways, default=0))


def bytes_per_lane(
    one: Footprint,
    lanes: int,
    setting: Setting,
    chunk: int,
    *,
    beyond: int = 0,
    one_by_one: bool = False,
) -> float:
    """Return what each lane should add to those of a stack of ``beyond``.

    On a CPU only the lanes of the chunks at work hold gradients and activations; of a chunk that is
    computed one by one, a single lane. ``chunk`` is how many lanes are in one at most.
    """
    if setting.device.type == "cuda":
        return one.state + one.step

    def at_work(count: int) -> int:
        chunks = chunk_sizes(count, setting.threads, chunk)[: setting.threads] if count else []
        return len(chunks) if one_by_one else sum(chunks)

    return one.state + one.step * (at_work(lanes) - at_work(beyond)) / (lanes - beyond)


def lanes_to_compare(lanes: int, threads: int) -> int:
    """Return the lanes that already hold what is there once, whatever their number.

    The first chunks of several lanes cost some 20 MB of library and compiler (MLP, two cores).
    """
    several_on_each = 2 * threads
    return several_on_each if lanes > several_on_each else 1


def check_memory(needed: int, device: torch.device) -> None:
    """Raise MemoryError where lanes would not fit, as far as that is known; CUDA says so itself."""
    free = free_bytes(device)
    if device.type == "cpu" and needed > MOST_MEMORY * free:
        raise MemoryError(f"{needed / 2**20:.0f} MiB do not fit well into {free / 2**20:.0f}")


def allocated(device: torch.device) -> int:
    """Return the bytes that PyTorch has allocated; 0 on a CPU, where it does not count them."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


@contextmanager
def nothing_captured() -> Iterator[None]:
    """Hold CUDA graphs off: what a graph needs within a step does not count as allocated."""
    calls = compiling.CALLS_BEFORE_CAPTURING
    compiling.CALLS_BEFORE_CAPTURING = sys.maxsize
    try:
        yield
    finally:
        compiling.CALLS_BEFORE_CAPTURING = calls


def allocated_peaks(engine: Engine, device: torch.device) -> tuple[int, int]:
    """Train an epoch; return the most bytes allocated in its steps and in its validation."""
    ticks, peaks = 0, list[int]()

    def tick() -> None:
        nonlocal ticks
        ticks += 1
        if ticks == engine.steps_per_epoch:
            peaks.append(torch.cuda.max_memory_allocated(device))
            torch.cuda.reset_peak_memory_stats(device)

    torch.cuda.reset_peak_memory_stats(device)
    engine.train_epoch(tick)
    return peaks[0], torch.cuda.max_memory_allocated(device)


def resident_bytes(setting: Setting, lanes: int) -> tuple[int, bool]:
    """Return the largest resident set of a process of its own that trains so many lanes.

    And whether it computed them one by one.
    """
    options = setting.problem.name, str(lanes), str(setting.threads)
    done = subprocess.run(
        [sys.executable, __file__, *options],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **EXACT_MALLOC},
    )
    peak, way = map(int, done.stdout.split())
    return peak, bool(way)


def peak_bytes(problem: Problem, lanes: int, threads: int) -> int:
    """Train lanes in this process, on noise, and return its largest resident set.

    Memory does not depend on what the rows show.
    """
    rng = np.random.default_rng(SEED)
    x = rng.integers(0, 256, size=(MEMORY_ROWS, 1, 28, 28), dtype=np.uint8)
    y = np.arange(MEMORY_ROWS) % CLASSES
    setting = Setting(
        problem=problem,
        data=Data(x, y, x[:BATCH_ROWS], y[:BATCH_ROWS], CLASSES),
        data_dir=Path(),
        device=torch.device("cpu"),
        threads=threads,
        rounds=1,
        lanes=(lanes,),
        quick=False,
        peak=1.0,
    )
    engine = build_engine(setting, lanes, compiles=False)
    engine.join(some_trials(lanes))
    engine.train_epoch()
    forget_peak()
    engine.train_epoch()
    engine.close()
    return resident_peak()


def forget_peak() -> None:
    """Let Linux count a process's largest resident set from here on; elsewhere do nothing."""
    gc.collect()
    refs = Path("/proc/self/clear_refs")
    if refs.exists():
        refs.write_text("5")


def resident_peak() -> int:
    """Return the largest resident set of this process, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    main()
