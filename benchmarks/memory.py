"""How much memory lanes take: worked out, and measured on either kind of device.

``python benchmarks/memory.py mlp 16 2`` trains 16 lanes on 2 threads of a CPU and prints the
largest resident set.
"""

import gc
import os
import resource
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import structlog
import torch
from torch import Tensor, nn

from benchmarks.peers import BATCH_ROWS, CLASSES
from benchmarks.problems import (
    PROBLEMS,
    SEED,
    STRENGTHS,
    Problem,
    Setting,
    build_engine,
    sample_batch,
    some_trials,
)
from regtune.task import Data
from worker.training import compiling
from worker.training.cores import CPU_CHUNK
from worker.training.engine import Engine

MEMORY_ROWS = 800
"""Rows on which a process of its own trains to see how much memory that takes."""

MOST_MEMORY = 0.5
"""Of the memory that a CPU has free, what lanes may take."""


@dataclass(frozen=True)
class LaneBytes:
    """What one lane should take: by its tensors, and by what autograd keeps for one batch."""

    state: int
    """Weights, their best copy, the optimizer's moments, the buffers and their best copy."""
    gradient: int
    activations: int

    @property
    def working(self) -> int:
        """What a lane takes only while it is at work."""
        return self.gradient + self.activations


def main() -> None:
    """Print the largest resident set of this process with some lanes, in bytes."""
    problem, lanes, threads = sys.argv[1:]
    structlog.configure(processors=[_drop])
    compiling.CALLS_BEFORE_RECORDING = 0
    torch.set_flush_denormal(True)
    print(peak_bytes(PROBLEMS[problem], int(lanes), int(threads)))


def predict_bytes(setting: Setting) -> LaneBytes:
    """Work out what one lane takes, from one model and one batch."""
    model = setting.problem.network(STRENGTHS.dropout).train()
    parameters = size_of(model.parameters())
    return LaneBytes(
        state=4 * parameters + 2 * size_of(model.buffers()),
        gradient=parameters,
        activations=saved_bytes(model),
    )


def bytes_per_lane(one: LaneBytes, lanes: int, setting: Setting) -> float:
    """Return what each lane should add to the first, or on CUDA to none.

    On a CPU only the lanes of the chunks at work hold gradients and activations.
    """
    if setting.device.type == "cuda" or lanes == 1:
        return one.state + one.working
    at_work = min(lanes, setting.threads * min(CPU_CHUNK, -(-lanes // setting.threads)))
    return one.state + one.working * (at_work - 1) / (lanes - 1)


def check_memory(needed: int, device: torch.device) -> None:
    """Raise MemoryError where lanes would not fit, as far as that is known; CUDA says so itself."""
    if device.type == "cpu" and "SC_AVPHYS_PAGES" in os.sysconf_names:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if needed > MOST_MEMORY * free:
            raise MemoryError(f"{needed / 2**20:.0f} MiB do not fit well into {free / 2**20:.0f}")


def allocated(device: torch.device) -> int:
    """Return the bytes that PyTorch has allocated; 0 on a CPU, where it does not count them."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


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


def resident_bytes(setting: Setting, lanes: int) -> int:
    """Return the largest resident set of a process of its own that trains so many lanes."""
    options = setting.problem.name, str(lanes), str(setting.threads)
    done = subprocess.run(
        [sys.executable, __file__, *options], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


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


def saved_bytes(model: nn.Module) -> int:
    """Return the bytes that autograd keeps from one forward pass, without weights and inputs."""
    x, y = sample_batch()
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), x, y)}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = nn.functional.cross_entropy(model(x), y)  # as long as it lives, so do those
    del loss
    return sum(saved.values())


def size_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of some tensors."""
    return sum(tensor.nbytes for tensor in tensors)


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


def empty_caches() -> None:
    """Give free memory back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _drop(logger: object, method: str, event: object) -> str:
    raise structlog.DropEvent


if __name__ == "__main__":
    main()
