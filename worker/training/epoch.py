"""An epoch of many lanes: all steps, and the validation."""

import queue
from collections import defaultdict
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import groupby, islice
from statistics import median
from time import perf_counter

import numpy as np
import structlog
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from regtune.spec import Training
from worker.tasks.preparation import Prepared
from worker.tasks.rows import Rows
from worker.training import regularizers
from worker.training.averaging import average_, averaged_epochs, complete_buffers_
from worker.training.batches import Batches, Order, Place, of_each_step
from worker.training.compiling import (
    HEAD_START_SECONDS,
    HEAD_START_SHARE,
    Programs,
    first_line,
)
from worker.training.cores import Chunk, Cores, prepare_thread, synchronize
from worker.training.lanes import LaneTensors
from worker.training.memory import peak_bytes
from worker.training.model import LaneModel
from worker.training.optimizers import LaneOptimizer, scheduled_rates
from worker.training.step import LaneStep, Live, Source
from worker.training.supply import (
    BATCHES_AT_ONCE,
    Resident,
    Streamed,
    Supply,
    threads_that_bring,
)

log = structlog.get_logger()

MOST_EVALUATION_ROWS = 1024
CHEAP_BYTES = 2**19
"""An evaluation batch has as many rows as take no more memory than a training step does, or than
this in each lane; beyond so many rows nothing is gained."""

CAPTURED_BATCHES = 4
"""Streamed batches that CUDA graphs keep as their own: steps of two sizes, and evaluations."""

_EPSILONS = {"bf16": torch.finfo(torch.bfloat16).eps, "tf32": 2.0**-10}
"""Of products in a study's precision, where that is coarser than float32."""

SCALES_KEPT = 64
"""Of lanes of different splits, for as many groups of them: a CUDA graph goes by addresses."""

COUNTED_STEPS_A_RECORDING = 50
"""How many steps of which the bytes are counted take as long as recording a step does.

Both ways and their comparison. Two lanes are counted, four recorded, on two cores: 54 of a
perceptron of two layers, 65 of a vision transformer of four, 41 of ResNet-18.
"""

WARM_UP_SECONDS, CUDA_WARM_UP_SECONDS = 1.0, 10.0
"""After so long the steps of a rehearsal count though they are not yet what they will be.

On CUDA later: to be captured makes more of a difference there than anything else.
"""

REHEARSAL_SECONDS = 0.2

Tick = Callable[[], None]
Tensors = Mapping[str, Tensor]
Throwaway = Callable[[int], tuple[LaneTensors, Tensors, NDArray[np.float64], Sequence[Place]]]


@dataclass(frozen=True)
class Held:
    """Rows to evaluate on: for each of M members their numbers, filled up to the same length.

    ``weight_MR`` is 0 where a number only fills up; ``rows_M`` counts the others.
    """

    rows: Rows
    supply: Supply
    numbers_MR: NDArray[np.int64]
    weight_MR: Tensor
    rows_M: Tensor

    @classmethod
    def out(
        cls, rows: Rows, supply: Supply, numbers: Sequence[NDArray[np.int64]], like: Tensor
    ) -> "Held":
        """Return the rows of these numbers, for each member; weights are tensors as ``like``."""
        counts = np.array([len(own) for own in numbers])
        weight_MR = np.arange(counts.max()) < counts[:, None]
        return cls(
            rows,
            supply,
            np.stack([np.resize(own, counts.max()) for own in numbers]),
            torch.from_numpy(weight_MR).to(like),
            torch.from_numpy(counts).to(like),
        )

    def of(self, members: Sequence[int], most: int) -> tuple[Order, Tensor, int]:
        """Return what lanes of these members are evaluated on, its weights, and the batch size.

        Batches are of ``most`` rows or less, all alike, so that there is one program to record:
        the last one is filled up. Where there is but one member, lanes see the same.
        """
        rows = self.numbers_MR.shape[1]
        batches = -(-rows // most)
        size = -(-rows // batches)
        filling = batches * size - rows
        numbers_MR = np.pad(self.numbers_MR, ((0, 0), (0, filling)), "wrap")
        weight_MR = pad(self.weight_MR, (0, filling))
        if len(numbers_MR) == 1:
            return Order(numbers_MR, 0), weight_MR[0], size
        distinct = sorted(set(members))
        group = [distinct.index(member) for member in members]
        return Order(numbers_MR[distinct], group), weight_MR[members], size

    def targets(self, order: Order) -> Tensor:
        """Return the targets of these rows, on the device."""
        y = self.rows.y[order.of_lanes(self.rows.y.device)]
        return y.to(self.weight_MR.device)


class Epochs:
    """Trains and evaluates lanes; keeps no state of theirs."""

    def __init__(
        self,
        prepared: Prepared,
        model: LaneModel,
        optimizer: LaneOptimizer,
        training: Training,
        *,
        resident: bool,
        knobs: Collection[str],
        threads: int,
        chunk: int,
        compiles: bool,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        """``knobs`` are the strengths that any lane may use; ``threads`` are CPU cores to use.

        ``chunk`` is the most lanes that one of those takes at a time.

        Rows that are not ``resident`` on the device are streamed, images in this memory format.
        """
        self._device = model.device
        self._pool = ThreadPoolExecutor(
            threads_that_bring(threads), "rows", prepare_thread, (self._device,)
        )
        self._supply, tested = (
            Resident(rows) if resident else Streamed(rows, self._device, memory_format, self._pool)
            for rows in (prepared.rows, prepared.test)
        )
        self._like = torch.empty(0, dtype=prepared.rows.dtype, device=self._device)
        self._objective = model.objective
        self._splits = [split.to(self._device) for split in prepared.splits]
        self._training = training
        self._optimizer = optimizer
        self._penalized = model.penalized
        self.batches = Batches(
            prepared.splits,
            training.batch_size,
            training.seed,
            len(model.sites),
            self._device,
        )
        self._evaluation_rows = max(self.batches.sizes)
        self._validation, self._test = (
            Held.out(rows, supply, numbers, self._like)
            for rows, supply, numbers in (
                (prepared.rows, self._supply, [split.validation for split in prepared.splits]),
                (prepared.test, tested, [split.test for split in prepared.splits]),
            )
        )
        self.programs = Programs(
            compiles=compiles and model.vectorized,
            constants=[*self._supply.fixed.tensors, *tested.fixed.tensors],
            epsilon=_EPSILONS.get(training.precision, 0.0),
        )
        self._replicas: queue.LifoQueue[LaneStep] = queue.LifoQueue()
        for _ in range(threads if self._device.type == "cpu" else 1):  # as many chunks at a time
            self._replicas.put(
                LaneStep(
                    model.replica(),
                    optimizer,
                    knobs=knobs,
                    l1=training.l1,
                )
            )
        self._cores = Cores(threads, self._device, chunk)
        self._later: Callable[[], None] | None = None
        self._of_lanes = lru_cache(SCALES_KEPT)(self._scale_and_shift)

    def train(
        self,
        tensors: LaneTensors,
        strengths: Tensors,
        rate_K: NDArray[np.float64],
        places: Sequence[Place],
        tick: Tick,
        *,
        trying: bool = True,
    ) -> Tensor:
        """Train K lanes for an epoch, in place, and validate them; return the figures ``(K, 5)``.

        They are each lane's mean training loss, validation loss, score, penalty and sparsity.
        ``rate_K`` are the learning rates where the schedule starts. ``tick`` is called after every
        batch of the validation and every step, or after those that are taken at once, see
        ``repeating``; from any thread. ``trying`` as in ``Cores.run``.
        """

        def work(step: LaneStep, chunk: Chunk) -> Tensor:
            own = self._share(chunk, tensors, strengths, rate_K, places)
            # Summed up in the end: in the same order, whatever steps were taken at once.
            losses_of: dict[int, list[Tensor]] = defaultdict(list)
            with closing(self._take_steps(step, chunk, own)) as steps:
                for losses, rows in steps:
                    losses_of[rows] += losses
                    tick()
            total_K = torch.stack(
                [rows * torch.stack(losses).sum(0) for rows, losses in losses_of.items()]
            ).sum(0)
            if own.tensors.averages:
                self._average(step, chunk, own, tick)
            held_K2 = self._measure(
                step,
                chunk,
                *own.tensors.evaluated,
                own.members,
                self._validation,
                tick,
            )
            loss_K1 = (total_K / self.batches.rows)[:, None]
            return torch.cat([loss_K1, held_K2, self._weigh(own)], dim=1)

        return self._cores.run(self._with_replica(work), len(tensors), trying=trying)

    def test(
        self, parameters: Tensors, buffers: Tensors, members: Sequence[int], tick: Tick
    ) -> Tensor:
        """Return each lane's mean loss and score on the test rows: ``(K, 2)``.

        ``tick`` is called after every batch, from any thread.
        """

        def work(step: LaneStep, chunk: Chunk) -> Tensor:
            return self._measure(
                step,
                chunk,
                {name: parameter[chunk.lanes] for name, parameter in parameters.items()},
                {name: buffer[chunk.lanes] for name, buffer in buffers.items()},
                members[chunk.lanes],
                self._test,
                tick,
            )

        return self._cores.run(self._with_replica(work), len(members))

    def rehearse(
        self,
        tensors: LaneTensors,
        strengths: Tensors,
        rate_K: NDArray[np.float64],
        places: Sequence[Place],
    ) -> float:
        """Train K lanes for a moment; return how many trial-epochs a second they would make.

        Without validation. The moment is counted from when the step is in the form in which it
        goes on, recorded and on a GPU captured, unless that is long in coming.
        """

        def work(step: LaneStep, chunk: Chunk) -> Tensor:
            own = self._share(chunk, tensors, strengths, rate_K, places)
            clock = _Rehearsal(self._device)
            settled = False
            while not clock.over:
                with closing(self._take_steps(step, chunk, own)) as steps:
                    for losses, rows in steps:
                        synchronize(self._device)
                        clock.note(len(losses), count=settled)
                        if clock.over:
                            break
                        kind = "step", len(own.places), chunk.threads
                        settled = self.programs.settled(*kind, rows)
            return torch.tensor([chunk.lanes.stop - chunk.lanes.start]) * clock.rate

        rate_C = self._cores.run(self._with_replica(work), len(tensors))
        at_a_time = min(len(rate_C), self._cores.threads)
        return float(rate_C.mean()) * at_a_time / len(self.batches.sizes)

    def settle_memory(
        self,
        tensors: LaneTensors,
        strengths: Tensors,
        rate_K: NDArray[np.float64],
        places: Sequence[Place],
    ) -> int:
        """Return the most bytes that K lanes need within an epoch besides what they hold anyway.

        From here on evaluation batches are as large as that allows, and it is known about how long
        it takes to record a step. ``tensors`` are used up.
        """
        lanes = len(places)
        own = self._share(Chunk(slice(0, lanes), 1), tensors, strengths, rate_K, places)
        source = self._source(self._supply, own.members)
        rate_SK, coefficients_SCK = self._scheduled(own.rate_K, own.places)
        order, keys = self.batches.of_epoch(own.places)
        first_keys = next(keys)
        size = self.batches.sizes[0]
        with closing(self._supply.batches(order, [size])) as batches:
            batch = next(batches)
        several = len(self._splits) > 1  # members, each of which gathers rows of its own
        weight = self._like.new_ones((lanes, size) if several else size)
        step = self._replicas.get()

        def take() -> None:
            numbers = rate_SK[0], coefficients_SCK[0], first_keys
            step.take(own.live, own.strengths, source, *numbers, *batch)

        with torch.no_grad():
            if self._device.type == "cuda":
                take()  # the first one loads kernels, and has cuDNN choose among its own
                synchronize(self._device)
            started = perf_counter()
            training = peak_bytes(take)
            # To count bytes is to go through every operation in Python, as it is to record it.
            self.programs.recording_seconds = (perf_counter() - started) * COUNTED_STEPS_A_RECORDING
            *brought, index = batch
            evaluation = peak_bytes(
                lambda: step.measure(
                    own.tensors.parameters,
                    own.tensors.buffers,
                    source,
                    weight,
                    *brought,
                    index.view(lanes, -1) if several else index.view(lanes, -1)[0],
                )
            )
        self._replicas.put(step)
        bytes_per_row = evaluation / size
        rows = int(max(training, lanes * CHEAP_BYTES) / bytes_per_row)
        self._evaluation_rows = max(1, min(rows, MOST_EVALUATION_ROWS))
        held = BATCHES_AT_ONCE + (CAPTURED_BATCHES if self._device.type == "cuda" else 0)
        waiting = held * sum(part.nbytes for part in brought)
        return waiting + int(max(training, self._evaluation_rows * bytes_per_row))

    def ended(self, seconds: float, epochs_to_come: int) -> None:
        """Note that an epoch took so long; what has been compiled meanwhile takes over.

        ``epochs_to_come`` are those that will be trained for certain.
        """
        try:
            self._cores.note(seconds)
            if self.programs.epoch_ended(seconds, epochs_to_come):
                self._cores.forget()
            later, self._later = self._later, None
            if later is not None:
                # What is needed first has been compiled by now, or is about to be.
                later()
        except Exception as error:  # noqa: BLE001 - the epoch has been trained all the same
            log.warning("not_recorded", program="step", reason=first_line(error))

    def expect(self, lanes: int, seconds: float, throwaway: Throwaway) -> None:
        """Record and compile from now on what pays if up to so many lanes train for so long.

        ``throwaway`` returns so many lanes that may be trained for nothing.
        """
        common, rarer = set(self._cores.sizes(lanes)), self._cores.rarer_sizes(lanes)
        if self.programs.expect("step", common | rarer, seconds):
            self._record(common, throwaway)
            self.programs.settle(min(HEAD_START_SECONDS, HEAD_START_SHARE * seconds))
            self._later = lambda: self._record(rarer, throwaway)

    def _record(self, sizes: Collection[int], throwaway: Throwaway) -> None:
        """Record the step for chunks of these sizes, and let it be compiled."""

        def work(step: LaneStep, chunk: Chunk) -> Tensor:
            tensors, strengths, rate_K, places = throwaway(chunk.lanes.stop)
            own = self._share(chunk, tensors, strengths, rate_K, places)
            with closing(self._take_steps(step, chunk, own)) as steps:
                losses, _ = next(steps)
            return losses[0]

        for size in sorted(sizes, reverse=True):
            self._cores.run_one(self._with_replica(work), size)
        self.programs.compile_what_pays()

    def settle(self) -> None:
        """Wait until nothing is being compiled any more."""
        if self.programs.settle():
            self._cores.forget()

    def close(self) -> None:
        """Give the threads back."""
        self.programs.close()
        self._cores.close()
        self._pool.shutdown(wait=False)

    def _with_replica(self, work: Callable[[LaneStep, Chunk], Tensor]) -> Callable[[Chunk], Tensor]:
        """Return ``work`` with a step that no other thread uses meanwhile."""

        def with_replica(chunk: Chunk) -> Tensor:
            step = self._replicas.get()
            try:
                return work(step, chunk)
            finally:
                self._replicas.put(step)

        return with_replica

    def _share(
        self,
        chunk: Chunk,
        tensors: LaneTensors,
        strengths: Tensors,
        rate_K: NDArray[np.float64],
        places: Sequence[Place],
    ) -> "_Share":
        return _Share(
            tensors.slice(chunk.lanes),
            {name: values[chunk.lanes] for name, values in strengths.items()},
            rate_K[chunk.lanes],
            places[chunk.lanes],
        )

    def _take_steps(
        self, step: LaneStep, chunk: Chunk, own: "_Share"
    ) -> Generator[tuple[Sequence[Tensor], int], None, None]:
        """Take an epoch's steps, some at a time where the program can.

        Yield each lane's loss before each of those, ``(K,)``, and how many rows each step has. To
        be closed unless it has come to its end.
        """
        source = self._source(self._supply, own.members)
        scheduled = map(of_each_step, self._scheduled(own.rate_K, own.places))
        order, keys = self.batches.of_epoch(own.places)
        with closing(self._supply.batches(order, self.batches.sizes)) as batches:
            steps = (
                (*numbers, *batch)
                for *numbers, batch in zip(*scheduled, keys, batches, strict=True)
            )
            for shape, alike in groupby(steps, lambda arguments: arguments[-1].shape):
                program = self.programs.find("step", len(own.places), chunk.threads, shape)
                take = program.bind(step.ways_to_take(), own.live, own.strengths, source)
                while pending := list(islice(alike, self._supply.at_once)):
                    while pending:
                        losses = take.some(pending)
                        yield losses, shape[-1]
                        del pending[: len(losses)]

    def _average(self, step: LaneStep, chunk: Chunk, own: "_Share", tick: Tick) -> None:
        """Take the weights into their averages, and find what batch norms see of those."""
        tensors = own.tensors
        counts = averaged_epochs(self._training, [place.epoch for place in own.places])
        count_K = torch.tensor(counts).to(self._like)
        average_(tensors.averages, tensors.parameters, count_K)
        # Summed up where they are wanted: a CUDA graph goes by addresses.
        sought = step.statistics if max(counts) > 1 else ()
        found = {name: tensors.average_buffers[name].zero_() for name in sought}
        source = self._source(self._supply, own.members)

        @cache
        def find(shape: torch.Size) -> Callable[..., Tensor]:
            program = self.programs.find("statistics", len(counts), chunk.threads, shape)
            ways = step.ways_to_find_statistics()
            return program.bind(ways, tensors.averages, tensors.buffers, found, source)

        if found:
            order, _ = self.batches.of_epoch(own.places)
            with closing(self._supply.batches(order, self.batches.sizes)) as batches:
                for *brought, index in batches:
                    find(index.shape)(*brought, index)
                    tick()
            for total_K in found.values():
                total_K.div_(len(self.batches.sizes))
        complete_buffers_(tensors.average_buffers, tensors.buffers, found, count_K)

    def _measure(
        self,
        step: LaneStep,
        chunk: Chunk,
        parameters: Tensors,
        buffers: Tensors,
        members: Sequence[int],
        held: Held,
        tick: Tick,
    ) -> Tensor:
        """Return each lane's mean loss and score on rows held out: ``(K, 2)``."""
        order, weight, size = held.of(members, self._evaluation_rows)
        source = self._source(held.supply, members)
        terms = self._objective.terms
        total_TK = self._like.new_zeros(terms, len(members))
        ranked = []
        weights = torch.split(weight, size, dim=-1)
        shapes = weights[0].shape, len(held.rows)
        program = self.programs.find("measure", len(members), chunk.threads, *shapes)
        measure = program.bind(step.ways_to_measure(), parameters, buffers, source)
        with closing(held.supply.batches(order, [size] * len(weights))) as batches:
            for batch, counts in zip(batches, weights, strict=True):
                measured = measure(counts.contiguous(), *batch)
                total_TK += measured[:terms]
                ranked.append(measured[terms:].clone())  # a recorded program writes there again
                tick()
        return self._objective.figures(
            total_TK,
            held.rows_M[members],
            torch.cat(ranked).T,
            lambda: held.targets(order),
            weight,
        )

    def _source(self, supply: Supply, members: Sequence[int]) -> Source:
        if len(self._splits) == 1:
            return supply.fixed
        return supply.fixed._replace(of_lanes=self._of_lanes(tuple(members)))

    def _scale_and_shift(self, members: Sequence[int]) -> tuple[Tensor, Tensor]:
        scale_K, shift_K = (
            torch.stack([getattr(self._splits[member], part) for member in members])
            for part in ("scale", "shift")
        )
        return scale_K, shift_K

    def _scheduled(
        self, rate_K: NDArray[np.float64], places: Sequence[Place]
    ) -> tuple[Tensor, Tensor]:
        """Return each step's learning rates ``(S, K)`` and coefficients ``(S, C, K)``."""
        steps = len(self.batches.sizes)
        first_K = np.array([(place.epoch - 1) * steps for place in places])
        step_SK = (first_K + np.arange(1, steps + 1)[:, None]).astype(np.float64)
        rate_SK = scheduled_rates(self._training, rate_K, step_SK, steps)
        coefficients_SCK = self._optimizer.coefficients(rate_SK, step_SK).swapaxes(0, 1)
        rates, coefficients = (
            torch.from_numpy(np.ascontiguousarray(numbers)).to(self._like)
            for numbers in (rate_SK, coefficients_SCK)
        )
        return rates, coefficients

    def _weigh(self, own: "_Share") -> Tensor:
        """Return each lane's penalty and sparsity: ``(K, 2)``."""
        weights = [own.tensors.parameters[name] for name in self._penalized]
        coupled_K = None if self._optimizer.decoupled_decay else own.strengths["decay"]
        penalty_K = regularizers.penalty(weights, own.strengths["l1"], coupled_K)
        evaluated, _ = own.tensors.evaluated
        weights = [evaluated[name] for name in self._penalized]
        sparsity_K = regularizers.sparsity(weights) if weights else torch.zeros_like(penalty_K)
        return torch.stack([penalty_K, sparsity_K.to(penalty_K)], dim=1)


@dataclass(frozen=True)
class _Share:
    """What a chunk has of all lanes."""

    tensors: LaneTensors
    strengths: Tensors
    rate_K: NDArray[np.float64]
    places: Sequence[Place]

    @property
    def live(self) -> Live:
        return self.tensors.parameters, self.tensors.moments, self.tensors.buffers

    @property
    def members(self) -> list[int]:
        return [place.member for place in self.places]


class _Rehearsal:
    """Times steps, once they are warm, for a moment; never the first, which loads much of torch."""

    def __init__(self, device: torch.device) -> None:
        on_cuda = device.type == "cuda"
        self._warm_up_seconds = CUDA_WARM_UP_SECONDS if on_cuda else WARM_UP_SECONDS
        self._started = self._latest = perf_counter()
        self._seconds: list[float] = []
        self.over = False

    @property
    def rate(self) -> float:
        """Steps a second, by the median: a step may be recorded, or another program intrude."""
        return 1 / median(self._seconds)

    def note(self, steps: int, *, count: bool) -> None:
        """Note so many steps; they count if they shall, and after a while all the same."""
        began, self._latest = self._latest, perf_counter()
        if count or began - self._started > self._warm_up_seconds:
            self._seconds += [(self._latest - began) / steps] * steps
            self.over = sum(self._seconds) > REHEARSAL_SECONDS
