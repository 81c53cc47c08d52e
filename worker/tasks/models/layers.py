"""The layers of which the built-in models are made, by the names that studies give them."""

from collections.abc import Mapping

from torch import nn

from regtune.errors import InvalidData
from regtune.spec.models import Activation, Norm

_ACTIVATIONS: Mapping[Activation, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "selu": nn.SELU,
}


def activation(name: Activation) -> nn.Module:
    """Return an activation."""
    return _ACTIVATIONS[name]()


def dropout(name: Activation) -> nn.Module:
    """Return the dropout that goes with an activation: alpha dropout with SELU."""
    return nn.AlphaDropout() if name == "selu" else nn.Dropout()


def norm(name: Norm, width: int, groups: int) -> list[nn.Module]:
    """Return a normalization of features ``(B, width)``, or none."""
    match name:
        case "batch":
            return [nn.BatchNorm1d(width)]
        case "layer":
            return [nn.LayerNorm(width)]
        case "group":
            return [nn.GroupNorm(groups, width)]
        case "none":
            return []


def image_norm(name: Norm, channels: int, groups: int) -> list[nn.Module]:
    """Return a normalization of images ``(B, channels, height, width)``, or none.

    ``layer`` is over channels and places, each channel with a scale of its own.
    """
    match name:
        case "batch":
            return [nn.BatchNorm2d(channels)]
        case "layer":
            return [nn.GroupNorm(1, channels)]
        case "group":
            return [nn.GroupNorm(groups, channels)]
        case "none":
            return []


def initialize(model: nn.Module, name: Activation) -> nn.Module:
    """Draw the weights that an activation wants: torch's own, or LeCun's for SELU.

    Self-normalizing networks: G. Klambauer et al., arXiv 1706.02515.
    """
    if name == "selu":
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
    return model


def check_images(model: str, input_shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return channels, height and width; raise InvalidData if the rows are no images."""
    if len(input_shape) != 3:
        raise InvalidData(
            f"the model {model} wants images (channels, height, width), but a row of this data set "
            f"has the shape {input_shape}"
        )
    channels, height, width = input_shape
    return channels, height, width
