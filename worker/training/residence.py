"""Whether a study's rows are kept on the training device, or streamed to it from the host."""

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


@dataclass(frozen=True)
class Residence:
    """Where rows are, and what all of them would take on the device."""

    resident: bool
    row_bytes: int

    def __str__(self) -> str:
        return "resident" if self.resident else "streamed"


def choose(prepared: Prepared, device: torch.device, wish: OnDevice, batch_rows: int) -> Residence:
    """Return where rows are to be, for batches of so many rows.

    Raises NoRoom if they are to be on a device that has no room for them, NoRoomForModel if not
    even the batches of a few steps have room there, whose size may be one of several.
    """
    needed = sum(len(rows) * rows.bytes_kept for rows in (prepared.rows, prepared.test))
    free = free_bytes(device)
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
