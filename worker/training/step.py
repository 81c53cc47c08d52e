"""One optimizer step of some lanes, and one measurement of them, as functions of tensors alone.

Whatever differs from lane to lane or from step to step is an argument, so that both can be recorded
and compiled once for a number of lanes and used for any of them.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from worker.training import regularizers
from worker.training.layout import rows_at
from worker.training.model import Batch, LaneModel
from worker.training.optimizers import LaneOptimizer

Tensors = Mapping[str, Tensor]
Live = tuple[Tensors, tuple[Tensors, ...], Tensors]
"""What a step changes: parameters, the optimizer's moments of each, the model's buffers."""


class Source(NamedTuple):
    """What rows are taken from in every step; a part that is not needed is empty.

    ``rows`` are all of them, ``x`` and ``y``, unless each step brings its own. ``standardizing``
    are center and factor of ``x`` that are bytes, see ``rows.Standardization``; ``of_lanes`` scale
    and shift of each lane, ``(K, …)``, where lanes standardize differently.
    """

    rows: tuple[Tensor, ...] = ()
    standardizing: tuple[Tensor, ...] = ()
    of_lanes: tuple[Tensor, ...] = ()

    @property
    def tensors(self) -> Sequence[Tensor]:
        """All of them."""
        return [*self.rows, *self.standardizing, *self.of_lanes]


class LaneStep:
    """How lanes move: gradient, clipped; decay, optimizer, proximal step, max-norm."""

    def __init__(
        self,
        model: LaneModel,
        optimizer: LaneOptimizer,
        *,
        knobs: Collection[str],
        l1: Literal["proximal", "subgradient"],
    ) -> None:
        """``knobs`` are the strengths that any lane of the study may use."""
        self._model = model
        self._optimizer = optimizer
        self._decay = "weight_decay" in knobs
        self._l1 = l1 if "l1_lambda" in knobs else None
        self._clips = "max_gradient_norm" in knobs
        self._bounded = model.units if "max_norm" in knobs else {}
        self._apart: LaneStep | None = None
        if model.vectorized and model.device.type == "cpu":
            self._apart = LaneStep(model.one_by_one(), optimizer, knobs=knobs, l1=l1)

    @property
    def statistics(self) -> tuple[str, ...]:
        """The names of the buffers that hold the statistics of batch norms."""
        return self._model.statistic_names

    def ways_to_take(self) -> Sequence[Callable[..., Tensor]]:
        """Return functions that take a step, all of the same result.

        Batched convolutions of lanes with weights of their own become grouped ones, which on a CPU
        take up to twice as long as one lane after the other; matrix products gain by the batch.
        """
        return [self.take, self._apart.take] if self._apart else [self.take]

    def ways_to_measure(self) -> Sequence[Callable[..., Tensor]]:
        """Return functions that measure, all of the same result."""
        return [self.measure, self._apart.measure] if self._apart else [self.measure]

    def ways_to_find_statistics(self) -> Sequence[Callable[..., Tensor]]:
        """Return functions that find the statistics of batch norms, all of the same result."""
        return [step.add_statistics_ for step in (self, self._apart) if step]

    def take(
        self,
        live: Live,
        strengths: Tensors,
        source: Source,
        rate_K: Tensor,
        coefficients_CK: Tensor,
        keys: Tensor,
        *batch: Tensor,
    ) -> Tensor:
        """Move K lanes by one batch, in place; return their losses before it: ``(K,)``.

        ``rate_K`` are the scheduled learning rates. ``keys`` are the noise keys, ``(N, 2)`` or
        ``(K, N, 2)``. ``batch`` as in ``gather``.
        """
        parameters, moments, buffers = live
        x, y, per_lane = gather(source, batch)
        gradients, loss_K = self._model.gradients(
            parameters, buffers, strengths, Batch(x, y, keys, per_lane)
        )
        gradients = _apart(gradients)
        if self._clips:
            regularizers.clip_(list(gradients.values()), strengths["max_gradient_norm"])
        per_lane_numbers = torch.stack([strengths["decay"], strengths["l1"], rate_K])
        for name, weights_K in parameters.items():
            decay_K, l1_K, own_rate_K = _shaped_like(weights_K, per_lane_numbers)
            gradient_K = gradients[name]
            penalized = name in self._model.penalized
            if penalized and self._decay and self._optimizer.decoupled_decay:
                regularizers.decay_(weights_K, decay_K, own_rate_K)
            elif penalized and self._decay:
                regularizers.add_coupled_decay_(gradient_K, weights_K, decay_K)
            if penalized and self._l1 == "subgradient":
                regularizers.add_l1_subgradient_(gradient_K, weights_K, l1_K)
            self._optimizer.update_(
                weights_K,
                gradient_K,
                [moment[name] for moment in moments],
                _shaped_like(weights_K, coefficients_CK),
            )
            if penalized and self._l1 == "proximal":
                regularizers.soft_threshold_(weights_K, own_rate_K * l1_K)
            # Behind the soft threshold: one after the other they are the proximal step of both.
            if name in self._bounded:
                regularizers.limit_norm_(weights_K, strengths["max_norm"], self._bounded[name])
        return loss_K

    def measure(
        self,
        parameters: Tensors,
        buffers: Tensors,
        source: Source,
        weight: Tensor,
        *batch: Tensor,
    ) -> Tensor:
        """Return what the objective measures of K lanes: ``(T, K)``, or ``(T + B, K)``.

        ``weight``, ``(B,)`` for all lanes or ``(K, B)``, is 0 where a row only fills up the batch.
        """
        x, y, per_lane = gather(source, batch)
        return self._model.measure(parameters, buffers, x, y, weight, per_lane)

    def add_statistics_(
        self, parameters: Tensors, buffers: Tensors, total: Tensors, source: Source, *batch: Tensor
    ) -> Tensor:
        """Add the statistics that K lanes' batch norms find in a batch; return its rows."""
        x, _, per_lane = gather(source, batch)
        for name, found_K in self._model.statistics(parameters, buffers, x, per_lane).items():
            total[name].add_(found_K)
        return x.new_full((), x.shape[int(per_lane)])


def gather(source: Source, batch: Sequence[Tensor]) -> tuple[Tensor, Tensor, bool]:
    """Return the rows of a batch, and whether they have a leading lane axis.

    A batch is the numbers of its rows, ``(B,)`` for all lanes or ``(K, B)``; in front of them stand
    the rows ``x`` and ``y`` that they number, unless those are part of the source.
    """
    *brought, index = batch
    stored, y = brought or source.rows
    per_lane = index.ndim == 2
    x = rows_at(stored, index)
    if source.standardizing:
        center, factor = source.standardizing
        x = x.to(center.dtype).sub_(center).mul_(factor)
    if source.of_lanes:
        # Lanes that share their rows are of one split.
        scale, shift = (part[:, None] if per_lane else part[0] for part in source.of_lanes)
        x = torch.addcmul(shift, x, scale)
    return x, y[index], per_lane


def _shaped_like(weights_K: Tensor, numbers_CK: Tensor) -> Sequence[Tensor]:
    """Return C numbers of each lane with as many dimensions as the weights: ``(K, 1, …)`` each."""
    return numbers_CK.view(*numbers_CK.shape, *(1 for _ in weights_K.shape[1:])).unbind()


def _apart(gradients: Tensors) -> Tensors:
    """Return gradients that may each be changed in place, copies where they share memory.

    Those of two parameters that are added are one tensor, and that of a sum is a number expanded.
    """
    seen: set[int] = set()
    apart = {}
    for name, gradient_K in gradients.items():
        storage = gradient_K.untyped_storage()._cdata
        repeats = any(
            size > 1 and stride == 0
            for size, stride in zip(gradient_K.shape, gradient_K.stride(), strict=True)
        )
        apart[name] = gradient_K.clone() if storage in seen or repeats else gradient_K
        seen.add(storage)
    return apart
