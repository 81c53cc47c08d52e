"""How many lanes a device takes of a model: measured at first use, then remembered.

Lanes are doubled until the memory that the next doubling would need is not there, or until it no
longer brings more trial-epochs a second. Fewer lanes of the same speed are better: each trial that
runs beside others was suggested without knowing how they end. On a CPU each core computes one chunk
of lanes at a time, so beyond a chunk for each core lanes would only take turns.
"""

import gc
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from math import inf
from pathlib import Path
from time import perf_counter, time
from typing import Any

import structlog
import torch

from worker.training.cores import CPU_CHUNK
from worker.training.memory import is_out_of_memory

log = structlog.get_logger()

MOST_LANES = 4096

WORTHWHILE = 1.2
"""What doubling the lanes has to gain in speed to be worth it."""

MEMORY_MARGIN = 0.8
"""The share of the free memory that lanes may take; the rest is for what is not foreseen."""

_CONTROL_GROUP = Path("/sys/fs/cgroup")
_LIMIT_AND_USE = ("memory.max", "memory.current")
_MEMORY = Path("/proc/meminfo")

ACCIDENT_SECONDS = 86_400.0
"""How long it is remembered that memory was short."""

_ROOM_FOR, _RAN_OUT = "there is room for", "ran out of memory"

PATIENCE_SECONDS, CUDA_PATIENCE_SECONDS = 20.0, 120.0
"""A measurement that has taken as long is over: the steps are so long that few lanes will do.

On CUDA it takes up to ten seconds for each number of lanes until its step is captured.
"""


@dataclass(frozen=True)
class Footprint:
    """The bytes of one lane.

    ``held`` is what it is: weights, best copy, moments, buffers. ``epoch`` is what an epoch takes
    besides: a copy of what it changes, its order of rows and keys of noise. ``step`` is what a step
    needs more: gradient, activations.
    """

    held: int
    epoch: int
    step: int

    @property
    def state(self) -> int:
        """What it takes throughout an epoch."""
        return self.held + self.epoch

    def most(self, device: torch.device) -> int:
        """Return the most that it needs at a time.

        That is in a step, or while lanes are copied to join others. Where checkpoints lie in the
        same memory until they have been written, one of them lies there meanwhile.
        """
        checkpoint = self.held if device.type == "cpu" else 0
        return self.held + max(self.epoch + self.step, self.held) + checkpoint


@dataclass(frozen=True)
class Capacity:
    """How many lanes to train at once, and why not more.

    ``data`` says whether rows are ``resident`` on the device or ``streamed`` to it.
    """

    lanes: int
    reason: str
    bytes_per_lane: int | None = None
    trial_epochs_per_second: float | None = None
    data: str | None = None

    @property
    def remembered_seconds(self) -> float:
        """For how long it holds: where memory was short, another program may have held it."""
        was_short = self.reason.startswith(_ROOM_FOR) or self.reason.endswith(_RAN_OUT)
        return ACCIDENT_SECONDS if was_short else inf

    def halved(self, trained: int) -> "Capacity":
        """Return what is left after so many lanes have run out of memory in training."""
        lanes = min(self.lanes, trained)
        return replace(
            self,
            lanes=max(1, lanes // 2),
            reason=f"{lanes} lanes {_RAN_OUT}",
            trial_epochs_per_second=None,
        )


def provisional(device: torch.device, chunk: int = CPU_CHUNK) -> int:
    """Return how many lanes to begin with: on a CPU, a full chunk for each core."""
    return torch.get_num_threads() * chunk if device.type == "cpu" else 1


def most(device: torch.device, chunk: int = CPU_CHUNK) -> int:
    """Return how many lanes may be worth while at all."""
    return provisional(device, chunk) if device.type == "cpu" else MOST_LANES


def measure(
    rehearse: Callable[[int], float],
    bytes_per_lane: int,
    device: torch.device,
    members: int = 1,
    chunk: int = CPU_CHUNK,
) -> Capacity:
    """Return the smallest number of lanes that is about as fast as any.

    ``rehearse`` trains so many lanes for a moment and returns trial-epochs a second;
    ``bytes_per_lane`` is the most that one may take. ``members`` is how many lanes one trial takes,
    ``chunk`` how many a core of a CPU computes at a time.
    """
    started = perf_counter()
    patience = CUDA_PATIENCE_SECONDS if device.type == "cuda" else PATIENCE_SECONDS
    fitting = MEMORY_MARGIN * free_bytes(device) / bytes_per_lane
    most_lanes = most(device, chunk)
    room = max(members, int(min(fitting, most_lanes)))
    trials = min(-(-provisional(device, chunk) // members), room // members)
    lanes = max(1, trials) * members
    rates: dict[int, float] = {}
    reason = ""
    while not reason:
        try:
            rates[lanes] = rehearse(lanes)
        except Exception as error:
            if not is_out_of_memory(error) or not rates:
                raise
            reason = f"{lanes} lanes {_RAN_OUT}"
        if lanes not in rates:
            free_memory(device)  # which the error's frames have held
            break
        log.debug("rehearsed", lanes=lanes, trial_epochs_per_second=round(rates[lanes], 3))
        if _in_vain(list(rates.values())):
            reason = f"{lanes} lanes are hardly faster"
        elif lanes * 2 > room and fitting < most_lanes:
            reason = f"{_ROOM_FOR} {room}"
        elif lanes * 2 > most_lanes:
            reason = f"{most_lanes} lanes are the most that are computed at a time"
        elif perf_counter() - started > patience:
            reason = f"steps of {lanes} lanes are long enough"
        lanes *= 2
    chosen = min(lanes for lanes in rates if rates[lanes] * WORTHWHILE >= max(rates.values()))
    return Capacity(chosen, reason, bytes_per_lane, round(rates[chosen], 4))


def free_memory(device: torch.device) -> None:
    """Give back what a device's memory was reserved for and nobody uses, after it ran out."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _in_vain(rates: Sequence[float]) -> bool:
    """Say whether the last doubling has not been worth while."""
    return len(rates) > 1 and rates[-1] < WORTHWHILE * max(rates[:-1])


class Memory:
    """What was measured before, in a file; several workers may share it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def recall(self, *situation: object) -> Capacity | None:
        """Return the capacity that was measured in the same situation, if it still holds."""
        known = dict(self._read().get(_key(situation), {}))
        until = known.pop("until", inf)
        if not known or until < time():
            return None
        try:
            found = Capacity(**known)
        except TypeError:  # of another version
            return None
        return found if until <= time() + found.remembered_seconds else None  # of an earlier one

    def keep(self, capacity: Capacity, *situation: object) -> None:
        """Remember a capacity, for as long as it holds.

        A file that cannot be written costs a measurement next time.
        """
        seconds = capacity.remembered_seconds
        until = {} if seconds == inf else {"until": time() + seconds}
        entry = {_key(situation): {**asdict(capacity), **until}}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            draft = self._path.with_suffix(f".{os.getpid()}")
            draft.write_text(json.dumps({**self._read(), **entry}))
            draft.replace(self._path)
        except OSError as error:
            log.warning("capacity_not_kept", reason=str(error))

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            known = json.loads(self._path.read_text())
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}


def total_bytes(device: torch.device) -> int | None:
    """Return all the memory of a device, of the machine for a CPU; None where it is not known."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def free_bytes(device: torch.device) -> float:
    """Return how much memory a device has left, whatever torch holds in reserve included.

    Infinity where the system does not say.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(_left_to_machine(), _left_to_container())


def readable(size: float) -> str:
    """Return a number of bytes as people write it."""
    unit = "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"


def _left_to_machine() -> float:
    """Return what programs may still take, what the system only caches of files included."""
    try:
        return 1024 * _numbers(_MEMORY)["MemAvailable:"]
    except (OSError, KeyError):
        pages = "SC_AVPHYS_PAGES"
        known = pages in os.sysconf_names
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf(pages) if known else inf


def _left_to_container() -> float:
    """Return what a container's limit leaves, infinity without one (Linux, control groups 2).

    Files that are cached and not in use count as free: they make way.
    """
    try:
        limit, used = (int((_CONTROL_GROUP / name).read_text()) for name in _LIMIT_AND_USE)
        return limit - used + _numbers(_CONTROL_GROUP / "memory.stat")["inactive_file"]
    except (OSError, ValueError, KeyError):
        return inf


def _numbers(path: Path) -> dict[str, int]:
    """Read a file of the system's that has a name and a number on each line."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0]: int(words[1]) for words in lines}


def _key(situation: Sequence[object]) -> str:
    return hashlib.sha256(repr(situation).encode()).hexdigest()[:16]
