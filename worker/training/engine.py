"""The engine: trains the trials of one study together, each in a lane of its own.

Lanes run in step within an epoch and come and go between epochs, so each may be at another epoch.
A trial's numbers depend on its own strengths and on the seed alone, never on its neighbours, its
place or when it joined.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from regtune.spec import TaskSpec, Training
from regtune.task import find_dataset, find_model
from worker.tasks.preparation import Prepared, Rows, prepare
from worker.training import regularizers
from worker.training.lanes import Lane, LaneEpoch, LaneResult, LaneTensors, LaneTrial
from worker.training.model import Batch, DropoutRates, LaneModel, Progress
from worker.training.noise import data_order, initial_weights, step_keys
from worker.training.optimizers import OPTIMIZERS, scheduled_rate

SAMPLE_ROWS = 4
"""Rows on which a model is tried out before it trains."""

BLOCK_ELEMENTS = 400_000
"""Parameters that one optimizer update covers on a CPU, so that they stay in its cache."""


class Engine:
    """Trains lanes of one study, epoch by epoch.

    After an exception out of ``train_epoch`` (``progress`` may raise to abort) the lanes stand in
    the middle of an epoch, and the engine must be dropped.
    """

    def __init__(
        self,
        *,
        task: TaskSpec,
        training: Training,
        validation_fraction: float,
        seed: int,
        data_dir: Path,
        device: torch.device,
        max_lanes: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Load the data, build the model and try it on a few rows; no lane trains yet.

        Raises NotFound for an unknown data set or model, UnsupportedModel for one whose noise is
        its own, and whatever loading or building raises.
        """
        data = find_dataset(task.dataset)(data_dir)
        self._rows = prepare(data, validation_fraction, seed, device, dtype)
        self._model = _build_model(task, self._rows, seed, dtype).to(device)
        self._optimizer = OPTIMIZERS[training.optimizer]
        self._batch_sizes = _batch_sizes(len(self._rows.training), training.batch_size)
        self._training = training
        self._seed = seed
        self._device = device
        self._dtype = dtype
        self._max_lanes = max_lanes
        self._lanes: list[Lane] = []
        self._tensors = self._starting_tensors(0)
        self._strengths = self._stack_strengths()

    @property
    def lanes(self) -> list[int]:
        """The keys of the trials in the stack."""
        return [lane.key for lane in self._lanes]

    @property
    def free_lanes(self) -> int:
        """How many more trials may join."""
        return self._max_lanes - len(self._lanes)

    @property
    def steps_per_epoch(self) -> int:
        """How many optimizer steps an epoch takes."""
        return len(self._batch_sizes)

    def join(self, trials: Sequence[LaneTrial]) -> None:
        """Let trials start with the next epoch, at their own first one.

        Raises ValueError when there are more of them than free lanes, or a key is in use.
        """
        if len(trials) > self.free_lanes:
            raise ValueError(f"{len(trials)} trials want to join, {self.free_lanes} lanes are free")
        keys = self.lanes + [trial.key for trial in trials]
        if len(set(keys)) < len(keys):
            raise ValueError(f"each key may stand in the stack only once: {keys}")
        self._lanes += [Lane.starting(trial, self._training.min_delta) for trial in trials]
        self._tensors = self._tensors.join(self._starting_tensors(len(trials)))
        self._strengths = self._stack_strengths()

    def leave(self, keys: Sequence[int]) -> None:
        """Take trials out and close the gaps; raises KeyError for a key that is not in the stack.

        What is not ended is lost.
        """
        leaving = set(self._places(keys))
        staying = [place for place in range(len(self._lanes)) if place not in leaving]
        self._lanes = [self._lanes[place] for place in staying]
        self._tensors = self._tensors.select(staying)
        self._strengths = self._stack_strengths()

    def train_epoch(self, progress: Progress = lambda: None) -> list[LaneEpoch]:
        """Train every lane for one epoch of its own and validate it; in the order of ``lanes``.

        ``progress`` is called after every step and every batch of the validation. Raises
        ValueError while a lane that has ended is still in the stack.
        """
        if any(lane.ended for lane in self._lanes):
            raise ValueError("lanes that have ended must leave before the next epoch")
        if not self._lanes:
            return []
        started = perf_counter()
        train_loss_K = self._train(progress)
        validation_loss_K, score_K = self._model.evaluate(
            self._tensors.parameters_KP, self._tensors.buffers, self._rows.validation, progress
        )
        measured = self._measure(train_loss_K, validation_loss_K, score_K)
        return self._close_epoch(measured, perf_counter() - started)

    def results(self, keys: Sequence[int]) -> list[LaneResult]:
        """Return what these trials reached at their best weights, tested once; in this order.

        Raises KeyError for a key that is not in the stack, ValueError for a trial without an
        epoch of finite validation loss.
        """
        places = self._places(keys)
        best = self._tensors.select(places)
        test_loss_K, test_score_K = self._model.evaluate(
            best.best_parameters_KP, best.best_buffers, self._rows.test, lambda: None
        )
        tested = zip(places, test_loss_K.tolist(), test_score_K.tolist(), strict=True)
        return [_result(self._lanes[place], loss, score) for place, loss, score in tested]

    def _train(self, progress: Progress) -> Tensor:
        """Take an epoch's steps; return each lane's mean training loss: ``(K,)``."""
        rate_SK, coefficients_SCK = self._scheduled()
        total_K = torch.zeros(len(self._lanes), device=self._device, dtype=self._dtype)
        for batch, rate_K, coefficients_CK in zip(
            self._batches(), rate_SK, coefficients_SCK, strict=True
        ):
            total_K += self._step(batch, rate_K, coefficients_CK) * batch.rows
            progress()
        return total_K / len(self._rows.training)

    def _step(self, batch: Batch, rate_K1: Tensor, coefficients_CK1: Tensor) -> Tensor:
        """Take one step of every lane; return the losses ``(K,)`` before it."""
        gradient_KP, loss_K = self._model.gradients(
            self._tensors.parameters_KP, self._tensors.buffers, self._strengths.dropout, batch
        )
        for block in self._blocks():
            self._update_(block, gradient_KP[block], rate_K1[block], coefficients_CK1[:, block])
        return loss_K

    def _update_(
        self, block: slice, gradient_KP: Tensor, rate_K1: Tensor, coefficients_CK1: Tensor
    ) -> None:
        """Move the parameters of a block of lanes: decay, gradient, proximal step."""
        parameters_KP = self._tensors.parameters_KP[block]
        weights_KW = parameters_KP[:, : self._model.weights]
        decay_K1, l1_K1 = self._strengths.decay_K1[block], self._strengths.l1_K1[block]
        if self._strengths.any_decay and self._optimizer.decoupled_decay:
            regularizers.decay_(weights_KW, decay_K1, rate_K1)
        elif self._strengths.any_decay:
            gradient_KW = gradient_KP[:, : self._model.weights]
            regularizers.add_coupled_decay_(gradient_KW, weights_KW, decay_K1)
        if self._strengths.any_l1 and self._training.l1 == "subgradient":
            gradient_KW = gradient_KP[:, : self._model.weights]
            regularizers.add_l1_subgradient_(gradient_KW, weights_KW, l1_K1)
        moments = [moment[block] for moment in self._tensors.moments]
        self._optimizer.update_(parameters_KP, gradient_KP, moments, coefficients_CK1.unbind())
        if self._strengths.any_l1 and self._training.l1 == "proximal":
            regularizers.soft_threshold_(weights_KW, rate_K1 * l1_K1)

    def _batches(self) -> Iterator[Batch]:
        """Yield the epoch's batches. Lanes at the same epoch see the same rows and noise.

        All lanes share one copy while they are all at the same epoch, the usual case.
        """
        next_epochs = [lane.epoch + 1 for lane in self._lanes]
        epochs = sorted(set(next_epochs))
        per_lane = len(epochs) > 1
        group_K = [epochs.index(epoch) for epoch in next_epochs] if per_lane else 0
        rows, steps, sites = self._rows.training, self.steps_per_epoch, self._model.sites
        orders = np.stack([data_order(self._seed, epoch, len(rows)) for epoch in epochs])[group_K]
        keys = np.stack([step_keys(self._seed, epoch, steps, sites) for epoch in epochs])[group_K]
        order, key = self._on_device(orders), self._on_device(keys)
        ends = accumulate(self._batch_sizes)
        for step, (size, end) in enumerate(zip(self._batch_sizes, ends, strict=True)):
            index = order[..., end - size : end]
            yield Batch(rows.x[index], rows.y[index], key[..., step, :, :], per_lane)

    def _scheduled(self) -> tuple[Tensor, Tensor]:
        """Return each step's learning rates ``(S, K, 1)`` and coefficients ``(S, C, K, 1)``."""
        steps = self.steps_per_epoch
        first_K = np.array([lane.epoch * steps for lane in self._lanes])
        step_SK = (first_K + np.arange(1, steps + 1)[:, None]).astype(np.float64)
        training = self._training
        rate_SK = scheduled_rate(
            training.schedule, training.learning_rate, step_SK, steps * training.max_epochs
        )
        coefficients_SCK = self._optimizer.coefficients(rate_SK, step_SK).swapaxes(0, 1)
        return (
            self._on_device(rate_SK[..., None]).to(self._dtype),
            self._on_device(coefficients_SCK[..., None]).to(self._dtype),
        )

    def _measure(
        self, train_loss_K: Tensor, validation_loss_K: Tensor, score_K: Tensor
    ) -> list[list[float]]:
        """Bring to the host, for each lane: both losses, score, penalty, sparsity."""
        weights_KW = self._tensors.parameters_KP[:, : self._model.weights]
        coupled_K1 = None if self._optimizer.decoupled_decay else self._strengths.decay_K1
        penalty_K = regularizers.penalty(weights_KW, self._strengths.l1_K1, coupled_K1)
        sparsity_K = regularizers.sparsity(weights_KW)
        columns = [train_loss_K, validation_loss_K, score_K, penalty_K, sparsity_K]
        return torch.stack([column.double() for column in columns], dim=1).tolist()

    def _close_epoch(self, measured: list[list[float]], seconds: float) -> list[LaneEpoch]:
        """Decide for each lane whether it goes on; keep copies of the best weights."""
        epochs = []
        for lane, (train_loss, loss, score, penalty, sparsity) in zip(
            self._lanes, measured, strict=True
        ):
            lane.observe(train_loss, loss, score, self._training.max_epochs)
            epochs.append(
                LaneEpoch(
                    key=lane.key,
                    epoch=lane.epoch,
                    train_loss=train_loss,
                    validation_loss=loss,
                    validation_score=score,
                    penalty=penalty,
                    sparsity=sparsity,
                    seconds=seconds,
                    ended=lane.ended,
                )
            )
        improved = np.array([lane.stopping.improved for lane in self._lanes])
        self._tensors.keep_best_(self._on_device(improved))
        return epochs

    def _blocks(self) -> list[slice]:
        """Return the blocks of lanes that are updated together: as many as a CPU's cache holds."""
        lanes = len(self._lanes)
        if self._device.type != "cpu":
            return [slice(0, lanes)]
        size = max(1, BLOCK_ELEMENTS // self._tensors.parameters_KP.shape[1])
        return [slice(start, start + size) for start in range(0, lanes, size)]

    def _starting_tensors(self, lanes: int) -> LaneTensors:
        return LaneTensors.starting(
            self._model.initial_parameters,
            self._model.initial_buffers,
            self._optimizer.moments,
            lanes,
        )

    def _stack_strengths(self) -> "_Strengths":
        return _Strengths.of([lane.trial for lane in self._lanes], self._device, self._dtype)

    def _places(self, keys: Sequence[int]) -> list[int]:
        place_of = {lane.key: place for place, lane in enumerate(self._lanes)}
        return [place_of[key] for key in keys]

    def _on_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)


@dataclass(frozen=True)
class _Strengths:
    """How strongly each lane is regularized; steps that no lane wants are left out."""

    dropout: DropoutRates
    decay_K1: Tensor
    l1_K1: Tensor
    any_decay: bool
    any_l1: bool

    @classmethod
    def of(
        cls, trials: Sequence[LaneTrial], device: torch.device, dtype: torch.dtype
    ) -> "_Strengths":
        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float64)[:, None].to(device, dtype)

        rates_K = torch.tensor([trial.dropout for trial in trials], dtype=torch.float64)
        decays = [trial.weight_decay for trial in trials]
        l1_lambdas = [trial.l1_lambda for trial in trials]
        return cls(
            dropout=DropoutRates(
                threshold_K=regularizers.dropout_threshold(rates_K).to(device),
                scale_K=(1 / (1 - rates_K)).to(device, dtype),
            ),
            decay_K1=column(decays),
            l1_K1=column(l1_lambdas),
            any_decay=any(decays),
            any_l1=any(l1_lambdas),
        )


def _build_model(task: TaskSpec, rows: Prepared, seed: int, dtype: torch.dtype) -> LaneModel:
    """Build the model on the CPU, where initial weights are the same whatever trains it."""
    with initial_weights(seed):
        model = find_model(task.model)(task.settings, rows.training.input_shape, rows.classes)
    sample = Rows(rows.training.x[:SAMPLE_ROWS].cpu(), rows.training.y[:SAMPLE_ROWS].cpu())
    return LaneModel(model.to(dtype), sample)


def _batch_sizes(rows: int, batch_size: int) -> list[int]:
    """Return the sizes of an epoch's batches: every row is seen once, sizes differ by one at most.

    No batch is of a single row, on which batch norm cannot train, unless single rows are asked for.
    """
    steps = -(-rows // batch_size)
    if batch_size > 1:
        steps = max(1, min(steps, rows // 2))
    size, larger = divmod(rows, steps)
    return [size + 1] * larger + [size] * (steps - larger)


def _result(lane: Lane, test_loss: float, test_score: float) -> LaneResult:
    if not lane.stopping.best_epoch:
        raise ValueError(f"trial {lane.key} has no epoch with a finite validation loss")
    return LaneResult(
        key=lane.key,
        best_epoch=lane.stopping.best_epoch,
        validation_loss=lane.stopping.best_loss,
        validation_score=lane.best_score,
        test_loss=test_loss,
        test_score=test_score,
    )
