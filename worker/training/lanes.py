"""The state of lanes: what the host knows of a trial, and what the device holds for it.

A trial takes as many lanes as it has members (folds × repeats, usually one); they stand side by
side, start together and end together.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite, nan
from statistics import fmean, stdev
from typing import Literal, Self

import torch
from torch import Tensor

from worker.training.dropout import dropout_threshold
from worker.training.early_stopping import EarlyStopping
from worker.training.layout import like

Tensors = Mapping[str, Tensor]
Ended = Literal["finished", "early_stopped", "diverged"]


@dataclass(frozen=True)
class LaneTrial:
    """A trial to train; ``key`` is the caller's name for it, the rest are its hyperparameters.

    A limit of 0 is no limit.
    """

    key: int
    weight_decay: float
    dropout: float
    l1_lambda: float
    patience: int
    learning_rate: float
    label_smoothing: float = 0.0
    input_noise: float = 0.0
    weight_noise: float = 0.0
    max_norm: float = 0.0
    max_gradient_norm: float = 0.0
    input_dropout: float = 0.0
    augment_strength: float = 0.0
    mixup: float = 0.0


@dataclass(frozen=True)
class LaneEpoch:
    """What one trial did in one epoch; with several members, the mean over them.

    ``epoch`` counts from 1. ``train_loss`` is the mean loss of the rows as they were trained
    on, without penalties; ``penalty`` is λ₁‖w‖₁ and, where decay is coupled, (λ₂/2)‖w‖²,
    at the epoch's end. ``validation_score`` is the task's score. ``sparsity`` is the share of the
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
    """A trial at its best weights, the mean over its members.

    ``validation_loss_spread`` is the standard deviation over the members, None for a single one.
    """

    key: int
    best_epoch: int
    validation_loss: float
    validation_score: float
    test_loss: float
    test_score: float
    validation_loss_spread: float | None = None


@dataclass
class Lane:
    """A trial in training, as the host sees it."""

    trial: LaneTrial
    stopping: EarlyStopping
    best_score: float = nan
    best_spread: float | None = None
    latest_loss: float = nan
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
        self, train_loss: float, validation_losses: Sequence[float], score: float, max_epochs: int
    ) -> None:
        """Take in one more epoch of all members, and decide whether it was the last.

        Of several losses that are not all finite there is no mean that says anything.
        """
        several_finite = all(map(isfinite, validation_losses)) or len(validation_losses) == 1
        self.latest_loss = validation_loss = fmean(validation_losses) if several_finite else nan
        self.stopping = self.stopping.observe(validation_loss)
        if self.stopping.improved:
            self.best_score = score
            self.best_spread = stdev(validation_losses) if len(validation_losses) > 1 else None
        if not (isfinite(train_loss) and isfinite(validation_loss)):
            self.ended = "diverged"
        else:
            self.end_if_over(max_epochs)

    def end_if_over(self, max_epochs: int) -> None:
        """End if no epoch is left, or no patience, as where it was left before it was tested."""
        if self.epoch >= max_epochs:
            self.ended = "finished"
        elif self.stopping.stops:
            self.ended = "early_stopped"


@dataclass(frozen=True)
class LaneTensors:
    """All that K lanes hold on the device, by name; every tensor's first axis is the lane.

    Each of the optimizer's ``moments`` has a tensor for each parameter. ``averages`` of parameters
    and ``average_buffers`` beside them are empty unless weights are averaged.
    """

    parameters: Tensors
    best_parameters: Tensors
    moments: tuple[Tensors, ...]
    buffers: Tensors
    best_buffers: Tensors
    averages: Tensors
    average_buffers: Tensors

    @classmethod
    def starting(
        cls,
        parameters_M: Tensors,
        buffers_M: Tensors,
        moments: int,
        trials: int,
        averaging: bool = False,
    ) -> Self:
        """Return lanes for ``trials`` trials, each with copies of the initial M members.

        Moments start at zero.
        """

        def copies(parts_M: Tensors) -> Tensors:
            return {name: _repeat(part, trials) for name, part in parts_M.items()}

        zeros_M = {name: torch.zeros_like(part) for name, part in parameters_M.items()}
        return cls(
            parameters=copies(parameters_M),
            best_parameters=copies(parameters_M),
            moments=tuple(copies(zeros_M) for _ in range(moments)),
            buffers=copies(buffers_M),
            best_buffers=copies(buffers_M),
            averages=copies(parameters_M) if averaging else {},
            average_buffers=copies(buffers_M) if averaging else {},
        )

    def __len__(self) -> int:
        return len(self._any)

    def named(self) -> dict[str, Tensor]:
        """Return all tensors, each under a name that says what it is."""
        groups = {
            "parameters": self.parameters,
            "best_parameters": self.best_parameters,
            **{f"moments.{i}": moment for i, moment in enumerate(self.moments)},
            "buffers": self.buffers,
            "best_buffers": self.best_buffers,
            "averages": self.averages,
            "average_buffers": self.average_buffers,
        }
        return {
            f"{group}.{name}": part
            for group, parts in groups.items()
            for name, part in parts.items()
        }

    def select(self, lanes: Sequence[int]) -> "LaneTensors":
        """Return copies of these lanes, in this order."""
        index = self._index(lanes)
        return _combine(lambda tensor: like(tensor, lambda t: t.index_select(0, index)), self)

    def on_host(self) -> "LaneTensors":
        """Return the lanes in the host's memory: copies, unless they lie there anyway."""
        return _combine(lambda tensor: tensor.cpu(), self)

    def slice(self, lanes: slice) -> "LaneTensors":
        """Return a view of some lanes: what is written there is written here."""
        return _combine(lambda tensor: tensor[lanes], self)

    def join(self, others: "LaneTensors") -> "LaneTensors":
        """Return these lanes and, behind them, the others."""
        return _combine(lambda mine, theirs: like(mine, _joined, theirs), self, others)

    def restart_(self, parameters_M: Tensors, buffers_M: Tensors) -> None:
        """Bring a trial's lanes to where a trial starts, wherever they were; takes no memory."""
        for parts in (self.parameters, self.best_parameters, self.averages):
            for name, part_M in parts.items():
                part_M.copy_(parameters_M[name])
        for parts in (self.buffers, self.best_buffers, self.average_buffers):
            for name, part_M in parts.items():
                part_M.copy_(buffers_M[name])
        for moment in self.moments:
            for part_M in moment.values():
                part_M.zero_()

    def changing(self) -> Tensors:
        """Return what training steps change, by name; the best weights wait for the epoch's end."""
        return {name: part for name, part in self.named().items() if not name.startswith("best_")}

    @property
    def evaluated(self) -> tuple[Tensors, Tensors]:
        """The parameters and buffers that are validated: the averages where there are any."""
        if self.averages:
            return self.averages, self.average_buffers
        return self.parameters, self.buffers

    def best_of(self, lanes: Sequence[int]) -> tuple[Tensors, Tensors]:
        """Return copies of these lanes' best parameters and buffers, in this order."""
        index = self._index(lanes)
        parameters, buffers = (
            {name: like(best, lambda t: t.index_select(0, index)) for name, best in parts.items()}
            for parts in (self.best_parameters, self.best_buffers)
        )
        return parameters, buffers

    def keep_best_(self, improved_K: Tensor) -> None:
        """Copy what was validated of the lanes that ``improved_K`` (bool) marks."""
        best = (self.best_parameters, self.best_buffers)
        for kept, current in zip(best, self.evaluated, strict=True):
            for name, kept_K in kept.items():
                _copy_where_(kept_K, current[name], improved_K)

    @property
    def _any(self) -> Tensor:
        return next(iter(self.parameters.values()))

    def _index(self, lanes: Sequence[int]) -> Tensor:
        return torch.tensor(lanes, dtype=torch.int64, device=self._any.device)


def strengths_of(
    trials: Sequence[LaneTrial], device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return how strongly each lane is regularized, in the forms that a step wants: ``(K,)`` each.

    ``trials`` are those of the lanes, one for each.
    """
    rates = {
        "dropout": torch.tensor([trial.dropout for trial in trials], dtype=torch.float64),
        "input_dropout": torch.tensor(
            [trial.input_dropout for trial in trials], dtype=torch.float64
        ),
    }
    exact = {
        **{f"{name}_scale": (1 / (1 - rate_K)).tolist() for name, rate_K in rates.items()},
        "decay": [trial.weight_decay for trial in trials],
        "l1": [trial.l1_lambda for trial in trials],
        "label_smoothing": [trial.label_smoothing for trial in trials],
        "input_noise": [trial.input_noise for trial in trials],
        "weight_noise": [trial.weight_noise for trial in trials],
        "augment_strength": [trial.augment_strength for trial in trials],
        "mixup": [trial.mixup for trial in trials],
        "max_norm": [trial.max_norm or inf for trial in trials],
        "max_gradient_norm": [trial.max_gradient_norm or inf for trial in trials],
    }
    return {
        **{
            f"{name}_threshold": dropout_threshold(rate_K).to(device)
            for name, rate_K in rates.items()
        },
        **{
            name: torch.tensor(values, dtype=torch.float64).to(device, dtype)
            for name, values in exact.items()
        },
    }


def _repeat(tensor_M: Tensor, times: int) -> Tensor:
    return like(tensor_M, lambda t: t.repeat(times, *(1 for _ in t.shape[1:])))


def _joined(mine: Tensor, theirs: Tensor) -> Tensor:
    return torch.cat([mine, theirs])


def _combine(function: Callable[..., Tensor], *stacks: LaneTensors) -> LaneTensors:
    def each(*parts: Tensors) -> Tensors:
        return {name: function(*(part[name] for part in parts)) for name in parts[0]}

    return LaneTensors(
        parameters=each(*(s.parameters for s in stacks)),
        best_parameters=each(*(s.best_parameters for s in stacks)),
        moments=tuple(map(each, *(s.moments for s in stacks))),
        buffers=each(*(s.buffers for s in stacks)),
        best_buffers=each(*(s.best_buffers for s in stacks)),
        averages=each(*(s.averages for s in stacks)),
        average_buffers=each(*(s.average_buffers for s in stacks)),
    )


def _copy_where_(target: Tensor, source: Tensor, chosen_K: Tensor) -> None:
    chosen = chosen_K.view(-1, *(1 for _ in target.shape[1:]))
    torch.where(chosen, source, target, out=target)
