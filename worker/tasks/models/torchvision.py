"""The classifiers of torchvision, fitted to any images."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

from torch import nn
from torchvision import models

from regtune.spec import TorchvisionSettings
from worker.tasks.models.layers import check_images

M = TypeVar("M", bound=nn.Module)

_WITHOUT_A_SECOND_CLASSIFIER = {"aux_logits": False, "init_weights": True}
_OWN_ARGUMENTS: Mapping[str, Mapping[str, Any]] = {
    "googlenet": _WITHOUT_A_SECOND_CLASSIFIER,
    "inception_v3": _WITHOUT_A_SECOND_CLASSIFIER,
}


def torchvision(
    settings: Mapping[str, Any], input_shape: tuple[int, ...], outputs: int
) -> nn.Module:
    """Build the model of that name with weights drawn anew. Settings: ``TorchvisionSettings``.

    Its classifier returns ``outputs``, and its first convolution takes the images' channels. Where
    it has no dropout, the classifier gets one in front. Raises InvalidData for rows that are no
    images.
    """
    name = TorchvisionSettings.model_validate(settings).architecture
    channels, height, _ = check_images(name, input_shape)
    own = {"image_size": height} if name.startswith("vit_") else _OWN_ARGUMENTS.get(name, {})
    model: nn.Module = models.get_model(name, weights=None, num_classes=outputs, **own)
    _fit_channels(model, channels)
    _give_dropout(model)
    return model


def _named(
    name: str, settings: Mapping[str, Any], input_shape: tuple[int, ...], outputs: int
) -> nn.Module:
    return torchvision({"architecture": name}, input_shape, outputs)


resnet18 = partial(_named, "resnet18")
resnet34 = partial(_named, "resnet34")
resnet50 = partial(_named, "resnet50")
mobilenet_v3_small = partial(_named, "mobilenet_v3_small")


def _fit_channels(model: nn.Module, channels: int) -> None:
    """Let the first convolution take so many channels, with new weights if those are others."""
    _, first = next(_found(model, nn.Conv2d))
    if first.in_channels != channels:
        first.in_channels = channels
        first.weight = nn.Parameter(
            first.weight.new_empty(first.out_channels, channels, *first.kernel_size)
        )
        first.reset_parameters()


def _give_dropout(model: nn.Module) -> None:
    """Put dropout before the classifier, the last linear layer, if the model has none at all."""
    if next(_found(model, nn.Dropout), None):
        return
    *_, (place, classifier) = _found(model, nn.Linear)
    model.set_submodule(place, nn.Sequential(nn.Dropout(), classifier))


def _found(model: nn.Module, kind: type[M]) -> Iterator[tuple[str, M]]:
    """Yield the layers of a kind, with where they stand."""
    return ((place, layer) for place, layer in model.named_modules() if isinstance(layer, kind))
