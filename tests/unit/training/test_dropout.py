import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right

from worker.training.dropout import DropoutSite, dropout_threshold, install_dropout_sites

KEY = torch.tensor([123, -456], dtype=torch.int32)


def site_at(rate: float, module: nn.Module | None = None) -> DropoutSite:
    site = DropoutSite.standing_for(module or nn.Dropout())
    site.threshold = dropout_threshold(torch.tensor(rate))
    site.scale = torch.tensor(1 / (1 - rate))
    site.key = KEY
    return site


def test_kept_activations_are_scaled_and_dropped_ones_are_zero():
    out = site_at(0.75)(torch.full((100, 100), 2.0))
    assert set(out.unique().tolist()) == {0.0, 8.0}


def test_a_dropout_of_zero_is_exactly_off():
    x = torch.randn(50, 50)
    assert torch.equal(site_at(0.0)(x), x)


def test_dropout_is_the_identity_in_evaluation():
    x = torch.randn(50, 50)
    assert torch.equal(site_at(0.5).eval()(x), x)


def test_a_site_that_is_called_twice_draws_twice():
    site = site_at(0.5)
    x = torch.ones(40, 40)
    assert not torch.equal(site(x), site(x))


def test_channelwise_dropout_drops_whole_channels():
    for module in (nn.Dropout1d(), nn.Dropout2d(), nn.Dropout3d()):
        out = site_at(0.5, module)(torch.ones(20, 30, 4, 4)).flatten(2)
        assert (out == out[..., :1]).all()
        assert set(out.unique().tolist()) == {0.0, 2.0}


def test_alpha_dropout_keeps_mean_and_variance():
    x = torch.selu(torch.randn(500, 500, dtype=torch.float64))
    out = site_at(0.3, nn.AlphaDropout())(x)
    assert abs(out.mean()) < 0.02
    assert abs(out.var() - 1) < 0.02
    twin = nn.AlphaDropout(0.3).train()(x)
    torch.testing.assert_close(out.unique()[:1], twin.unique()[:1], rtol=1e-6, atol=0)


def test_every_dropout_of_a_model_becomes_a_site_and_a_shared_one_stays_one():
    shared = nn.Dropout(0.3)
    model = nn.Sequential(shared, nn.Sequential(nn.Dropout2d(), shared), nn.AlphaDropout())
    sites = install_dropout_sites(model)
    assert list(sites) == ["0", "1.0", "2"]
    assert model[0] is model[1][1] is sites["0"]
    assert not any(isinstance(m, nn.modules.dropout._DropoutNd) for m in model.modules())


def attention(drop: DropoutSite | None, **options: Any) -> Tensor:
    """Attention's weights themselves: its values are the unit vectors."""
    torch.manual_seed(0)
    query, key = (torch.randn(2, 4, rows, 8, dtype=torch.float64) for rows in (6, 5))
    if options.get("enable_gqa"):
        key = key[:, :2]
    value = torch.eye(5, dtype=torch.float64).expand(*key.shape[:2], 5, 5)
    rate = drop.p if drop else 0.0
    return functional.scaled_dot_product_attention(query, key, value, dropout_p=rate, **options)


MASK = torch.tensor([[True, False, True, True, False]] * 5 + [[False] * 5])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"attn_mask": MASK},
        {"attn_mask": torch.zeros(6, 5, dtype=torch.float64).masked_fill(~MASK, -torch.inf)},
        {"attn_mask": torch.arange(30, dtype=torch.float64).view(6, 5)},
        {"scale": 0.1},
        {"enable_gqa": True},
    ],
    ids=["plain", "causal", "mask", "hidden", "bias", "scale", "shared heads"],
)
def test_a_site_drops_weights_of_torchs_attention_and_changes_nothing_else(options):
    plain = attention(None, **options)
    torch.testing.assert_close(attention(site_at(0.0), **options), plain)
    torch.testing.assert_close(attention(site_at(0.5).eval(), **options), plain)
    dropped = attention(site_at(0.5), **options)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], 2 * plain[kept])
    assert 0.3 < kept.sum() / (plain != 0).sum() < 0.7


def test_a_rate_that_a_model_reads_drops_at_the_sites_own():
    site = site_at(0.75)
    x = torch.full((100, 100), 2.0)
    out = functional.dropout(x, site.p, training=True)
    assert set(out.unique().tolist()) == {0.0, 8.0}
    assert functional.dropout(x, site.p, training=False) is x
    assert functional.dropout(x, p=0.5).unique().tolist() == [0.0, 4.0]


def test_a_site_drops_in_place_where_it_is_asked_to():
    x = torch.full((100, 100), 2.0)
    functional.dropout(x, site_at(0.75).p, training=True, inplace=True)
    assert set(x.unique().tolist()) == {0.0, 8.0}


@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_attention_drops_weights_at_a_site_of_its_own(need_weights):
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(8, 2, batch_first=True)
    model = copy.deepcopy(plain)
    model.dropout = 0.1
    sites = install_dropout_sites(model)
    assert list(sites) == ["weights_dropout"]
    x = torch.randn(3, 7, 8)

    def out(of: nn.MultiheadAttention) -> Tensor:
        y: Tensor = of(x, x, x, need_weights=need_weights)[0]
        return y

    torch.testing.assert_close(out(model), out(plain))  # the site's rate is still 0
    twin = copy.deepcopy(model)
    for name, value in site_at(0.5).named_buffers():
        setattr(twin.weights_dropout, name, value)
    assert not torch.allclose(out(twin), out(plain))
    torch.testing.assert_close(out(model), out(plain))  # the copy has a site of its own
    torch.testing.assert_close(out(twin.eval()), out(plain))


def test_multihead_attention_that_drops_nothing_has_no_site():
    assert not install_dropout_sites(nn.TransformerEncoderLayer(8, 2, dropout=0.0).self_attn)
    assert list(install_dropout_sites(nn.TransformerEncoderLayer(8, 2))) == [
        "dropout",
        "dropout1",
        "dropout2",
        "self_attn.weights_dropout",
    ]


def scripted(x: Tensor, p: float) -> Tensor:
    y = functional.dropout(x, p, True)
    return functional.scaled_dot_product_attention(y, y, y)


def test_torchs_functions_can_still_be_scripted():
    x = torch.randn(1, 2, 4, 8)
    torch.testing.assert_close(torch.jit.script(scripted)(x, 0.0), scripted(x, 0.0))


def test_a_causal_bias_of_torchs_masks_as_it_says():
    torch.manual_seed(0)
    query, key = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 6, 8)
    mask = torch.ones(4, 6, dtype=torch.bool).tril(2)
    plain = functional.scaled_dot_product_attention(query, key, key, mask)
    for rate in (0.0, site_at(0.0).p):
        out = functional.scaled_dot_product_attention(
            query, key, key, causal_lower_right(4, 6), dropout_p=rate
        )
        torch.testing.assert_close(out, plain)
