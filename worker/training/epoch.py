"""An epoch of many lanes: the steps, the validation, and how they are spread over the device.

On a CPU, lanes are cut into chunks that one core computes by itself, without a word to the others
until the epoch ends; that is faster than to let all cores work on each operation together, and does
not wait for a core that another program has taken. Elsewhere all lanes are one chunk.
"""

import queue
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from regtune.spec import Training
from worker.tasks.preparation import Prepared, Rows
from worker.training import regularizers
from worker.training.batches import Batches, Place
from worker.training.compiling import Programs
from worker.training.lanes import LaneTensors
from worker.training.model import LaneModel
from worker.training.optimizers import LaneOptimizer, scheduled_rates
from worker.training.step import LaneStep, Source

EVALUATION_ROWS = 1000
"""Rows of one evaluation batch."""

CPU_CHUNK = 4
"""Most lanes in a chunk on a CPU: beyond, a step falls out of a core's cache (measured)."""

Tick = Callable[[], None]
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Chunk:
    """Lanes that are computed together, each operation by so many threads."""

    lanes: slice
    threads: int


@dataclass(frozen=True)
class Held:
    """Rows to evaluate on: for each of M members their numbers, filled up to the same length.

    ``weight_MR`` is 0 where a number only fills up; ``rows_M`` counts the others.
    """

    rows: Rows
    index_MR: Tensor
    weight_MR: Tensor
    rows_M: Tensor

    @classmethod
    def out(cls, rows: Rows, numbers: Sequence[NDArray[np.int64]]) -> "Held":
        """Return the rows of these numbers, for each member."""
        counts = np.array([len(own) for own in numbers])
        index_MR = np.stack([np.resize(own, counts.max()) for own in numbers])
        weight_MR = np.arange(counts.max()) < counts[:, None]
        return cls(
            rows,
            torch.from_numpy(index_MR).to(rows.x.device),
            torch.from_numpy(weight_MR).to(rows.x),
            torch.from_numpy(counts).to(rows.x),
        )


class Epochs:
    """Trains and evaluates lanes; keeps no state of theirs."""

    def __init__(
        self,
        prepared: Prepared,
        model: LaneModel,
        optimizer: LaneOptimizer,
        training: Training,
        *,
        knobs: Collection[str],
        threads: int,
        compiles: bool,
    ) -> None:
        """``knobs`` are the strengths that any lane may use; ``threads`` are CPU cores to use."""
        self._rows = prepared.rows
        self._splits = prepared.splits
        self._training = training
        self._optimizer = optimizer
        self._weights = model.weights
        self._threads = threads
        self.batches = Batches(
            prepared.splits,
            training.batch_size,
            training.seed,
            len(model.sites),
            prepared.rows.x.device,
        )
        every_row = np.arange(len(prepared.test))
        self._validation = Held.out(prepared.rows, [split.validation for split in prepared.splits])
        self._test = Held.out(prepared.test, [every_row] * len(prepared.splits))
        self._programs = Programs(compiles=compiles and model.vectorized)
        self._steps: queue.LifoQueue[LaneStep] = queue.LifoQueue()
        for _ in range(threads):
            self._steps.put(
                LaneStep(
                    model.replica(),
                    optimizer,
                    decay="weight_decay" in knobs,
                    l1=training.l1 if "l1_lambda" in knobs else None,
                )
            )
        self._pool = ThreadPoolExecutor(threads, "lanes", _prepare_thread)
        self._fastest_alone: dict[int, float] = {}

    def train(
        self,
        tensors: LaneTensors,
        strengths: Tensors,
        rate_K: NDArray[np.float64],
        places: Sequence[Place],
        tick: Tick,
    ) -> Tensor:
        """Train K lanes for an epoch, in place, and validate them; return the figures ``(K, 5)``.

        They are each lane's mean training loss, validation loss, score, penalty and sparsity.
        ``rate_K`` are the learning rates where the schedule starts. ``tick`` is called after every
        step and every batch of the validation, from any thread.
        """

        def work(step: LaneStep, chunk: Chunk) -> Tensor:
            own = tensors.slice(chunk.lanes)
            own_strengths = {name: values[chunk.lanes] for name, values in strengths.items()}
            own_places = places[chunk.lanes]
            members = [place.member for place in own_places]
            loss_K = self._take_steps(
                step, chunk, own, own_strengths, rate_K[chunk.lanes], own_places, tick
            )
            held_K2 = self._measure(
                step, chunk, own.parameters_KP, own.buffers, members, self._validation, tick
            )
            return torch.cat([loss_K[:, None], held_K2, self._weigh(own, own_strengths)], dim=1)

        return self._in_chunks(work, len(tensors))

    def test(self, parameters_KP: Tensor, buffers: Tensors, members: Sequence[int]) -> Tensor:
        """Return each lane's mean loss and accuracy on the test rows: ``(K, 2)``."""

        def work(step: LaneStep, chunk: Chunk) -> Tensor:
            return self._measure(
                step,
                chunk,
                parameters_KP[chunk.lanes],
                {name: buffer[chunk.lanes] for name, buffer in buffers.items()},
                members[chunk.lanes],
                self._test,
                lambda: None,
            )

        return self._in_chunks(work, len(members))

    def ended(self, seconds: float) -> None:
        """Note that an epoch took so long; what has been compiled meanwhile takes over."""
        self._programs.epoch_ended(seconds)

    def settle(self) -> None:
        """Wait until nothing is being compiled any more."""
        self._programs.settle()

    def close(self) -> None:
        """Give the threads back."""
        self._programs.close()
        self._pool.shutdown(wait=False)

    def _in_chunks(self, work: Callable[[LaneStep, Chunk], Tensor], lanes: int) -> Tensor:
        """Return what ``work`` returns for all lanes, ``(K, …)``, a chunk to a thread.

        All chunks come to an end before an exception of one of them is raised.
        """

        def run(chunk: Chunk) -> Tensor:
            if torch.get_num_threads() != chunk.threads:
                torch.set_num_threads(chunk.threads)
            step = self._steps.get()
            try:
                with torch.no_grad():
                    return work(step, chunk)
            finally:
                self._steps.put(step)

        futures = [self._pool.submit(run, chunk) for chunk in self._chunks(lanes)]
        wait(futures)
        return torch.cat([future.result() for future in futures])

    def _chunks(self, lanes: int) -> list[Chunk]:
        if self._rows.x.device.type != "cpu":
            return [Chunk(slice(0, lanes), self._threads)]
        size = min(CPU_CHUNK, -(-lanes // self._threads))
        starts = range(0, lanes, size)
        return [Chunk(slice(start, min(start + size, lanes)), 1) for start in starts]

    def _take_steps(
        self,
        step: LaneStep,
        chunk: Chunk,
        tensors: LaneTensors,
        strengths: Tensors,
        rate_K: NDArray[np.float64],
        places: Sequence[Place],
        tick: Tick,
    ) -> Tensor:
        """Take an epoch's steps; return each lane's mean training loss: ``(K,)``."""
        source = self._source(self._rows, [place.member for place in places])
        live = (tensors.parameters_KP, tensors.moments, tensors.buffers)
        rate_SK1, coefficients_SCK1 = self._scheduled(rate_K, places)
        total_K = torch.zeros_like(tensors.parameters_KP[:, 0])
        calls: dict[torch.Size, Callable[..., Tensor]] = {}
        for number, (index, keys) in enumerate(self.batches.of_epoch(places)):
            if index.shape not in calls:
                program = self._programs.find("step", len(tensors), chunk.threads, index.shape)
                calls[index.shape] = program.bind(step.take, live, strengths, source)
            loss_K = calls[index.shape](rate_SK1[number], coefficients_SCK1[number], keys, index)
            total_K += loss_K * index.shape[-1]
            tick()
        return total_K / self.batches.rows

    def _measure(
        self,
        step: LaneStep,
        chunk: Chunk,
        parameters_KP: Tensor,
        buffers: Tensors,
        members: Sequence[int],
        held: Held,
        tick: Tick,
    ) -> Tensor:
        """Return each lane's mean loss and accuracy on rows held out: ``(K, 2)``."""
        alike = len(self._splits) == 1
        index, weight = (
            part[0] if alike else part[members] for part in (held.index_MR, held.weight_MR)
        )
        source = self._source(held.rows, members)
        total_2K = parameters_KP.new_zeros(2, len(members))
        batches = (torch.split(part, EVALUATION_ROWS, dim=-1) for part in (index, weight))
        for some, counts in zip(*batches, strict=True):
            shapes = some.shape, len(held.rows)
            program = self._programs.find("measure", len(members), chunk.threads, *shapes)
            total_2K += program.bind(step.measure, parameters_KP, buffers, source)(some, counts)
            tick()
        return (total_2K / held.rows_M[members]).T

    def _source(self, rows: Rows, members: Sequence[int]) -> Source:
        if len(self._splits) == 1:
            return rows.x, rows.y
        scale_K, shift_K = (
            torch.stack([getattr(self._splits[member], part) for member in members])
            for part in ("scale", "shift")
        )
        return rows.x, rows.y, scale_K, shift_K

    def _scheduled(
        self, rate_K: NDArray[np.float64], places: Sequence[Place]
    ) -> tuple[Tensor, Tensor]:
        """Return each step's learning rates ``(S, K, 1)`` and coefficients ``(S, C, K, 1)``."""
        steps = len(self.batches.sizes)
        first_K = np.array([(place.epoch - 1) * steps for place in places])
        step_SK = (first_K + np.arange(1, steps + 1)[:, None]).astype(np.float64)
        rate_SK = scheduled_rates(self._training, rate_K, step_SK, steps)
        coefficients_SCK = self._optimizer.coefficients(rate_SK, step_SK).swapaxes(0, 1)
        rate_SK1, coefficients_SCK1 = (
            torch.from_numpy(np.ascontiguousarray(numbers[..., None])).to(self._rows.x)
            for numbers in (rate_SK, coefficients_SCK)
        )
        return rate_SK1, coefficients_SCK1

    def _weigh(self, tensors: LaneTensors, strengths: Tensors) -> Tensor:
        """Return each lane's penalty and sparsity: ``(K, 2)``."""
        weights_KW = tensors.parameters_KP[:, : self._weights]
        coupled_K = None if self._optimizer.decoupled_decay else strengths["decay"]
        penalty_K = regularizers.penalty(weights_KW, strengths["l1"], coupled_K)
        return torch.stack([penalty_K, regularizers.sparsity(weights_KW).to(penalty_K)], dim=1)


def _prepare_thread() -> None:
    """Take numbers for zero that are so small that a CPU would compute with them in microcode."""
    torch.set_flush_denormal(True)
