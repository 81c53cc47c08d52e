"""A trial between two epochs, whole: enough to go on anywhere as if nothing had happened.

Noise needs no state of its own: it is a function of seed, epoch and step.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from worker.training.lanes import Lane, LaneTensors


@dataclass(frozen=True)
class Checkpoint:
    """Tensors on the host, with a leading axis of members, and what the host knew."""

    tensors: Mapping[str, Tensor]
    state: Mapping[str, Any]

    @classmethod
    def of(cls, lane: Lane, tensors: LaneTensors) -> Self:
        """Return a copy of a trial's lanes."""
        return cls(
            tensors={
                name: part.detach().cpu().clone(memory_format=torch.contiguous_format)
                for name, part in tensors.named().items()
            },
            state={
                "epoch": lane.stopping.epoch,
                "best_epoch": lane.stopping.best_epoch,
                "best_loss": lane.stopping.best_loss,
                "best_score": lane.best_score,
                "best_spread": lane.best_spread,
            },
        )

    def fits(self, tensors: LaneTensors) -> bool:
        """Say whether a trial with such tensors can go on from here."""
        targets = tensors.named()
        return targets.keys() == self.tensors.keys() and all(
            targets[name].shape == part.shape and targets[name].dtype == part.dtype
            for name, part in self.tensors.items()
        )

    def restore(self, lane: Lane, tensors: LaneTensors) -> None:
        """Bring a trial that has just been set up to where the checkpoint was taken.

        Raises ValueError if the checkpoint is of another model or another training.
        """
        if not self.fits(tensors):
            raise ValueError(f"the checkpoint of trial {lane.key} is of another model or training")
        targets = tensors.named()
        for name, part in self.tensors.items():
            targets[name].copy_(part)
        lane.stopping = replace(
            lane.stopping,
            epoch=self.state["epoch"],
            best_epoch=self.state["best_epoch"],
            best_loss=self.state["best_loss"],
        )
        lane.best_score = self.state["best_score"]
        lane.best_spread = self.state["best_spread"]
