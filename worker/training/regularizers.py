"""Regularizers with one strength per lane: decay, L1, limits, label smoothing and noise.

Decay and L1 act on weights alone, not on biases or normalization parameters, unless a study says
otherwise. They act in place on one parameter of K lanes, ``weights_K``, of any shape behind the
lane axis; strengths and rates have as many dimensions, ``(K, 1, …)``.

Max-norm: N. Srivastava et al., JMLR 15 (2014). Decoupled decay: I. Loshchilov and F. Hutter, arXiv
1711.05101. Proximal step: N. Parikh and S. Boyd, Proximal Algorithms (2014). Label smoothing: C.
Szegedy et al., arXiv 1512.00567. Input noise: C. Bishop, Neural Computation 7 (1995). Weight noise:
A. Graves, NIPS 2011. Clipping: R. Pascanu, T. Mikolov and Y. Bengio, arXiv 1211.5063.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from worker.training.noise import standard_normal

NORMALIZATIONS = (
    nn.modules.batchnorm._NormBase,  # every batch and instance norm
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)
_CLIPPING_EPSILON = 1e-6  # what torch adds to a gradient's norm before it divides by it


def penalized(model: nn.Module, which: Literal["weights", "all"]) -> Iterator[str]:
    """Yield the names of the parameters on which decay and L1 act."""
    for name, _ in model.named_parameters() if which == "all" else _weights(model):
        yield name


def units(model: nn.Module) -> dict[str, int]:
    """Return the weights that lead into units, by name.

    Beside each the number of groups if it is of a transposed convolution, whose axes are swapped,
    and 0 otherwise.
    """
    groups = {
        id(module.weight): module.groups
        for module in model.modules()
        if isinstance(module, nn.modules.conv._ConvTransposeNd)
    }
    return {name: groups.get(id(weight), 0) for name, weight in _weights(model)}


def _weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of two or more dimensions that belong to no normalization layer."""
    spared = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, NORMALIZATIONS)
        for parameter in module.parameters(recurse=False)
    }
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and id(parameter) not in spared:
            yield name, parameter


def smoothed_cross_entropy(logits_BC: Tensor, y_B: Tensor, smoothing: Tensor) -> Tensor:
    """Return each row's cross-entropy with its label mixed with the uniform distribution: ``(B,)``.

    As ``cross_entropy(…, label_smoothing=ε, reduction="none")``, with ε as a tensor. A class that a
    model excludes, by a logit of minus infinity, does no harm where ε is 0.
    """
    log_BC = nn.functional.log_softmax(logits_BC, dim=1)
    hit_B = log_BC.gather(1, y_B[:, None])[:, 0]
    all_B = torch.where(smoothing > 0, log_BC.mean(1), 0.0)
    return -((1 - smoothing) * hit_B + smoothing * all_B)


def perturbed(parts: Sequence[Tensor], deviation: Tensor, key_2: Tensor) -> list[Tensor]:
    """Return tensors with Gaussian noise of this standard deviation; one draw is for them all."""
    counts = [part.numel() for part in parts]
    noise = deviation * standard_normal(key_2, (sum(counts),), parts[0].dtype)
    return [
        part + own.view(part.shape)
        for part, own in zip(parts, torch.split(noise, counts), strict=True)
    ]


def add_coupled_decay_(gradient_K: Tensor, weights_K: Tensor, decay_K: Tensor) -> None:
    """Add the gradient of (λ₂/2)‖w‖², which is λ₂·w."""
    gradient_K.addcmul_(weights_K, decay_K)


def decay_(weights_K: Tensor, decay_K: Tensor, rate_K: Tensor) -> None:
    """Shrink weights by the factor 1 − η·λ₂, apart from the gradient; η is the scheduled rate."""
    weights_K.mul_(1 - rate_K * decay_K)


def add_l1_subgradient_(gradient_K: Tensor, weights_K: Tensor, l1_K: Tensor) -> None:
    """Add a subgradient of λ₁‖w‖₁, which is λ₁·sign(w)."""
    gradient_K.addcmul_(weights_K.sign(), l1_K)


def soft_threshold_(weights_K: Tensor, threshold_K: Tensor) -> None:
    """Move weights towards zero by η·λ₁; what would pass it becomes exactly zero.

    That is w − clip(w, −ηλ₁, ηλ₁); ``clamp`` with tensors as bounds takes three times as long.
    """
    clipped_K = torch.maximum(weights_K, -threshold_K)
    weights_K.sub_(torch.minimum(clipped_K, threshold_K, out=clipped_K))


def clip_(gradients: Sequence[Tensor], limit_K: Tensor) -> None:
    """Scale each lane's gradient to this norm if it is longer, over all parameters together.

    As ``torch.nn.utils.clip_grad_norm_``. A limit of infinity changes nothing.
    """
    norms = [
        torch.linalg.vector_norm(gradient_KN, dim=1) for gradient_KN in map(_by_lane, gradients)
    ]
    norm_K = torch.linalg.vector_norm(torch.stack(norms), dim=0)
    scale_K = (limit_K / (norm_K + _CLIPPING_EPSILON)).clamp(max=1)
    for gradient_K in gradients:
        gradient_K.mul_(scale_K.view(-1, *(1 for _ in gradient_K.shape[1:])))


def limit_norm_(weights_K: Tensor, limit_K: Tensor, groups: int = 0) -> None:
    """Scale the weights of each unit to this norm if theirs is larger.

    The units of a weight lie along its first axis behind the lanes; those of a transposed
    convolution, told by its number of ``groups``, along its second. A limit of infinity changes
    nothing.
    """
    incoming = 2
    if groups:
        weights_K = weights_K.view(len(weights_K), groups, -1, *weights_K.shape[2:]).transpose(2, 3)
        incoming = 3
    dims = tuple(range(incoming, weights_K.ndim))
    norm_K = torch.linalg.vector_norm(weights_K, dim=dims, keepdim=True)
    limit_K = limit_K.view(-1, *(1 for _ in weights_K.shape[1:]))
    weights_K.mul_((limit_K / norm_K).clamp(max=1))


def penalty(weights: Sequence[Tensor], l1_K: Tensor, coupled_decay_K: Tensor | None) -> Tensor:
    """Return what is added to each lane's training objective: ``(K,)``, for K lanes' weights.

    That is λ₁‖w‖₁ + (λ₂/2)‖w‖². A decoupled decay is no penalty and counts nothing.
    """
    total_K = torch.zeros_like(l1_K)
    for weights_KN in map(_by_lane, weights):
        total_K += l1_K * weights_KN.abs().sum(1)
        if coupled_decay_K is not None:
            total_K += coupled_decay_K / 2 * weights_KN.square().sum(1)
    return total_K


def sparsity(weights: Sequence[Tensor]) -> Tensor:
    """Return the share of each lane's weights that are exactly zero: ``(K,)``, of any at all."""
    zeros_K = torch.stack([(weights_KN == 0).sum(1) for weights_KN in map(_by_lane, weights)])
    return zeros_K.sum(0) / sum(weights_K[0].numel() for weights_K in weights)


def _by_lane(weights_K: Tensor) -> Tensor:
    return weights_K.reshape(len(weights_K), -1)
