"""What a lane is: a trial, how far it has come, and its slice of the stacked tensors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite, nan
from typing import Literal, Self

import torch
from torch import Tensor

from worker.training.early_stopping import EarlyStopping

Ended = Literal["finished", "early_stopped", "diverged"]


@dataclass(frozen=True)
class LaneTrial:
    """A trial to train in one lane; ``key`` is the caller's name for it."""

    key: int
    weight_decay: float
    dropout: float
    l1_lambda: float
    patience: int


@dataclass(frozen=True)
class LaneEpoch:
    """What one lane did in one epoch.

    ``epoch`` counts from 1. ``train_loss`` is the mean cross-entropy of the rows as they were
    trained on, without penalties; ``penalty`` is λ₁‖w‖₁ and, where decay is coupled, (λ₂/2)‖w‖²,
    at the epoch's end. ``validation_score`` is the accuracy. ``sparsity`` is the share of the
    penalized weights that are exactly zero. ``seconds`` is what the epoch took on the clock, for
    all lanes together.
    """

    key: int
    epoch: int
    train_loss: float
    validation_loss: float
    validation_score: float
    penalty: float
    sparsity: float
    seconds: float
    ended: Ended | None


@dataclass(frozen=True)
class LaneResult:
    """A lane at its best weights; scores are accuracies."""

    key: int
    best_epoch: int
    validation_loss: float
    validation_score: float
    test_loss: float
    test_score: float


@dataclass
class Lane:
    """A trial in training, as the host sees it."""

    trial: LaneTrial
    stopping: EarlyStopping
    best_score: float = nan
    ended: Ended | None = None

    @classmethod
    def starting(cls, trial: LaneTrial, min_delta: float) -> Self:
        """Return a lane before its first epoch."""
        return cls(trial, EarlyStopping(trial.patience, min_delta))

    @property
    def key(self) -> int:
        """The caller's name for the trial."""
        return self.trial.key

    @property
    def epoch(self) -> int:
        """How many epochs it has trained."""
        return self.stopping.epoch

    def observe(
        self, train_loss: float, validation_loss: float, score: float, max_epochs: int
    ) -> None:
        """Take in one more epoch, and decide whether it was the last."""
        self.stopping = self.stopping.observe(validation_loss)
        if self.stopping.improved:
            self.best_score = score
        if not (isfinite(train_loss) and isfinite(validation_loss)):
            self.ended = "diverged"
        elif self.epoch >= max_epochs:
            self.ended = "finished"
        elif self.stopping.stops:
            self.ended = "early_stopped"


@dataclass(frozen=True)
class LaneTensors:
    """All that K lanes hold on the device; every tensor's first axis is the lane."""

    parameters_KP: Tensor
    best_parameters_KP: Tensor
    moments: tuple[Tensor, ...]
    buffers: dict[str, Tensor]
    best_buffers: dict[str, Tensor]

    @classmethod
    def starting(
        cls, parameters_P: Tensor, buffers: dict[str, Tensor], moments: int, lanes: int
    ) -> Self:
        """Return ``lanes`` copies of the initial weights and buffers, with moments of zero."""
        parameters_KP = _repeat(parameters_P, lanes)
        return cls(
            parameters_KP=parameters_KP,
            best_parameters_KP=parameters_KP.clone(),
            moments=tuple(torch.zeros_like(parameters_KP) for _ in range(moments)),
            buffers={name: _repeat(buffer, lanes) for name, buffer in buffers.items()},
            best_buffers={name: _repeat(buffer, lanes) for name, buffer in buffers.items()},
        )

    def select(self, lanes: Sequence[int]) -> "LaneTensors":
        """Return copies of these lanes, in this order."""
        index = torch.tensor(lanes, dtype=torch.int64, device=self.parameters_KP.device)
        return _combine(lambda tensor: tensor.index_select(0, index), self)

    def join(self, others: "LaneTensors") -> "LaneTensors":
        """Return these lanes and, behind them, the others."""
        return _combine(lambda mine, theirs: torch.cat([mine, theirs]), self, others)

    def keep_best_(self, improved_K: Tensor) -> None:
        """Copy weights and buffers of the lanes that ``improved_K`` (bool) marks."""
        _copy_where_(self.best_parameters_KP, self.parameters_KP, improved_K)
        for name, best in self.best_buffers.items():
            _copy_where_(best, self.buffers[name], improved_K)


def _repeat(tensor: Tensor, lanes: int) -> Tensor:
    return tensor.expand(lanes, *tensor.shape).clone()


def _combine(function: Callable[..., Tensor], *stacks: LaneTensors) -> LaneTensors:
    return LaneTensors(
        parameters_KP=function(*(s.parameters_KP for s in stacks)),
        best_parameters_KP=function(*(s.best_parameters_KP for s in stacks)),
        moments=tuple(map(function, *(s.moments for s in stacks))),
        buffers={n: function(*(s.buffers[n] for s in stacks)) for n in stacks[0].buffers},
        best_buffers={n: function(*(s.best_buffers[n] for s in stacks)) for n in stacks[0].buffers},
    )


def _copy_where_(target: Tensor, source: Tensor, chosen_K: Tensor) -> None:
    chosen = chosen_K.view(-1, *(1 for _ in target.shape[1:]))
    torch.where(chosen, source, target, out=target)
