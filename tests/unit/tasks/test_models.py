from importlib.metadata import entry_points

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torchvision import models as theirs
from torchvision.ops import StochasticDepth

from regtune.errors import InvalidData
from regtune.spec import STOCHASTIC_DEPTH_MODELS, TORCHVISION_MODELS
from regtune.spec.models import MODEL_SETTINGS
from regtune.task import MODELS, find_model
from worker.tasks.models import cnn, linear, mlp, tabular_resnet, vit_tiny
from worker.tasks.models.torchvision import resnet18, torchvision

IMAGES = (3, 16, 16)


def kinds(model: nn.Module) -> list[type[nn.Module]]:
    return [type(layer) for layer in model.children()]


def shapes(model: nn.Module) -> list[tuple[int, ...]]:
    """The shapes of all weights of two and more dimensions."""
    return [tuple(p.shape) for p in model.parameters() if p.ndim > 1]


def test_settings_are_checked_for_the_models_that_are_built_in_and_for_no_others():
    ours = {point.name for point in entry_points(group=MODELS) if point.value.startswith("worker.")}
    assert set(MODEL_SETTINGS) == ours
    for name in MODEL_SETTINGS:
        assert callable(find_model(name))


def test_an_mlp_is_linear_norm_relu_dropout_for_each_hidden_layer():
    model = mlp({"hidden": [32, 16], "norm": "layer"}, (1, 8, 8), 10)
    block = [nn.Linear, nn.LayerNorm, nn.ReLU, nn.Dropout]
    assert kinds(model) == [nn.Flatten, *block, *block, nn.Linear]
    assert [layer.out_features for layer in model if isinstance(layer, nn.Linear)] == [32, 16, 10]
    assert model(torch.zeros(4, 1, 8, 8)).shape == (4, 10)


def test_an_mlp_without_settings_has_128_hidden_units_and_batch_norm():
    model = mlp({}, (20,), 3)
    assert kinds(model) == [
        nn.Flatten,
        nn.Linear,
        nn.BatchNorm1d,
        nn.ReLU,
        nn.Dropout,
        nn.Linear,
    ]
    assert model[1].out_features == 128


def test_an_mlp_may_have_no_norm_and_no_hidden_layer():
    assert kinds(mlp({"norm": "none", "hidden": [4]}, (5,), 3)) == [
        nn.Flatten,
        nn.Linear,
        nn.ReLU,
        nn.Dropout,
        nn.Linear,
    ]
    assert kinds(mlp({"hidden": []}, (5,), 3)) == [nn.Flatten, nn.Linear]


def test_an_mlp_may_normalize_in_groups():
    model = mlp({"norm": "group", "groups": 2, "hidden": [6]}, (5,), 3)
    x = torch.randn(4, 6)
    expected = (x.view(4, 2, 3) - x.view(4, 2, 3).mean(2, keepdim=True)) / (
        x.view(4, 2, 3).var(2, correction=0, keepdim=True) + 1e-5
    ).sqrt()
    torch.testing.assert_close(model[2](x), expected.view(4, 6))


@pytest.mark.parametrize(
    ("name", "layer"),
    [("relu", nn.ReLU), ("gelu", nn.GELU), ("silu", nn.SiLU), ("tanh", nn.Tanh), ("selu", nn.SELU)],
)
def test_an_mlp_has_the_activation_that_is_asked_for(name: str, layer: type[nn.Module]):
    model = mlp({"activation": name, "hidden": [4, 4]}, (5,), 3)
    assert kinds(model).count(layer) == 2
    assert nn.ReLU not in kinds(model) or layer is nn.ReLU


def test_a_self_normalizing_network_has_alpha_dropout_and_keeps_its_variance_through_all_layers():
    torch.manual_seed(0)
    model = mlp({"activation": "selu", "norm": "none", "hidden": [512] * 9}, (64,), 3)
    assert kinds(model).count(nn.AlphaDropout) == 9
    activations = model[:-1].eval()(torch.randn(256, 64)).detach()
    assert activations.mean() == pytest.approx(0, abs=0.1)
    assert activations.std() == pytest.approx(1, abs=0.2)


def test_a_bias_that_batch_norm_would_cancel_is_left_out():
    for norm, has_bias in (("batch", False), ("layer", True), ("group", True), ("none", True)):
        model = mlp({"hidden": [8], "norm": norm}, (5,), 3)
        assert (model[1].bias is not None) == has_bias
        assert model[-1].bias is not None
        model = cnn({"channels": [8], "norm": norm}, IMAGES, 3)
        assert (model[0].bias is not None) == has_bias
        model = tabular_resnet({"width": 8, "norm": norm}, (5,), 3)
        assert (model.first.bias is not None) == has_bias
        assert (model.block_1.second.bias is not None) == has_bias
        assert model.block_1.first.bias is not None


@pytest.mark.parametrize("build", [mlp, cnn, tabular_resnet])
def test_an_unknown_norm_is_refused(build):
    with pytest.raises(ValidationError, match="'batch', 'layer', 'group' or 'none'"):
        build({"norm": "spectral"}, IMAGES, 3)


def test_a_linear_model_is_one_layer():
    model = linear({}, (1, 8, 8), 10)
    assert kinds(model) == [nn.Flatten, nn.Linear]
    assert shapes(model) == [(10, 64)]


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (2, 7, 9), (1, 1, 1)])
@pytest.mark.parametrize("norm", ["batch", "layer", "group", "none"])
def test_a_cnn_halves_images_of_any_size(shape: tuple[int, int, int], norm: str):
    model = cnn({"channels": [8, 16], "depth": 2, "norm": norm}, shape, 5)
    assert model(torch.randn(4, *shape)).shape == (4, 5)
    assert shapes(model)[:4] == [(8, shape[0], 3, 3), (8, 8, 3, 3), (16, 8, 3, 3), (16, 16, 3, 3)]
    stages = model[: kinds(model).index(nn.AdaptiveAvgPool2d)]
    halved = tuple(-(-side // 4) for side in shape[1:])
    assert stages(torch.randn(4, *shape)).shape == (4, 16, *halved)


def test_a_cnn_drops_channels_after_each_stage_and_features_before_the_end():
    layers = kinds(cnn({}, IMAGES, 3))
    assert layers.count(nn.Dropout2d) == 3
    assert layers[-2:] == [nn.Dropout, nn.Linear]
    layers = kinds(cnn({"activation": "selu"}, IMAGES, 3))
    assert layers.count(nn.FeatureAlphaDropout) == 3
    assert layers[-2:] == [nn.AlphaDropout, nn.Linear]


def test_a_layer_norm_of_images_is_over_channels_and_places():
    norm = cnn({"channels": [6], "norm": "layer"}, IMAGES, 3)[1]
    x = torch.randn(4, 6, 5, 5)
    expected = nn.functional.layer_norm(x, (6, 5, 5))
    torch.testing.assert_close(norm(x), expected, atol=1e-5, rtol=1e-5)


def test_a_vision_transformer_sees_patches_and_their_places():
    torch.manual_seed(0)
    model = vit_tiny({"patch": 8, "width": 16, "heads": 2, "depth": 2}, IMAGES, 5).eval()
    x = torch.randn(4, *IMAGES)
    assert model(x).shape == (4, 5)
    swapped = torch.cat([x[..., 8:], x[..., :8]], dim=-1)
    assert not torch.allclose(model(swapped), model(x), atol=1e-4)
    model.positions.zero_()
    torch.testing.assert_close(model(swapped), model(x), atol=1e-5, rtol=1e-4)


def test_attention_is_torchs_own():
    model = vit_tiny({"patch": 8, "width": 16, "heads": 2, "depth": 1}, IMAGES, 5)
    ours = model.blocks[0].attention[1].eval()
    other = nn.MultiheadAttention(16, 2, batch_first=True)
    with torch.no_grad():
        other.in_proj_weight.copy_(ours.qkv.weight)
        other.in_proj_bias.copy_(ours.qkv.bias)
        other.out_proj.weight.copy_(ours.out.weight)
        other.out_proj.bias.copy_(ours.out.bias)
    tokens = torch.randn(3, 4, 16)
    torch.testing.assert_close(ours(tokens), other(tokens, tokens, tokens)[0])


def test_places_are_told_apart_and_are_no_parameter():
    model = vit_tiny({"patch": 2}, IMAGES, 5)
    assert model.positions.shape == (64, 192)
    assert "positions" not in dict(model.named_parameters())
    distances = torch.cdist(model.positions, model.positions) + torch.eye(64) * 9
    assert distances.min() > 0.5


def test_a_tabular_resnet_is_that_of_the_paper():
    torch.manual_seed(0)
    model = tabular_resnet({"width": 8, "depth": 2, "hidden_factor": 1.5}, (5,), 3)
    sites = [name for name, module in model.named_modules() if isinstance(module, nn.Dropout)]
    assert sites == [
        f"block_{block}.{site}"
        for block in (1, 2)
        for site in ("hidden_dropout", "residual_dropout")
    ]
    assert shapes(model) == [(8, 5), (12, 8), (8, 12), (12, 8), (8, 12), (3, 8)]
    x = model.first(torch.randn(4, 5))
    block = model.block_1
    block.hidden_dropout.p = block.residual_dropout.p = 0
    expected = x + block.second(torch.relu(block.first(nn.functional.batch_norm(
        x, None, None, training=True
    ))))  # fmt: skip
    torch.testing.assert_close(block(x), expected)
    assert kinds(model.head) == [nn.BatchNorm1d, nn.ReLU, nn.Linear]


@pytest.mark.parametrize("build", [cnn, vit_tiny, resnet18])
def test_a_model_of_images_refuses_a_table(build):
    with pytest.raises(InvalidData, match=r"wants images .* has the shape \(13,\)"):
        build({}, (13,), 3)


def test_patches_must_fill_the_images():
    with pytest.raises(InvalidData, match=r"task\.patch: images of 28 × 30 do not divide"):
        vit_tiny({}, (1, 28, 30), 10)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "squeezenet1_1", "vit_b_32"])
def test_a_model_of_torchvision_is_fitted_to_channels_and_classes(name: str):
    model = torchvision({"architecture": name}, (1, 32, 32), 7).eval()
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 7)
    assert next(p for p in model.parameters() if p.ndim == 4).shape[1] == 1


def test_a_model_of_torchvision_that_has_no_dropout_gets_one_before_its_classifier():
    assert kinds(resnet18({}, IMAGES, 7).fc) == [nn.Dropout, nn.Linear]
    densenet = torchvision({"architecture": "densenet121"}, IMAGES, 7)
    assert kinds(densenet.classifier) == [nn.Dropout, nn.Linear]
    mobilenet = torchvision({"architecture": "mobilenet_v3_small"}, IMAGES, 7)
    assert kinds(mobilenet.classifier) == [nn.Linear, nn.Hardswish, nn.Dropout, nn.Linear]


def test_all_of_torchvisions_classifiers_are_known_and_those_with_other_noise_are_refused():
    assert set(theirs.list_models(module=theirs)) == {
        *TORCHVISION_MODELS,
        *STOCHASTIC_DEPTH_MODELS,
    }
    for name in STOCHASTIC_DEPTH_MODELS:
        with pytest.raises(ValidationError, match=f"{name} leaves out whole layers at random"):
            torchvision({"architecture": name}, IMAGES, 7)
    for name in ("convnext_tiny", "efficientnet_b0", "efficientnet_v2_s", "swin_t", "swin_v2_t"):
        with torch.device("meta"):
            model = theirs.get_model(name)
        assert any(isinstance(module, StochasticDepth) for module in model.modules())
