"""A contest: contenders that train on the same rows in one process, an epoch each in turn."""

import math
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from statistics import median
from time import perf_counter
from typing import Any

import structlog
import torch

from benchmarks.memory import (
    allocated,
    allocated_peaks,
    bytes_per_lane,
    check_memory,
    lanes_to_compare,
    nothing_captured,
    resident_bytes,
)
from benchmarks.peers import Captured, HandTuned, Tutorial, cnn
from benchmarks.problems import STRENGTHS, Setting, build_engine, held_rows, some_trials
from regtune.spec.training import Precision
from worker.training.capacity import Footprint, free_memory
from worker.training.compiling import first_line
from worker.training.cores import EPOCHS_TRIED, synchronize
from worker.training.engine import Engine

PREPARING_SHARE = 0.7
"""Of a limited time, what is spent at most on compiling."""

EPOCHS_TO_CAPTURE = 3
"""After so many, all is captured that is called often."""

TRYING_SECONDS = 1.0
"""For how long at least something is tried of which the fastest is wanted."""
LEAST_TRIES = 3
"""How often at least, however long it takes."""

PRECISIONS: Mapping[str, Sequence[Precision]] = {"cpu": ("bf16",), "cuda": ("tf32", "bf16")}
"""What a study may ask for besides float32."""

FORMATS = {torch.contiguous_format: "contiguous", torch.channels_last: "channels last"}
"""How the peer may lay out images in memory."""


@dataclass
class Contender:
    """Something that trains ``trials`` models for one epoch."""

    name: str
    train_epoch: Callable[[], object]
    trials: int = 1
    form: str = ""
    """Of lanes: compiled, recorded, eager or one by one; ``reason`` is why not compiled."""
    reason: str | None = None
    seconds: list[float] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)
    """Epochs before there were other contenders, if any were timed."""
    measured_bytes: float | None = None
    predicted_bytes: float | None = None
    validation_bytes: float | None = None

    @property
    def rate(self) -> float:
        """Trial-epochs a second, by the median round, or by the median alone if that is faster."""
        medians = [median(seconds) for seconds in (self.seconds, self.alone) if seconds]
        return self.trials / min(medians)

    @property
    def deviation(self) -> float | None:
        """By what share the memory measured is above that predicted."""
        if self.measured_bytes is None or not self.predicted_bytes:
            return None
        return self.measured_bytes / self.predicted_bytes - 1


class Deadline:
    """A time by which to be done; without a limit it never comes."""

    def __init__(self, seconds: float) -> None:
        self._started = perf_counter()
        self._seconds = seconds

    def passed(self, share: float = 1.0) -> bool:
        """Whether this share of the time is over."""
        return perf_counter() - self._started > share * self._seconds

    def check(self) -> None:
        """Raise TimeoutError if it has passed."""
        if self.passed():
            raise TimeoutError("no time left")


class Events(list[Mapping[str, Any]]):
    """What the engine would have logged."""

    def __call__(self, logger: object, method: str, event: Mapping[str, Any]) -> Mapping[str, Any]:
        """Take an event; what has gone wrong is printed as well."""
        self.append(dict(event))
        if "reason" in event:
            say(", ".join(f"{key}: {value}" for key, value in event.items()))
        raise structlog.DropEvent

    def form(self) -> str:
        """Return in which form steps run."""
        of_steps = {event["event"] for event in self if event.get("program") == "step"}
        if any(event["event"] == "lanes_run_one_by_one" for event in self):
            return "one by one"
        if "not_recorded" in of_steps:
            return "eager"
        return "compiled" if "compiled" in of_steps else "recorded"

    def reason(self) -> str | None:
        """Return why something was not recorded or compiled, if anything was not."""
        return next((str(event["reason"]) for event in self if "reason" in event), None)


EVENTS = Events()


class Contest:
    """The contenders of one problem, and what came out."""

    def __init__(self, setting: Setting, deadline: Deadline) -> None:
        self.setting = setting
        self.contenders: list[Contender] = []
        self.left_out: dict[str, str] = {}
        self.tunings: dict[str, float] = {}
        self.footprint: Footprint | None = None
        self._chunk = 0
        self._deadline = deadline
        self._engines: list[Engine] = []
        self._memory_format = torch.contiguous_format

    def run(self) -> None:
        """Let all take turns."""
        # An engine of another precision, of the problem before, has changed it for all.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        self._enter("hand-tuned", self._hand_tuned)
        self._enter("tutorial", self._tutorial)
        if self.setting.device.type == "cuda":
            self._enter("hand-tuned, CUDA graph", self._captured)
        # The most lanes first: if time runs out, the fewer ones are missed least.
        for lanes in sorted(self.setting.lanes, reverse=True):
            self._enter(f"{lanes} lanes", partial(self._lanes, lanes=lanes, compiles=True))
        self._take_turns(list(self.contenders))
        if not self.setting.quick:
            self._run_best_again()
            if self.setting.device.type == "cpu":
                self._measure_resident()

    @property
    def peer(self) -> Contender:
        """The one that the others are compared with."""
        return next(c for c in self.contenders if c.name == "hand-tuned")

    @property
    def best(self) -> Contender | None:
        """The fastest number of lanes."""
        lanes = [c for c in self.contenders if c.form]
        return max(lanes, key=lambda contender: contender.rate, default=None)

    def close(self) -> None:
        """Give threads and memory back."""
        for engine in self._engines:
            engine.close()
        self._engines.clear()
        self.contenders.clear()
        free_memory(self.setting.device)

    def _enter(
        self, name: str, prepare: Callable[[str], Contender], share: float = PREPARING_SHARE
    ) -> Contender | None:
        """Prepare a contender; one that cannot be is left out, and the reason kept.

        Nothing is begun after this share of the time.
        """
        if self._deadline.passed(share):
            self.left_out[name] = "no time left"
            return None
        started = perf_counter()
        try:
            contender = prepare(name)
        except Exception as error:  # noqa: BLE001 - see _leave_out
            self._leave_out(name, error)
            return None
        finally:
            free_memory(self.setting.device)
        self.contenders.append(contender)
        took = perf_counter() - started
        how = ", ".join(part for part in (contender.form, contender.reason) if part)
        say(f"{self.setting.problem.name}: {name} ready after {took:.1f} s {how}")
        return contender

    def _leave_out(self, name: str, error: Exception) -> None:
        """Go on without a contender, unless it is the one that the others are compared with."""
        if name == "hand-tuned":
            raise error
        self.left_out[name] = first_line(error)
        traceback.print_exception(error)
        self.contenders = [contender for contender in self.contenders if contender.name != name]
        say(f"{self.setting.problem.name}: {name} left out: {self.left_out[name]}")

    def _take_turns(self, contenders: Sequence[Contender]) -> None:
        for number in range(self.setting.rounds):
            for contender in contenders:
                late = number > 0 and self._deadline.passed()  # everyone counts once
                if contender.name in self.left_out or late:
                    continue
                try:
                    contender.seconds.append(timed(contender.train_epoch, self.setting.device))
                except Exception as error:  # noqa: BLE001 - see _leave_out
                    self._leave_out(contender.name, error)

    def _tutorial(self, name: str) -> Contender:
        setting = self.setting
        peer = Tutorial(
            setting.problem.network,
            setting.data_dir,
            setting.rows - setting.validation_rows,
            setting.validation_rows,
            STRENGTHS,
            setting.device,
        )
        train_epoch = with_threads(setting.threads, peer.train_epoch)
        return Contender(name, train_epoch, alone=self._timed_alone(train_epoch))

    def _hand_tuned(self, name: str) -> Contender:
        """Try all tunings for a while, and take the fastest."""
        rows = held_rows(self.setting)
        shortest, fastest = math.inf, None
        for threads, memory_format in product(self._thread_counts(), self._memory_formats()):
            peer = HandTuned(
                self.setting.problem.network, rows, STRENGTHS, memory_format=memory_format
            )
            train_epoch = with_threads(threads, peer.train_epoch)
            seconds = tried(train_epoch, self.setting.device)
            self.tunings[f"{threads} threads, {FORMATS[memory_format]}"] = seconds
            if seconds < shortest:
                shortest, fastest = seconds, train_epoch
                self._memory_format = memory_format
        assert fastest is not None
        return Contender(name, fastest, alone=self._timed_alone(fastest))

    def _timed_alone(self, train_epoch: Callable[[], object]) -> list[float]:
        """Return a peer's seconds of an epoch while there are no lanes; a faster one counts.

        Where a process has more OpenMP threads than cores, they sleep while they wait, and that
        costs a peer a factor.
        """
        return [timed(train_epoch, self.setting.device) for _ in range(self.setting.rounds)]

    def _thread_counts(self) -> Sequence[int]:
        on_cpu = self.setting.device.type == "cpu"
        return sorted({1, self.setting.threads}) if on_cpu else [self.setting.threads]

    def _memory_formats(self) -> Sequence[torch.memory_format]:
        return list(FORMATS) if self.setting.problem.network is cnn else [torch.contiguous_format]

    def _captured(self, name: str) -> Contender:
        peer = Captured(
            self.setting.problem.network,
            held_rows(self.setting),
            STRENGTHS,
            memory_format=self._memory_format,
        )
        peer.train_epoch()
        return Contender(name, peer.train_epoch)

    def _lanes(
        self, name: str, *, lanes: int, compiles: bool, precision: Precision = "float32"
    ) -> Contender:
        """Bring lanes to their steady state: recorded, compiled, compared."""
        EVENTS.clear()
        engine = build_engine(self.setting, lanes, compiles=compiles, precision=precision)
        contender = Contender(name, engine.train_epoch, lanes)
        prepare_epoch = partial(engine.train_epoch, self._deadline.check)
        footprint = engine.footprint
        self.footprint = self.footprint or footprint  # that of the plain lanes, which come first
        self._chunk = engine.chunk
        contender.predicted_bytes = bytes_per_lane(footprint, lanes, self.setting, self._chunk)
        try:
            check_memory(lanes * footprint.state, self.setting.device)
            before = allocated(self.setting.device)
            engine.join(some_trials(lanes))
            on_cuda = self.setting.device.type == "cuda"
            tries = 0 if on_cuda or lanes >= self.setting.threads else 2 * EPOCHS_TRIED
            with nothing_captured() if on_cuda else nullcontext():
                for form in ("recorded", "compiled"):
                    for _ in range(1 + tries):
                        prepare_epoch()
                    if form == "recorded":
                        engine.settle()
                if on_cuda:
                    training, validation = allocated_peaks(engine, self.setting.device)
                    contender.measured_bytes = (training - before) / lanes
                    contender.validation_bytes = (validation - before) / lanes
            for _ in range(EPOCHS_TO_CAPTURE if on_cuda else 0):
                prepare_epoch()
        except BaseException:
            engine.close()
            raise
        self._engines.append(engine)
        contender.form, contender.reason = EVENTS.form(), EVENTS.reason()
        return contender

    def _run_best_again(self) -> None:
        """Let the fastest number of lanes run uncompiled, and in the other precisions."""
        best = self.best
        if best is None:
            return
        ways: dict[str, Callable[[str], Contender]] = {
            precision: partial(self._lanes, lanes=best.trials, compiles=True, precision=precision)
            for precision in PRECISIONS[self.setting.device.type]
        }
        if best.form == "compiled":
            ways["not compiled"] = partial(self._lanes, lanes=best.trials, compiles=False)
        for way, prepare in ways.items():
            again = self._enter(f"{best.name}, {way}", prepare, share=1.0)
            if again:
                self._take_turns([again])

    def _measure_resident(self) -> None:
        """Measure what the most lanes take beyond fewer, in processes of their own."""
        lanes = max((c.trials for c in self.contenders), default=1)
        if lanes > 1 and not self._deadline.passed():
            fewer = lanes_to_compare(lanes, self.setting.threads)
            (most, one_by_one), (least, _) = (
                resident_bytes(self.setting, count) for count in (lanes, fewer)
            )
            for contender in self.contenders:
                if contender.name == f"{lanes} lanes" and self.footprint is not None:
                    contender.measured_bytes = (most - least) / (lanes - fewer)
                    contender.predicted_bytes = bytes_per_lane(
                        self.footprint,
                        lanes,
                        self.setting,
                        self._chunk,
                        beyond=fewer,
                        one_by_one=one_by_one,
                    )


def with_threads(count: int, train_epoch: Callable[[], object]) -> Callable[[], object]:
    """Return a function that first sets the number of threads, which others may have changed."""

    def train() -> None:
        torch.set_num_threads(count)
        train_epoch()

    return train


def tried(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of the fastest of some calls, after one to warm up."""
    work()
    seconds = list[float]()
    while sum(seconds) < TRYING_SECONDS or len(seconds) < LEAST_TRIES:
        seconds.append(timed(work, device))
    return min(seconds)


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Return how many seconds a call takes, with all that it starts on the device."""
    synchronize(device)
    started = perf_counter()
    work()
    synchronize(device)
    return perf_counter() - started


def say(line: str) -> None:
    """Say how far it is, beside the table."""
    print(line, file=sys.stderr, flush=True)
