"""Dropout at each lane's own rate: every place in a model that drops becomes a site.

Attention drops its weights by functions of torch's, which are handed a rate. To be imported makes
two of them, ``dropout`` and ``scaled_dot_product_attention`` of ``torch.nn.functional``, know a
site's rate, in the whole process: before code of a task's own is imported, which may hold on to
them, and not while threads train.

Dropout: N. Srivastava et al., JMLR 15 (2014). Alpha dropout: G. Klambauer et al., arXiv 1706.02515.
"""

import copy
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.bias import CausalBias

from worker.training.noise import HIGHEST, LOWEST, random_bits

_ELEMENTWISE = (nn.Dropout, nn.AlphaDropout)
_CHANNELWISE = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.FeatureAlphaDropout)
_ALPHA = (nn.AlphaDropout, nn.FeatureAlphaDropout)
_ALPHA_OFF = -1.7580993408473766  # the value to which SELU saturates
_OF_ATTENTION = "weights_dropout"
is_scripting = torch.jit.is_scripting  # type: ignore[attr-defined] # torch documents it
_torch_dropout = functional.dropout
_torch_attention = functional.scaled_dot_product_attention


class DropoutSite(nn.Module):
    """A place in the model that drops activations at the lane's own rate, by counter-based noise.

    Training: kept activations are scaled by 1 / (1 − p); with p = 0 all are kept and the scale is
    exactly 1. Evaluation: the identity. Buffers, replaced at each call: ``threshold`` (int32; noise
    below it drops), ``scale`` (1 / (1 − p)) and ``key`` (2 × int32).
    """

    threshold: Tensor
    scale: Tensor
    key: Tensor

    def __init__(self, *, channelwise: bool = False, alpha: bool = False) -> None:
        super().__init__()
        self.channelwise = channelwise
        self.alpha = alpha
        self.drawn = 0
        self.register_buffer("threshold", dropout_threshold(torch.zeros(())), persistent=False)
        self.register_buffer("scale", torch.ones(()), persistent=False)
        self.register_buffer("key", torch.zeros(2, dtype=torch.int32), persistent=False)

    @classmethod
    def standing_for(cls, module: nn.Module) -> "DropoutSite":
        """Return the site that takes the place of one of torch's dropout modules."""
        return cls(channelwise=isinstance(module, _CHANNELWISE), alpha=isinstance(module, _ALPHA))

    @property
    def p(self) -> "SiteRate":
        """For models that read their module's rate and hand it to a function of torch's."""
        return SiteRate(self)

    def forward(self, x: Tensor) -> Tensor:
        """Drop elements of ``x``, or whole channels of ``(batch, channels, …)``."""
        if not self.training:
            return x
        shape = (*x.shape[:2], *(1 for _ in x.shape[2:])) if self.channelwise else x.shape
        keep = self._noise(shape) >= self.threshold
        return self._alpha_dropped(x, keep) if self.alpha else dropped(x, keep, self.scale)

    def _noise(self, shape: Sequence[int]) -> Tensor:
        """Return this call's noise: a site that is called again in a forward draws on."""
        start, self.drawn = self.drawn, self.drawn + prod(shape)
        return random_bits(self.key, shape, start)

    def _alpha_dropped(self, x: Tensor, keep: Tensor) -> Tensor:
        """Set dropped elements to SELU's saturation, then restore mean and variance."""
        rate = 1 - 1 / self.scale
        a = (self.scale / (1 + rate * _ALPHA_OFF**2)).sqrt()
        return a * torch.where(keep, x, _ALPHA_OFF) - a * rate * _ALPHA_OFF


class SiteRate(float):
    """What a site tells as its rate: a number by which functions of torch's find the site.

    Its value is neither 0, so that a model does not leave dropping out, nor any lane's rate. What
    else is done with it than to drop by it draws random numbers, and so is refused.
    """

    site: DropoutSite

    def __new__(cls, site: DropoutSite) -> "SiteRate":
        """Return the rate of a site."""
        rate = super().__new__(cls, 0.5)
        rate.site = site
        return rate

    def __deepcopy__(self, memo: dict[int, Any]) -> "SiteRate":
        """Return the rate of the site's copy: a model that is copied keeps both."""
        return SiteRate(copy.deepcopy(self.site, memo))


def install_dropout_sites(model: nn.Module) -> dict[str, DropoutSite]:
    """Replace every dropout module of ``model`` by a site; return them by name.

    A module that stands in several places of the model stays one, under its first name. One that
    drops in a way of its own stays what it is, and is refused for the numbers that it draws. A
    ``MultiheadAttention`` that drops weights gets a site for it.
    """
    found = [
        (name, module)
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, _ELEMENTWISE + _CHANNELWISE)
        and type(module).forward in {one.forward for one in _ELEMENTWISE + _CHANNELWISE}
    ]
    sites: dict[nn.Module, DropoutSite] = {}
    names: dict[str, DropoutSite] = {}
    for name, module in found:
        if module not in sites:
            sites[module] = names[name] = DropoutSite.standing_for(module)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, sites[module])
    return names | _sites_of_attention(model)


def _sites_of_attention(model: nn.Module) -> dict[str, DropoutSite]:
    names: dict[str, DropoutSite] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.MultiheadAttention) and module.dropout:
            site = names[f"{name}.{_OF_ATTENTION}".removeprefix(".")] = DropoutSite()
            module.add_module(_OF_ATTENTION, site)
            module.dropout = site.p
    return names


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Do as torch's function of this name, or as a site whose rate it is called with."""
    if not is_scripting():  # noqa: SIM102 - TorchScript would compile what stands behind an "and"
        if isinstance(p, SiteRate):
            left: Tensor = p.site(input) if training else input
            return input.copy_(left) if inplace else left
    return _torch_dropout(input, p, training, inplace)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Do as torch's function of this name; a site whose rate it is called with drops weights."""
    if not is_scripting():
        if isinstance(attn_mask, CausalBias):
            # It looks for torch's own function, to take a faster way than by a mask.
            attn_mask = attn_mask._materialize(query.device)
        if isinstance(dropout_p, SiteRate):
            return _attention_with(
                dropout_p.site, query, key, value, attn_mask, is_causal, scale, enable_gqa
            )
    return _torch_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _attention_with(
    site: DropoutSite,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """Return attention whose weights a site drops.

    Queries are ``(…, L, E)``, keys ``(…, S, E)``, values ``(…, S, V)``. With ``enable_gqa`` there
    may be fewer heads of keys and values, along the third axis from behind, each for several of
    the queries. A query that may look at nothing gets zeros.
    """
    if enable_gqa:
        times = query.shape[-3] // key.shape[-3]
        key, value = (each.repeat_interleave(times, -3) for each in (key, value))
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        hidden = ~attn_mask if attn_mask.dtype == torch.bool else attn_mask == -torch.inf
        if attn_mask.dtype != torch.bool:
            scores = scores + attn_mask
        scores = scores.masked_fill(hidden, -torch.inf)
        # Of nothing but −∞ a softmax is no number.
        blind = hidden.all(-1, keepdim=True)
        weights = scores.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0)
    else:
        weights = scores.softmax(-1)
    left: Tensor = site(weights)
    return left.to(value.dtype) @ value


def dropped(x: Tensor, keep: Tensor, scale: Tensor) -> Tensor:
    """Return ``x`` with what is kept (bool) scaled by 1 / (1 − p), and the rest at zero."""
    return x * (keep * scale)


def dropout_threshold(rate: Tensor) -> Tensor:
    """Return the int32 noise below which an element is dropped; rates are in [0, 1)."""
    threshold = torch.round(rate.double() * 2**32) + LOWEST
    return threshold.clamp(max=HIGHEST).to(torch.int32)


vars(functional).update(dropout=_dropout, scaled_dot_product_attention=_attention)
