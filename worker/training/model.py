"""K copies of one model, computed together."""

import copy
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import structlog
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.utils import _pytree as pytree

from regtune.errors import RegtuneError
from worker.tasks.rows import Rows
from worker.training.augmentation import augmented, before, mixed, own_shares
from worker.training.dropout import dropout_threshold, dropped, install_dropout_sites
from worker.training.layout import stacked
from worker.training.memory import is_out_of_memory
from worker.training.noise import random_bits
from worker.training.objective import Objective
from worker.training.regularizers import penalized, perturbed, units
from worker.training.tracing import TURNS

log = structlog.get_logger()

Tensors = Mapping[str, Tensor]
LaneMap = Callable[..., Callable[..., Any]]

PERTURBATIONS = 2
"""Noise keys behind those of the dropout sites: of the inputs, and of the weights."""

INPUT_KEYS = 3
"""Noise keys behind these: of dropout on the inputs, of augmentation, and of mixup."""


class UnsupportedModel(RegtuneError):
    """The model cannot be trained here: it draws random numbers of its own, or learns nothing."""


@dataclass(frozen=True)
class Batch:
    """What one step sees: the same for all lanes, or with a leading lane axis if ``per_lane``.

    ``x`` is ``(B, *features)``, ``y`` is ``(B,)`` and ``keys`` is ``(N, 2)``, int32: one for each
    dropout site, then one for the noise on inputs, that on weights, dropout on inputs, augmentation
    and mixup.
    """

    x: Tensor
    y: Tensor
    keys: Tensor
    per_lane: bool


class LaneModel:
    """One model as a function of its parameters, mapped over lanes.

    Each parameter of K lanes is one tensor with a leading lane axis. Where ``vmap`` refuses the
    model, or ``torch.func`` its gradient, the same function runs in a loop.
    """

    def __init__(
        self,
        model: nn.Module,
        sample: Rows,
        objective: Objective,
        *,
        penalize: Literal["weights", "all"] = "weights",
        knobs: Collection[str] = (),
        augment: Collection[str] = (),
        autocast: torch.dtype | None = None,
    ) -> None:
        """Take over ``model``, to be trained for ``objective``; ``sample`` are rows to try it on.

        ``knobs`` names those of ``label_smoothing``, ``input_noise``, ``weight_noise``,
        ``input_dropout``, ``augment_strength`` and ``mixup`` that any lane may use; the others cost
        nothing. ``augment`` are the ways in which images are changed. Raises UnsupportedModel, and
        whatever the model itself raises.
        """
        self._sites = install_dropout_sites(model)
        if autocast is not None:
            _normalize_in_float32(model)
        _use_plain_attention()
        learned = {name for name, part in model.named_parameters() if part.requires_grad}
        if not learned:
            raise UnsupportedModel("the model has no parameter that needs a gradient")
        self._model = model.requires_grad_(False)
        self.objective = objective
        self._knobs = frozenset(knobs)
        self._augment = frozenset(augment) if "augment_strength" in knobs else frozenset()
        self._autocast = autocast
        self.penalized = tuple(name for name in penalized(model, penalize) if name in learned)
        self.units = units(model)
        self.statistic_names = _names_of_statistics(model)
        self.spared = tuple(
            name
            for name, _ in model.named_parameters()
            if name in learned and name not in self.penalized
        )
        self.refusal: str | None = None
        self._gradient: Callable[..., Callable[..., Any]] = grad_and_value
        self._over_lanes = self._choose_map(sample)

    def replica(self) -> "LaneModel":
        """Return another one for another thread: a call keeps state in the module."""
        twin = copy.copy(self)
        twin._model = copy.deepcopy(self._model)
        twin._sites = {name: twin._model.get_submodule(name) for name in self._sites}  # type: ignore[misc]
        return twin

    def one_by_one(self) -> "LaneModel":
        """Return the same model, module included, that computes one lane after the other."""
        twin = copy.copy(self)
        twin._over_lanes = loop
        return twin

    @property
    def device(self) -> torch.device:
        """Where the module lies."""
        return next(self._model.parameters()).device

    def to(self, device: torch.device) -> Self:
        """Move to ``device``."""
        self._model.to(device)
        self.objective = self.objective.to(device)
        return self

    def try_again(self, sample: Rows) -> None:
        """Try ``vmap`` on rows where the model lies now: each device has operations of its own.

        As for recurrent layers, which are one operation of cuDNN's.
        """
        if self.vectorized:
            self._over_lanes = self._vmap_or_loop(self.replica(), sample)

    @property
    def sites(self) -> tuple[str, ...]:
        """The names of the model's dropout sites."""
        return tuple(self._sites)

    @property
    def keys(self) -> int:
        """How many noise keys a step takes."""
        return len(self._sites) + PERTURBATIONS + INPUT_KEYS

    @property
    def vectorized(self) -> bool:
        """Whether lanes are computed as one batched model, not one by one."""
        return self._over_lanes is not loop

    def parameters_of(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the parameters of a model that was built alike, the penalized ones first."""
        named = dict(model.named_parameters())
        return {name: named[name].detach() for name in self.penalized + self.spared}

    def buffers_of(self, model: nn.Module) -> dict[str, Tensor]:
        """Return copies of the buffers of a model that was built alike, without the sites' own.

        A parameter that is frozen, one that needs no gradient, counts as a buffer.
        """
        held = {
            name: buffer
            for name, buffer in model.named_buffers()
            if name.rpartition(".")[0] not in self._sites
        }
        learned = {*self.penalized, *self.spared}
        held |= {name: p for name, p in model.named_parameters() if name not in learned}
        return {name: part.detach().clone() for name, part in held.items()}

    def gradients(
        self, parameters: Tensors, buffers: Tensors, strengths: Tensors, batch: Batch
    ) -> tuple[Tensors, Tensor]:
        """Return each lane's gradients, shaped as the parameters, and mean training loss ``(K,)``.

        Running statistics in ``buffers`` are updated in place. ``strengths`` are ``(K,)`` each.
        """
        shared = 0 if batch.per_lane else None
        mapped = self._map(
            self._gradient(self._loss), (0, 0, 0, shared, shared, shared), lanes_of(parameters)
        )
        with TURNS.calling():
            self._model.train()
            gradients, loss_K = mapped(parameters, buffers, strengths, batch.keys, batch.x, batch.y)
        return gradients, loss_K

    @torch.no_grad()
    def measure(
        self,
        parameters: Tensors,
        buffers: Tensors,
        x: Tensor,
        y: Tensor,
        weight: Tensor,
        per_lane: bool,
    ) -> Tensor:
        """Return what the objective measures of each lane's rows: ``(T, K)``, or ``(T + B, K)``.

        Dropout and noise are off, running statistics are used and stay as they are. ``weight`` is
        1 for a row that counts and 0 for one that does not; ``per_lane`` as in a batch.
        """
        shared = 0 if per_lane else None
        mapped = self._map(self._measure, (0, 0, shared, shared, shared), lanes_of(parameters))
        with TURNS.calling():
            self._model.eval()
            total_KT: Tensor = mapped(parameters, buffers, x, y, weight)
        return total_KT.T

    @torch.no_grad()
    def statistics(
        self, parameters: Tensors, buffers: Tensors, x: Tensor, per_lane: bool
    ) -> dict[str, Tensor]:
        """Return what each lane's batch norms find in a batch, under their buffers' names.

        Dropout and noise are off; ``buffers`` stay as they are.
        """
        found = {name: buffer.clone() for name, buffer in buffers.items()}
        mapped = self._map(
            self._find_statistics, (0, 0, 0 if per_lane else None), lanes_of(parameters)
        )
        with TURNS.calling(), _norms_keep_the_latest_batch(self._model):
            mapped(parameters, found, x)
        return {name: found[name] for name in self.statistic_names}

    def _map(
        self, function: Callable[..., Any], in_dims: tuple[int | None, ...], lanes: int
    ) -> Callable[..., Any]:
        """Map ``function`` over lanes; a lane that is alone needs no ``vmap``."""
        return (loop if lanes == 1 else self._over_lanes)(function, in_dims)

    def _loss(
        self,
        parameters: Tensors,
        buffers: Tensors,
        strengths: Tensors,
        keys_N2: Tensor,
        x: Tensor,
        y_B: Tensor,
    ) -> Tensor:
        *site_keys, input_key, weight_key, dropout_key, image_key, mixup_key = keys_N2.unbind()
        if "weight_noise" in self._knobs and self.penalized:
            parameters = self._with_noise(parameters, strengths["weight_noise"], weight_key)
        if self._augment:
            x = augmented(x, self._augment, strengths["augment_strength"], image_key)
        share_B = None
        if "mixup" in self._knobs:
            share_B = own_shares(strengths["mixup"], mixup_key, len(x))
            x = mixed(x, share_B)
        if "input_noise" in self._knobs:
            (x,) = perturbed([x], strengths["input_noise"], input_key)
        if "input_dropout" in self._knobs:
            keep = random_bits(dropout_key, x.shape) >= strengths["input_dropout_threshold"]
            x = dropped(x, keep, strengths["input_dropout_scale"])
        noise: dict[str, Tensor] = {}
        for (name, site), key_2 in zip(self._sites.items(), site_keys, strict=True):
            site.drawn = 0
            noise |= {
                f"{name}.threshold": strengths["dropout_threshold"],
                f"{name}.scale": strengths["dropout_scale"],
                f"{name}.key": key_2,
            }
        output = self._output(parameters, buffers, x, noise)
        smoothing = strengths["label_smoothing"] if "label_smoothing" in self._knobs else None
        if share_B is None:
            return self.objective.loss.of_batch(output, y_B, smoothing)
        own_B, other_B = (
            self.objective.loss.of_training_rows(output, target_B, smoothing)
            for target_B in (y_B, before(y_B))
        )
        return (share_B * own_B + (1 - share_B) * other_B).mean()

    def _measure(
        self, parameters: Tensors, buffers: Tensors, x: Tensor, y_B: Tensor, weight_B: Tensor
    ) -> Tensor:
        output = self._output(parameters, buffers, x, {})
        return self.objective.measure(output, y_B, weight_B)

    def _find_statistics(self, parameters: Tensors, buffers: Tensors, x: Tensor) -> Tensor:
        return self._output(parameters, buffers, x, {})

    def _output(self, parameters: Tensors, buffers: Tensors, x: Tensor, noise: Tensors) -> Tensor:
        """Return the model's output, in the precision of ``x``.

        In training, what the model puts in the place of a buffer is written to ``buffers``, as what
        it writes into one.
        """
        state = {**parameters, **buffers, **noise}
        with self._precision(x.device):
            output: Tensor = functional_call(self._model, state, (x,))
        if self._model.training:
            for name, buffer in buffers.items():
                if state[name] is not buffer:
                    buffer.copy_(state[name].detach())
        return output.to(x.dtype)

    def _precision(self, device: torch.device) -> AbstractContextManager[object]:
        if self._autocast is None:
            return nullcontext()
        return torch.autocast(device.type, self._autocast, cache_enabled=False)

    def _with_noise(self, parameters: Tensors, deviation: Tensor, key_2: Tensor) -> Tensors:
        """Return the parameters, the penalized ones with noise."""
        weights = [parameters[name] for name in self.penalized]
        return {
            **parameters,
            **dict(zip(self.penalized, perturbed(weights, deviation, key_2), strict=True)),
        }

    def _choose_map(self, sample: Rows) -> LaneMap:
        """Try a step in a loop, which any model must pass, then under vmap.

        On copies: what a forward pass leaves lying in a module, such as a mask for later, cannot be
        copied afterwards if it was made under ``vmap``.
        """
        before = _states_of_generators()
        trial = self.replica()
        try:
            found = trial._try(loop, sample)
        except RuntimeError as refusal:
            if is_out_of_memory(refusal):
                raise
            trial, found = self._without_transforms(sample, refusal)
        if before != _states_of_generators():
            raise UnsupportedModel(
                "the model draws random numbers other than in nn.Dropout and its kin, and in "
                "nn.MultiheadAttention (functional dropout, for example); use dropout modules "
                "instead"
            )
        if not _alike(found, trial._try(loop, sample)):
            raise UnsupportedModel(
                "the model makes something else of the same rows the second time: it draws random "
                "numbers other than in dropout modules, or remembers what is no buffer of its own; "
                "register what it remembers with register_buffer"
            )
        return self._vmap_or_loop(trial, sample) if self._gradient is grad_and_value else loop

    def _without_transforms(
        self, sample: Rows, refusal: Exception
    ) -> tuple["LaneModel", Sequence[Tensor]]:
        """Try whether autograd itself differentiates what ``torch.func`` has refused.

        Such as functions of autograd that keep what they need in ``forward``, and gradients within
        the model. Raises the refusal if it does not, either.
        """
        self._gradient = differentiated
        trial = self.replica()
        try:
            found = trial._try(loop, sample)
        except Exception:  # noqa: BLE001 - the first error says more
            raise refusal from None
        self._note(refusal)
        return trial, found

    def _note(self, refusal: Exception) -> None:
        """Say once why lanes are computed one by one."""
        self.refusal = str(refusal).partition("\n")[0]
        log.warning("lanes_run_one_by_one", reason=self.refusal)

    def _vmap_or_loop(self, trial: "LaneModel", sample: Rows) -> LaneMap:
        try:
            trial._try(vmap, sample)
        except (RuntimeError, ValueError) as refusal:
            if is_out_of_memory(refusal):  # of a device that is full just now
                raise
            self._note(refusal)
            return loop
        return vmap

    def _try(self, over_lanes: LaneMap, sample: Rows) -> Sequence[Tensor]:
        """Take one gradient and two evaluations of two lanes; return all that came out.

        Rows to train on are each lane's own, since lanes are out of step with each other; those to
        validate on may be shared by all.
        """
        self._over_lanes = over_lanes
        x, y = torch.stack([sample.x, sample.x]), torch.stack([sample.y, sample.y])
        parameters, buffers = (
            {name: torch.stack([part, part]) for name, part in parts.items()}
            for parts in (self.parameters_of(self._model), self.buffers_of(self._model))
        )
        strengths = {
            name: value.to(x.device) for name, value in neutral_strengths(2, x.dtype).items()
        }
        keys = torch.zeros(2, self.keys, 2, dtype=torch.int32, device=x.device)
        gradients, loss_K = self.gradients(
            parameters, buffers, strengths, Batch(x.clone(), y, keys, per_lane=True)
        )
        weight = x.new_ones(x.shape[:2])
        shared = self.measure(parameters, buffers, x[0].clone(), y[0], weight[0], per_lane=False)
        measured = self.measure(parameters, buffers, x, y, weight, per_lane=True)
        return [*gradients.values(), *buffers.values(), loss_K, shared, measured]


def _states_of_generators() -> tuple[object, ...]:
    """Return the states of the generators that a model may draw from without being handed one."""
    of_numpy = np.random.get_state(legacy=False)
    words, place = of_numpy["state"]["key"].tobytes(), of_numpy["state"]["pos"]
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), words, place


def _alike(ones: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Say whether tensors are the same but for the order in which a device adds up."""
    return all(_is_close(one, other) for one, other in zip(ones, others, strict=True))


def _is_close(one: Tensor, other: Tensor) -> bool:
    if not one.is_floating_point() or not one.numel():
        return torch.equal(one, other)
    size = float(torch.where(one.isfinite(), one, 0.0).abs().max())
    return torch.allclose(one, other, rtol=1e-3, atol=1e-3 * size, equal_nan=True)


def lanes_of(parameters: Tensors) -> int:
    """Return of how many lanes these are the parameters."""
    return len(next(iter(parameters.values())))


def _names_of_statistics(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the running statistics of the batch and instance norms that train."""
    norms = _training_norms(model)
    return tuple(
        f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules()
        if module in norms
        for name, buffer in module.named_buffers(recurse=False)
        if name in ("running_mean", "running_var") and buffer is not None
    )


def _training_norms(model: nn.Module) -> Sequence[nn.modules.batchnorm._NormBase]:
    """Return the norms that keep statistics and train with the model, which may freeze some."""
    model.train()
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.training
    ]


@contextmanager
def _norms_keep_the_latest_batch(model: nn.Module) -> Iterator[None]:
    """Let batch norms alone train, with the latest batch's statistics as running ones."""
    norms = _training_norms(model)
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def _normalize_in_float32(model: nn.Module) -> None:
    """Let batch norms, which keep statistics, see float32 whatever the layer before them gives."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.register_forward_pre_hook(lambda _, inputs: tuple(x.float() for x in inputs))


def _use_plain_attention() -> None:
    """Compute attention by plain matrix products, in this process: the fused kernels know no lanes.

    Under ``vmap`` they would run lane by lane.
    """
    torch.backends.mha.set_fastpath_enabled(False)
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)


def neutral_strengths(lanes: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return what a model is called with when nothing is regularized: ``(K,)`` each."""
    off_K = torch.zeros(lanes, dtype=dtype)
    return {
        "dropout_threshold": dropout_threshold(off_K),
        "dropout_scale": torch.ones(lanes, dtype=dtype),
        "input_dropout_threshold": dropout_threshold(off_K),
        "input_dropout_scale": torch.ones(lanes, dtype=dtype),
        "label_smoothing": off_K,
        "input_noise": off_K,
        "weight_noise": off_K,
        "augment_strength": off_K,
        "mixup": off_K,
    }


def loop(function: Callable[..., Any], in_dims: tuple[int | None, ...]) -> Callable[..., Any]:
    """Map ``function`` over lanes one by one, with the signature and result of ``vmap``.

    Arguments whose ``in_dims`` entry is 0 are cut along their first axis, as views, so that what
    the function writes in place into a buffer stays written. What lanes share is copied for each,
    since a model may write into its input, and the next lane would get what the last one left.
    """

    def mapped(*arguments: Any) -> Any:
        lanes = pytree.tree_leaves(arguments[0])[0].shape[0]
        results = [
            function(
                *(
                    _lane(argument, k) if d == 0 else _copy_for_one_of(lanes, argument)
                    for argument, d in zip(arguments, in_dims, strict=True)
                )
            )
            for k in range(lanes)
        ]
        return pytree.tree_map(lambda *lanes: stacked(lanes), *results)

    return mapped


def differentiated(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensors, Tensor]]:
    """Return what ``torch.func.grad_and_value`` does, by autograd itself; knows no ``vmap``."""

    def mapped(parameters: Tensors, *arguments: Any) -> tuple[Tensors, Tensor]:
        leaves = {name: part.detach().requires_grad_() for name, part in parameters.items()}
        with torch.enable_grad():
            value = function(leaves, *arguments)
            gradients = torch.autograd.grad(value, [*leaves.values()], materialize_grads=True)
        return dict(zip(leaves, gradients, strict=True)), value.detach()

    return mapped


def _lane(argument: Any, k: int) -> Any:
    return pytree.tree_map(lambda tensor_K: tensor_K[k], argument)


def _copy_for_one_of(lanes: int, argument: Any) -> Any:
    return pytree.tree_map(torch.clone, argument) if lanes > 1 else argument
