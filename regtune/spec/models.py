"""The settings of the built-in models, checked where no model is installed."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, Strict, ValidationInfo
from pydantic import field_validator as validate_field
from pydantic import model_validator as validate_model
from pydantic_core import PydanticCustomError

from regtune.spec.parts import PartlyUsed, SpecModel

Activation = Literal["relu", "gelu", "silu", "tanh", "selu"]
Norm = Literal["batch", "layer", "group", "none"]

Width = Annotated[int, Field(ge=1, le=65_536)]
Widths = Annotated[tuple[Width, ...], Strict(False), Field(max_length=64)]


def _activation() -> Any:
    return Field(
        "relu",
        description="What follows each normalization. With selu weights start as LeCun's and "
        "dropout is alpha dropout, so that activations keep their mean and variance.",
        examples=["relu"],
    )


class _Normalized(PartlyUsed):
    """Settings with a normalization; ``groups`` is used by norm: group alone."""

    norm: Norm = Field(
        "batch", description="Normalization before each activation.", examples=["batch"]
    )
    groups: int = Field(
        8,
        ge=1,
        le=65_536,
        description="Groups of norm: group; each normalized width must be a multiple of it.",
        examples=[8],
    )

    @validate_field("groups")
    @classmethod
    def _check_norm_has_groups(cls, value: int, info: ValidationInfo) -> int:
        norm = info.data.get("norm", "group")
        if norm != "group":
            raise PydanticCustomError(
                "groups",
                "groups is a setting of norm: group alone, and the norm is {norm}; leave groups "
                "out, or take norm: group",
                {"norm": norm},
            )
        return value

    @validate_model(mode="after")
    def _check_groups_fit(self) -> Self:
        if self.norm != "group":
            return self
        for width in self._normalized_widths():
            if width % self.groups:
                raise PydanticCustomError(
                    "groups",
                    "norm: group wants widths that are multiples of groups, which is {groups}, "
                    "but {width} is none",
                    {"groups": self.groups, "width": width},
                )
        return self

    def _normalized_widths(self) -> Iterator[int]:
        """Yield how many channels each norm sees; every kind of network says its own."""
        raise NotImplementedError

    def _unused(self) -> tuple[str, ...]:
        return () if self.norm == "group" else ("groups",)


class MlpSettings(_Normalized):
    """Settings of ``mlp``: linear, norm, activation and dropout for each hidden layer."""

    hidden: Widths = Field(
        (128,), description="Width of each hidden layer.", examples=[[128], [512, 512]]
    )
    activation: Activation = _activation()

    def _normalized_widths(self) -> Iterator[int]:
        yield from self.hidden


class LinearSettings(SpecModel):
    """Settings of ``linear``, of which there are none."""


class CnnSettings(_Normalized):
    """Settings of ``cnn``: stages of 3 × 3 convolutions, each of which halves height and width."""

    channels: Annotated[Widths, Field(min_length=1)] = Field(
        (32, 64, 128), description="Channels of each stage.", examples=[[32, 64, 128]]
    )
    depth: int = Field(1, ge=1, le=16, description="Convolutions in each stage.", examples=[2])
    activation: Activation = _activation()

    def _normalized_widths(self) -> Iterator[int]:
        yield from self.channels


class VitTinySettings(SpecModel):
    """Settings of ``vit_tiny``: a small vision transformer."""

    patch: int = Field(
        4,
        ge=1,
        le=256,
        description="Height and width of a patch; height and width of the images must be multiples "
        "of it.",
        examples=[4],
    )
    depth: int = Field(6, ge=1, le=64, description="Transformer blocks.", examples=[6])
    width: int = Field(
        192, ge=4, le=8192, description="Features of a token; a multiple of 4.", examples=[192]
    )
    heads: int = Field(
        3,
        ge=1,
        le=256,
        validate_default=True,
        description="Heads of an attention; width must be a multiple of them.",
        examples=[3],
    )
    mlp_ratio: int = Field(
        4, ge=1, le=16, description="Hidden width of a block's MLP, in widths.", examples=[4]
    )

    @validate_field("heads")
    @classmethod
    def _check_heads(cls, value: int, info: ValidationInfo) -> int:
        width = info.data.get("width", 0)
        if width % value or width % 4:
            raise PydanticCustomError(
                "heads",
                "width must be a multiple of 4 and of heads, but width is {width} and heads are "
                "{heads}",
                {"width": width, "heads": value},
            )
        return value


class TabularResnetSettings(_Normalized):
    """Settings of ``tabular_resnet``, the ResNet for tables of Gorishniy et al. (2021)."""

    width: Width = Field(192, description="Features between the blocks.", examples=[192])
    depth: int = Field(2, ge=1, le=64, description="Residual blocks.", examples=[4])
    hidden_factor: float = Field(
        2.0, gt=0, le=16, description="Hidden width of a block, in widths.", examples=[2.0]
    )
    activation: Activation = _activation()

    def _normalized_widths(self) -> Iterator[int]:
        yield self.width


NAMED_TORCHVISION_MODELS: Sequence[str] = ("resnet18", "resnet34", "resnet50", "mobilenet_v3_small")
"""The torchvision models that ``task.model`` may name themselves."""

TORCHVISION_MODELS: Sequence[str] = (
    *("alexnet", "googlenet", "inception_v3"),
    *("densenet121", "densenet161", "densenet169", "densenet201"),
    *("mnasnet0_5", "mnasnet0_75", "mnasnet1_0", "mnasnet1_3"),
    *("mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small"),
    *(f"regnet_x_{size}" for size in ("400mf", "800mf", "1_6gf", "3_2gf", "8gf", "16gf", "32gf")),
    *(f"regnet_y_{size}" for size in ("400mf", "800mf", "1_6gf", "3_2gf", "8gf", "16gf", "32gf")),
    "regnet_y_128gf",
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
    *("shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "shufflenet_v2_x1_5", "shufflenet_v2_x2_0"),
    *("squeezenet1_0", "squeezenet1_1"),
    *(f"vgg{layers}{norm}" for layers in (11, 13, 16, 19) for norm in ("", "_bn")),
    *("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14"),
    *("wide_resnet50_2", "wide_resnet101_2"),
)
"""The torchvision classifiers all of whose random draws are dropout."""

STOCHASTIC_DEPTH_MODELS: Sequence[str] = (
    *(f"convnext_{size}" for size in ("tiny", "small", "base", "large")),
    *(f"efficientnet_b{size}" for size in range(8)),
    *(f"efficientnet_v2_{size}" for size in ("s", "m", "l")),
    "maxvit_t",
    *(f"swin_{version}{size}" for version in ("", "v2_") for size in ("t", "s", "b")),
)
"""The torchvision classifiers that leave out whole layers at random."""


class TorchvisionSettings(SpecModel):
    """Settings of ``torchvision``: a classifier of torchvision, with weights drawn anew."""

    architecture: str = Field(
        max_length=100,
        description="Name of the model in torchvision.models.",
        examples=["resnet18", "densenet121"],
    )

    @validate_field("architecture")
    @classmethod
    def _check_architecture(cls, value: str) -> str:
        if value in STOCHASTIC_DEPTH_MODELS:
            raise PydanticCustomError(
                "torchvision",
                "{name} leaves out whole layers at random (stochastic depth), and trials with such "
                "noise could not be reproduced; known: {known}",
                {"name": value, "known": ", ".join(TORCHVISION_MODELS)},
            )
        if value not in TORCHVISION_MODELS:
            raise PydanticCustomError(
                "torchvision", "known: {known}", {"known": ", ".join(TORCHVISION_MODELS)}
            )
        return value


class NoModelSettings(SpecModel):
    """Settings of a model that has none."""


MODEL_SETTINGS: Mapping[str, type[BaseModel]] = {
    "mlp": MlpSettings,
    "linear": LinearSettings,
    "cnn": CnnSettings,
    "vit_tiny": VitTinySettings,
    "tabular_resnet": TabularResnetSettings,
    "torchvision": TorchvisionSettings,
    **dict.fromkeys(NAMED_TORCHVISION_MODELS, NoModelSettings),
}
"""The settings of models that can be checked without importing the model."""
