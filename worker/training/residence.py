"""Whether a study's rows are kept on the training device, or streamed to it from the host.

And whether images that are kept there stay bytes.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from worker.errors import NoRoom, NoRoomForModel
from worker.tasks.preparation import Prepared
from worker.training.capacity import free_bytes, readable
from worker.training.supply import BATCHES_AT_ONCE

OnDevice = Literal["auto", "always", "never"]

RESIDENT_SHARE = 0.5
"""The share of a device's free memory that rows may take; the rest is for lanes."""

NUMBERS_SHARE = 0.1
"""The same of images that are kept as numbers, of four times as many bytes, to be read faster."""


@dataclass(frozen=True)
class Residence:
    """Where rows are, and what all of them would take on the device.

    ``keeps_bytes`` says whether images of bytes stay bytes where they are resident.
    """

    resident: bool
    row_bytes: int
    keeps_bytes: bool = True

    def __str__(self) -> str:
        return "resident" if self.resident else "streamed"


def choose(prepared: Prepared, device: torch.device, wish: OnDevice, batch_rows: int) -> Residence:
    """Return where rows are to be, for batches of so many rows.

    Raises NoRoom if they are to be on a device that has no room for them, NoRoomForModel if not
    even the batches of a few steps have room there, whose size may be one of several.
    """
    needed = sum(len(rows) * rows.bytes_kept for rows in (prepared.rows, prepared.test))
    free = free_bytes(device)
    if wish != "never" and prepared.rows.are_bytes and reads_bytes_slowly(device):
        as_numbers = sum(len(rows) * rows.bytes_each for rows in (prepared.rows, prepared.test))
        if as_numbers <= NUMBERS_SHARE * free:
            return Residence(True, as_numbers, keeps_bytes=False)
    there = device.type == "cpu" and prepared.rows.finished
    if wish == "always" and needed > free and not there:
        raise NoRoom(
            f"the rows take {readable(needed)} on {device}, which has {readable(free)} free; "
            "REGTUNE_DATA_ON_DEVICE=auto streams them"
        )
    if wish == "always" or (wish == "auto" and (there or needed <= RESIDENT_SHARE * free)):
        return Residence(True, needed)
    batches = BATCHES_AT_ONCE * batch_rows * prepared.rows.bytes_each
    if batches > free:
        raise NoRoomForModel(
            f"a row takes {readable(prepared.rows.bytes_each)} on {device} and a few batches of "
            f"{batch_rows} rows {readable(batches)}, but {readable(free)} are free; take a smaller "
            "training.batch_size, or smaller rows"
        )
    return Residence(False, needed)


def reads_bytes_slowly(device: torch.device) -> bool:
    """Whether a compiled step loses time by turning bytes into numbers.

    For eight bytes at a time, as it computes with AVX2, torch's headers have no load but one by way
    of memory. For AVX-512's sixteen they have one (torch 2.15, ``vec256_int.h``, ``vec512_int.h``).
    """
    return device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"
