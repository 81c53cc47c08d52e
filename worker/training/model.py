"""K copies of one model, computed together."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import structlog
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.utils import _pytree as pytree

from worker.tasks.preparation import Rows
from worker.training.recording import Recorder
from worker.training.regularizers import install_dropout_sites, penalized

log = structlog.get_logger()

EVALUATION_ROWS = 1000
"""Rows of one evaluation batch."""

Buffers = dict[str, Tensor]
LaneMap = Callable[..., Callable[..., Any]]
Progress = Callable[[], None]


class UnsupportedModel(ValueError):
    """The model draws random numbers of its own, so its trials could not be reproduced."""


@dataclass(frozen=True)
class DropoutRates:
    """Each lane's dropout rate in the forms that the sites want: ``(K,)`` each."""

    threshold_K: Tensor
    scale_K: Tensor


@dataclass(frozen=True)
class Batch:
    """What one step sees: the same for all lanes, or with a leading lane axis if ``per_lane``.

    ``x`` is ``(B, *features)``, ``y`` is ``(B,)`` and ``keys`` is ``(D, 2)``, int32.
    """

    x: Tensor
    y: Tensor
    keys: Tensor
    per_lane: bool

    @property
    def rows(self) -> int:
        """How many rows each lane sees."""
        return self.y.shape[-1]


class LaneModel:
    """One model as a function of a row of parameters, mapped over lanes.

    A lane's parameters are one row: weights (the first ``weights`` elements), then biases and
    normalization parameters. Where ``vmap`` refuses the model, the same function runs in a loop.
    """

    def __init__(self, model: nn.Module, sample: Rows) -> None:
        """Take over ``model``; ``sample`` holds a few rows to try it on.

        Raises UnsupportedModel, and whatever the model itself raises.
        """
        self._sites = install_dropout_sites(model)
        self._model = model.requires_grad_(False)
        named = dict(model.named_parameters())
        first = list(penalized(model))
        names = first + [name for name in named if name not in first]
        self._shapes = {name: named[name].shape for name in names}
        self._sizes = [shape.numel() for shape in self._shapes.values()]
        self.weights = sum(self._sizes[: len(first)])
        self.initial_parameters = torch.cat([named[name].flatten() for name in names])
        self.initial_buffers = {
            name: buffer.clone()
            for name, buffer in model.named_buffers()
            if name.rpartition(".")[0] not in self._sites
        }
        self._recorder = Recorder()
        self._over_lanes = self._choose_map(sample)

    def to(self, device: torch.device) -> Self:
        """Move to ``device``."""
        self._model.to(device)
        self.initial_parameters = self.initial_parameters.to(device)
        self.initial_buffers = {name: b.to(device) for name, b in self.initial_buffers.items()}
        return self

    @property
    def sites(self) -> int:
        """How many dropout sites the model has."""
        return len(self._sites)

    def gradients(
        self, parameters_KP: Tensor, buffers: Buffers, rates: DropoutRates, batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """Return each lane's gradient ``(K, P)`` and mean training loss ``(K,)``.

        Running statistics in ``buffers`` are updated in place.
        """
        shared = 0 if batch.per_lane else None
        self._model.train()
        gradient_KP, loss_K = self._call(
            grad_and_value(self._loss),
            (0, 0, 0, 0, shared, shared, shared),
            *(parameters_KP, buffers, rates.threshold_K, rates.scale_K),
            *(batch.keys, batch.x, batch.y),
        )
        return gradient_KP, loss_K

    @torch.no_grad()
    def evaluate(
        self, parameters_KP: Tensor, buffers: Buffers, rows: Rows, progress: Progress
    ) -> tuple[Tensor, Tensor]:
        """Return each lane's mean loss and accuracy over ``rows``: ``(K,)`` each.

        Dropout is off, running statistics are used and stay as they are.
        """
        self._model.eval()
        totals_2K = torch.zeros(2, parameters_KP.shape[0], device=parameters_KP.device).to(
            parameters_KP.dtype
        )
        for x, y in _evaluation_batches(rows):
            totals_2K += torch.stack(
                self._call(self._measure, (0, 0, None, None), parameters_KP, buffers, x, y)
            )
            progress()
        loss_K, correct_K = totals_2K / len(rows)
        return loss_K, correct_K

    def _call(
        self, function: Callable[..., Any], in_dims: tuple[int | None, ...], *arguments: Any
    ) -> Any:
        """Map ``function`` over lanes; a lane that is alone needs no ``vmap``."""
        lanes = arguments[0].shape[0]
        if self._over_lanes is loop:
            return loop(function, in_dims)(*arguments)
        mapped = (loop if lanes == 1 else self._over_lanes)(function, in_dims)
        return self._recorder.call(function.__name__, mapped, *arguments)

    def _loss(
        self,
        parameters_P: Tensor,
        buffers: Buffers,
        threshold: Tensor,
        scale: Tensor,
        keys_D2: Tensor,
        x: Tensor,
        y_B: Tensor,
    ) -> Tensor:
        noise: Buffers = {}
        for (name, site), key_2 in zip(self._sites.items(), keys_D2, strict=True):
            site.drawn = 0
            noise |= {
                f"{name}.threshold": threshold,
                f"{name}.scale": scale,
                f"{name}.key": key_2,
            }
        state = (self._named(parameters_P), buffers, noise)
        return nn.functional.cross_entropy(functional_call(self._model, state, (x,)), y_B)

    def _measure(
        self, parameters_P: Tensor, buffers: Buffers, x: Tensor, y_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        logits_BC = functional_call(self._model, (self._named(parameters_P), buffers), (x,))
        correct_B = logits_BC.argmax(1) == y_B
        loss = nn.functional.cross_entropy(logits_BC, y_B, reduction="sum")
        return loss, correct_B.sum().to(loss.dtype)

    def _named(self, parameters_P: Tensor) -> dict[str, Tensor]:
        """Return the model's parameters as views of one row.

        ``split`` makes autograd write the gradient as one row again, with one copy.
        """
        pieces = torch.split(parameters_P, self._sizes)
        return {
            name: piece.view(shape)
            for (name, shape), piece in zip(self._shapes.items(), pieces, strict=True)
        }

    def _choose_map(self, sample: Rows) -> LaneMap:
        """Try a step in a loop, which any model must pass, then under vmap."""
        before = torch.get_rng_state()
        self._try(loop, sample)
        if not torch.equal(before, torch.get_rng_state()):
            raise UnsupportedModel(
                "the model draws random numbers other than in nn.Dropout and its kin (functional "
                "dropout, or attention's own); use dropout modules instead"
            )
        try:
            self._try(vmap, sample)
        except (RuntimeError, ValueError, NotImplementedError) as refusal:
            log.warning("lanes_run_one_by_one", reason=str(refusal).partition("\n")[0])
            return loop
        return vmap

    def _try(self, over_lanes: LaneMap, sample: Rows) -> None:
        """Take one gradient and one evaluation of two lanes, out of step with each other."""
        self._over_lanes = over_lanes
        parameters_2P = self.initial_parameters.expand(2, -1).clone()
        buffers = {name: torch.stack([b, b]) for name, b in self.initial_buffers.items()}
        rates = DropoutRates(torch.zeros(2, dtype=torch.int32), torch.ones(2, dtype=sample.x.dtype))
        batch = Batch(
            x=torch.stack([sample.x, sample.x]),
            y=torch.stack([sample.y, sample.y]),
            keys=torch.zeros(2, self.sites, 2, dtype=torch.int32),
            per_lane=True,
        )
        self.gradients(parameters_2P, buffers, rates, batch)
        self.evaluate(parameters_2P, buffers, sample, lambda: None)


def _evaluation_batches(rows: Rows) -> Iterator[tuple[Tensor, Tensor]]:
    xs, ys = torch.split(rows.x, EVALUATION_ROWS), torch.split(rows.y, EVALUATION_ROWS)
    return zip(xs, ys, strict=True)


def loop(function: Callable[..., Any], in_dims: tuple[int | None, ...]) -> Callable[..., Any]:
    """Map ``function`` over lanes one by one, with the signature and result of ``vmap``.

    Arguments whose ``in_dims`` entry is 0 are cut along their first axis, as views, so that what
    the function writes in place into a buffer stays written.
    """

    def mapped(*arguments: Any) -> Any:
        leaves = pytree.tree_leaves(arguments[0])
        results = [
            function(
                *(_lane(a, k) if d == 0 else a for a, d in zip(arguments, in_dims, strict=True))
            )
            for k in range(leaves[0].shape[0])
        ]
        return pytree.tree_map(lambda *lanes: torch.stack(lanes), *results)

    return mapped


def _lane(argument: Any, k: int) -> Any:
    return pytree.tree_map(lambda tensor_K: tensor_K[k], argument)
