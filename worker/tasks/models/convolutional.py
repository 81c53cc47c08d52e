"""A convolutional network for small images."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from regtune.spec import CnnSettings
from worker.tasks.models.layers import activation, check_images, dropout, image_norm, initialize


def cnn(settings: Mapping[str, Any], input_shape: tuple[int, ...], outputs: int) -> nn.Module:
    """Build stages of 3 × 3 convolutions, each with norm and activation, and a linear layer.

    A stage ends in max pooling, which halves height and width and rounds up, and in dropout of
    whole channels; the mean over what places are left goes through dropout to the linear layer.
    Settings: ``CnnSettings``. Raises InvalidData for rows that are no images.
    """
    asked = CnnSettings.model_validate(settings)
    channels, _, _ = check_images("cnn", input_shape)
    layers: list[nn.Module] = []
    for width in asked.channels:
        for _ in range(asked.depth):
            layers += [
                nn.Conv2d(channels, width, 3, padding=1, bias=asked.norm != "batch"),
                *image_norm(asked.norm, width, asked.groups),
                activation(asked.activation),
            ]
            channels = width
        drop = nn.FeatureAlphaDropout if asked.activation == "selu" else nn.Dropout2d
        layers += [nn.MaxPool2d(2, ceil_mode=True), drop()]
    head = [
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        dropout(asked.activation),
        nn.Linear(channels, outputs),
    ]
    return initialize(nn.Sequential(*layers, *head), asked.activation)
