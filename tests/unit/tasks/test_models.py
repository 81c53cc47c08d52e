import pytest
import torch
from torch import nn

from worker.tasks.models import mlp


def kinds(model: nn.Module) -> list[type[nn.Module]]:
    return [type(layer) for layer in model.children()]


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


def test_a_bias_that_batch_norm_would_cancel_is_left_out():
    for norm, has_bias in (("batch", False), ("layer", True), ("none", True)):
        model = mlp({"hidden": [4], "norm": norm}, (5,), 3)
        assert (model[1].bias is not None) == has_bias
        assert model[-1].bias is not None


def test_an_unknown_norm_is_refused():
    with pytest.raises(ValueError, match="batch, layer or none"):
        mlp({"norm": "group"}, (5,), 3)
