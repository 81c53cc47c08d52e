"""Where steps get their rows from: all of them lie on the device, or a batch at a time is brought.

Rows that a device has no room for stay on the host as they are stored, images as bytes. Threads
gather the batches of the next few steps there, rows that several lanes see once, and copy them to
the device, where they are standardized: the same numbers as if all rows lay there. A step takes its
rows by number from either, so that it is the same step.
"""

from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from itertools import accumulate
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from worker.tasks.rows import Rows
from worker.training.batches import STEPS_AT_ONCE, Order
from worker.training.cores import Brake, side_streams
from worker.training.step import Source

STEPS_AHEAD = 3
"""Batches that are gathered, or wait, while a step is computed."""

STEPS_LAUNCHED = 8
"""Steps that a GPU is given before the first of them must be done, where all rows lie on it."""

BATCHES_AT_ONCE = STEPS_AHEAD + 2
"""The most batches that take memory: on a GPU, one step is computed while the next is launched."""

MOST_THREADS = 4
"""More of them would only wait for the same memory or disk."""

BatchIterator = Generator[tuple[Tensor, ...], None, None]


class Supply(Protocol):
    """Gives steps their rows; several chunks of lanes may ask at the same time."""

    @property
    def fixed(self) -> Source:
        """What is the same for every batch."""

    @property
    def at_once(self) -> int:
        """How many batches may be asked for before the first of them is used."""

    def batches(self, order: Order, sizes: Sequence[int]) -> BatchIterator:
        """Yield batches of these sizes, see ``step.gather``; to be closed unless at its end.

        What is yielded may be written over once the next batch beyond those is asked for.
        """


class Resident:
    """All rows lie on the device."""

    def __init__(self, rows: Rows) -> None:
        self._device = rows.x.device
        self.fixed = Source(
            (rows.x, rows.y), rows.pending.of_row(rows.x[0]) if rows.pending else ()
        )
        # A GPU computes one step after the other anyway, and is waited for in between.
        self.at_once = STEPS_AT_ONCE if self._device.type == "cpu" else 1

    def batches(self, order: Order, sizes: Sequence[int]) -> BatchIterator:
        """Yield the numbers of each batch's rows."""
        brake = Brake(self._device, STEPS_LAUNCHED)
        for batch in order.cut(sizes, self._device):
            yield (batch,)
            brake()


class Streamed:
    """Rows lie on the host, and batches are brought to the device."""

    fixed = Source()
    at_once = 1

    def __init__(
        self,
        rows: Rows,
        device: torch.device,
        memory_format: torch.memory_format,
        pool: ThreadPoolExecutor,
    ) -> None:
        """``rows`` are stored ones. ``pool`` is where batches are gathered."""
        assert rows.pending is not None
        self._stored_x, self._stored_y = rows.x.numpy(), rows.y.numpy()
        self._standardization = rows.pending.to(device)
        self._device = device
        self._memory_format = memory_format
        self._pool = pool
        self._side = side_streams(device).bringing if device.type == "cuda" else None

    def batches(self, order: Order, sizes: Sequence[int]) -> BatchIterator:
        """Yield rows and their numbers: the lanes' own, or those of all.

        There is room for rows of each lane's own; the front of it holds those of each group, and
        what is behind them is not set. So there is one program to record and to compile for so many
        lanes, whoever of them see the same.
        """
        ahead: deque[Future[_Brought]] = deque()
        brake = Brake(self._device, BATCHES_AT_ONCE - STEPS_AHEAD - 1)
        begin = 0

        @cache
        def numbers(size: int) -> Tensor:
            groups = np.asarray(order.group)[..., None] * size + np.arange(size)
            return torch.from_numpy(groups).to(self._device)

        def hand_over() -> tuple[Tensor, ...]:
            x, y = self._receive(ahead.popleft().result())
            return x, y, numbers(len(x) // order.seen_apart)

        try:
            for end in accumulate(sizes):
                rows = order.numbers_GR[:, begin:end].reshape(-1)
                room = order.seen_apart * (end - begin)
                ahead.append(self._pool.submit(self._bring, rows, room))
                begin = end
                if len(ahead) > STEPS_AHEAD:
                    yield hand_over()
                    brake()
            while ahead:
                yield hand_over()
        finally:
            wait([future for future in ahead if not future.cancel()])

    def _bring(self, numbers: NDArray[np.int64], room: int) -> "_Brought":
        """Bring rows of these numbers to the device, to the front of a tensor of so many."""
        if torch.get_num_threads() != 1:
            torch.set_num_threads(1)
        stored_x, stored_y = (
            self._gathered(stored, numbers) for stored in (self._stored_x, self._stored_y)
        )
        with self._aside():
            x = torch.empty(
                (room, *stored_x.shape[1:]),
                dtype=self._standardization.dtype,
                device=self._device,
                memory_format=self._memory_format,
            )
            y = torch.empty((room, *stored_y.shape[1:]), dtype=stored_y.dtype, device=self._device)
            self._standardization.write(
                stored_x.to(self._device, non_blocking=True), x[: len(numbers)]
            )
            y[: len(numbers)].copy_(stored_y, non_blocking=True)
            return x, y, self._side.record_event() if self._side else None

    def _gathered(self, stored: NDArray[np.generic], numbers: NDArray[np.int64]) -> Tensor:
        """Return rows side by side on the host, where the device can copy them from by itself."""
        shape = (len(numbers), *stored.shape[1:])
        dtype = torch.from_numpy(stored[:0]).dtype
        rows = torch.empty(shape, dtype=dtype, pin_memory=self._side is not None)
        np.take(stored, numbers, axis=0, out=rows.numpy(), mode="clip")
        return rows

    def _receive(self, brought: "_Brought") -> tuple[Tensor, Tensor]:
        """Let the current stream wait for what another one brings."""
        x, y, event = brought
        if event is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(event)
            for tensor in (x, y):
                tensor.record_stream(current)  # else its memory were free for the next batch
        return x, y

    def _aside(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._side) if self._side else nullcontext()


_Brought = tuple[Tensor, Tensor, torch.cuda.Event | None]


def threads_that_bring(cores: int) -> int:
    """Return how many threads gather batches for so many cores that compute."""
    return max(1, min(cores, MOST_THREADS))
