"""Optimizers with one learning rate and one step count per lane.

Each computes what its twin in ``torch.optim`` computes. What depends on the step count alone (the
scheduled rate, Adam's bias corrections) is worked out for a whole epoch at once, on the host and in
float64, as ``(coefficients, S, K)``; what is left for a step is a few in-place operations on each
parameter of the K lanes, ``weights_K``, of any shape behind the lane axis. An update uses up the
gradient's memory.

Adam: D. Kingma and J. Ba, arXiv 1412.6980. AdamW: I. Loshchilov and F. Hutter, arXiv 1711.05101.
RMSprop: T. Tieleman and G. Hinton, Lecture 6.5 (2012), in torch's form (ε outside the root).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from regtune.spec import Training

Float64s = NDArray[np.float64]


class LaneOptimizer(Protocol):
    """How a gradient moves the weights of each lane."""

    @property
    def moments(self) -> int:
        """How many tensors of the weights' shape it keeps; they start at zero."""

    @property
    def decoupled_decay(self) -> bool:
        """Whether weight decay acts beside the gradient, as in AdamW, or within it."""

    def coefficients(self, rate_SK: Float64s, step_SK: Float64s) -> Float64s:
        """Return ``(coefficients, S, K)`` for steps counted from 1 at the scheduled rates."""

    def update_(
        self,
        weights_K: Tensor,
        gradient_K: Tensor,
        moments: Sequence[Tensor],
        coefficients: Sequence[Tensor],
    ) -> None:
        """Take one step in place; each coefficient is ``(K, 1, …)``, like the weights."""


@dataclass(frozen=True)
class Sgd:
    """Stochastic gradient descent with momentum, Nesterov's or plain, as ``torch.optim.SGD``.

    I. Sutskever et al., ICML 2013, in torch's form: the rate multiplies the velocity.
    """

    momentum: float = 0.9
    nesterov: bool = False
    decoupled_decay: bool = False
    moments = 1

    def coefficients(self, rate_SK: Float64s, step_SK: Float64s) -> Float64s:
        """Return the negative rate."""
        return -rate_SK[None]

    def update_(
        self,
        weights_K: Tensor,
        gradient_K: Tensor,
        moments: Sequence[Tensor],
        coefficients: Sequence[Tensor],
    ) -> None:
        """Compute v ← μ·v + g, then w ← w − η·v, or Nesterov's w ← w − η·(g + μ·v)."""
        (velocity_K,) = moments
        (negative_rate_K,) = coefficients
        velocity_K.mul_(self.momentum).add_(gradient_K)
        if self.nesterov:
            velocity_K = gradient_K.add_(velocity_K, alpha=self.momentum)
        weights_K.addcmul_(velocity_K, negative_rate_K)


@dataclass(frozen=True)
class Adam:
    """Adam, as ``torch.optim.Adam``; with ``decoupled_decay`` it is AdamW."""

    decoupled_decay: bool = False
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    moments = 2

    def coefficients(self, rate_SK: Float64s, step_SK: Float64s) -> Float64s:
        """Return what turns √v into the divisor of m, with the bias corrections multiplied in.

        η·(m/c₁) / (√(v/c₂) + ε) = m / (a·√v + b), with cᵢ = 1 − βᵢᵗ, a = c₁ / (η·√c₂) and
        b = ε·c₁ / η.
        """
        scale_SK = (1 - self.beta1**step_SK) / rate_SK
        return np.stack([scale_SK / np.sqrt(1 - self.beta2**step_SK), self.epsilon * scale_SK])

    def update_(
        self,
        weights_K: Tensor,
        gradient_K: Tensor,
        moments: Sequence[Tensor],
        coefficients: Sequence[Tensor],
    ) -> None:
        """Compute m ← β₁m + (1 − β₁)g, v ← β₂v + (1 − β₂)g², w ← w − η·m̂ / (√v̂ + ε)."""
        mean_K, square_K = moments
        slope_K, offset_K = coefficients
        mean_K.lerp_(gradient_K, 1 - self.beta1)
        square_K.mul_(self.beta2).addcmul_(gradient_K, gradient_K, value=1 - self.beta2)
        divisor_K = torch.sqrt(square_K, out=gradient_K).mul_(slope_K).add_(offset_K)
        weights_K.addcdiv_(mean_K, divisor_K, value=-1)


@dataclass(frozen=True)
class RmsProp:
    """RMSprop without momentum, as ``torch.optim.RMSprop``."""

    decoupled_decay: bool = False
    alpha: float = 0.99
    epsilon: float = 1e-8
    moments = 1

    def coefficients(self, rate_SK: Float64s, step_SK: Float64s) -> Float64s:
        """Return the negative rate."""
        return -rate_SK[None]

    def update_(
        self,
        weights_K: Tensor,
        gradient_K: Tensor,
        moments: Sequence[Tensor],
        coefficients: Sequence[Tensor],
    ) -> None:
        """Compute v ← α·v + (1 − α)g², w ← w − η·g / (√v + ε)."""
        (square_K,) = moments
        (negative_rate_K,) = coefficients
        square_K.mul_(self.alpha).addcmul_(gradient_K, gradient_K, value=1 - self.alpha)
        gradient_K.div_(square_K.sqrt().add_(self.epsilon))
        weights_K.addcmul_(gradient_K, negative_rate_K)


def find_optimizer(training: Training) -> LaneOptimizer:
    """Return the optimizer that a training names."""
    decoupled = training.decay == "decoupled"
    match training.optimizer:
        case "sgd":
            return Sgd(training.momentum, training.nesterov, decoupled)
        case "adam" | "adamw":
            return Adam(decoupled)
        case "rmsprop":
            return RmsProp(decoupled)


def scheduled_rates(
    training: Training, rate_K: Float64s, step_SK: Float64s, steps_per_epoch: int
) -> Float64s:
    """Return the learning rates ``(S, K)`` of lanes that start at ``rate_K``, ``(K,)``.

    Steps are counted from 1. The warm-up grows linearly, and its last step has the full rate. The
    cosine starts there, and would reach zero one step after the last (I. Loshchilov and F. Hutter,
    arXiv 1608.03983, without restarts).
    """
    warmup = training.warmup_epochs * steps_per_epoch
    steps = training.max_epochs * steps_per_epoch
    factor_SK = np.minimum(step_SK / warmup, 1.0) if warmup else np.ones_like(step_SK)
    if training.schedule == "cosine":
        after_SK = np.maximum(step_SK - 1 - warmup, 0.0)
        factor_SK *= (1 + np.cos(np.pi * after_SK / (steps - warmup))) / 2
    return factor_SK * rate_K
