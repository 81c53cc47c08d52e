"""Gradient clipping and max-norm against torch, for lanes with limits of their own."""

from math import inf

import pytest
import torch
from torch import nn

from tests.unit.training.conftest import losses, train, trial
from tests.unit.training.plain import plain_training
from worker.training import regularizers

EPOCHS = 6
LIMITS = torch.tensor([0.5, 3.0, inf], dtype=torch.float64)


def test_gradients_are_clipped_as_torch_would_each_lane_by_its_own_limit():
    gradients = [torch.randn(3, 4, 5, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)]
    expected = []
    for lane, limit in enumerate(LIMITS.tolist()):
        parameters = [nn.Parameter(torch.zeros_like(part[lane])) for part in gradients]
        for parameter, part in zip(parameters, gradients, strict=True):
            parameter.grad = part[lane].clone()
        nn.utils.clip_grad_norm_(parameters, limit)
        expected.append([parameter.grad for parameter in parameters])
    untouched = [part[2].clone() for part in gradients]
    regularizers.clip_(gradients, LIMITS)
    for ours, theirs in zip(gradients, zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(ours, torch.stack(theirs))
    assert all(
        torch.equal(part[2], whole) for part, whole in zip(gradients, untouched, strict=True)
    )


@pytest.mark.parametrize(
    ("module", "units"),
    [
        (nn.Linear(7, 5), 5),
        (nn.Conv2d(4, 6, 3, groups=2), 6),
        (nn.ConvTranspose2d(4, 6, 3), 6),
        (nn.ConvTranspose1d(4, 6, 3, groups=2), 6),
    ],
)
def test_what_leads_into_a_unit_gets_no_longer_than_the_limit_and_keeps_its_direction(
    module, units
):
    """A unit is found by what reaches one output, and no other."""
    module = module.double()
    ((name, groups),) = regularizers.units(module).items()
    assert name == "weight"
    before = torch.stack([module.weight.detach() * factor for factor in (2, 10, 10)])
    after = before.clone()
    regularizers.limit_norm_(after, LIMITS, groups)
    for unit in range(units):
        reached = _reached(module, unit, units)
        for lane, limit in enumerate(LIMITS.tolist()):
            own, now = before[lane][reached], after[lane][reached]
            expected = own * min(1.0, limit / float(own.norm()))
            torch.testing.assert_close(now, expected)
    assert torch.equal(before[2], after[2])


def _reached(module: nn.Module, unit: int, units: int) -> torch.Tensor:
    """Which weights one output channel depends on, by their gradient."""
    weight = torch.rand_like(module.weight).requires_grad_()
    shape = {2: (7,), 3: (4, 5), 4: (4, 5, 5)}[weight.ndim]
    output = torch.func.functional_call(
        module, {"weight": weight}, (torch.ones(1, *shape).double(),)
    )
    assert output.shape[1] == units
    (gradient,) = torch.autograd.grad(output[:, unit].sum(), weight)
    return gradient != 0


def test_biases_and_normalization_have_no_units():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.LayerNorm((2, 6, 6)), nn.Linear(6, 3))
    assert regularizers.units(model) == {"0.weight": 0, "2.weight": 0}


def test_a_unit_without_weight_stays_so():
    weights = torch.zeros(1, 2, 3)
    regularizers.limit_norm_(weights, torch.tensor([0.5]))
    assert torch.equal(weights, torch.zeros(1, 2, 3))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_lane_clips_what_torch_would_clip(make_engine, optimizer):
    """Before the optimizer and its decay; and a lane without a limit is trained without."""
    engine = make_engine(optimizer=optimizer)
    strengths = {0: 0.1, 1: 0.4, 2: 0.0}
    engine.join([trial(k, max_gradient_norm=c, weight_decay=0.1) for k, c in strengths.items()])
    curves = train(engine, EPOCHS)
    for key, limit in strengths.items():
        expected = plain_training(
            engine,
            EPOCHS,
            optimizer,
            0.1,
            before_step=lambda model, c=limit or inf: nn.utils.clip_grad_norm_(
                model.parameters(), c
            ),
        )
        torch.testing.assert_close(losses(curves[key]), expected, rtol=1e-8, atol=0)
    assert len({curve[-1].validation_loss for curve in curves.values()}) == 3


def test_a_lane_keeps_its_units_in_the_ball_that_torch_would_keep_them_in(make_engine):
    engine = make_engine(optimizer="sgd")
    strengths = {0: 0.2, 1: 0.4, 2: 0.0}
    engine.join([trial(k, max_norm=c, weight_decay=0.1) for k, c in strengths.items()])
    curves = train(engine, EPOCHS)

    def renorm(model: nn.Module, limit: float) -> None:
        for layer in (model[1], model[4]):
            layer.weight.copy_(torch.renorm(layer.weight, 2, 0, limit))

    for key, limit in strengths.items():
        expected = plain_training(
            engine, EPOCHS, "sgd", 0.1, after_step=lambda model, c=limit or 1e9: renorm(model, c)
        )
        torch.testing.assert_close(losses(curves[key]), expected, rtol=1e-5, atol=0)  # its epsilon
    longest = [
        max(
            float(engine._tensors.parameters[name][lane].norm(dim=1).max())
            for name in engine.model.units
        )
        for lane in strengths
    ]
    assert longest[:2] == pytest.approx([0.2, 0.4])
    assert longest[2] > 0.4


def test_soft_threshold_and_ball_one_after_the_other_are_the_proximal_step_of_both():
    """Of (w − v)² / 2 + t·‖w‖₁ within a ball of radius c: its optimality conditions hold."""
    v = torch.tensor([[[1.5, -0.7, 0.1, 2.0]]], dtype=torch.float64)
    w, t, c = v.clone(), 0.2, 1.2
    regularizers.soft_threshold_(w, torch.full((1, 1, 1), t).double())
    regularizers.limit_norm_(w, torch.tensor([c]).double())
    assert float(w.norm()) == pytest.approx(c)
    # 0 = w − v + t·sign(w) + μ·w with one μ ≥ 0 where w ≠ 0, and |v| ≤ t where w = 0.
    nonzero = w != 0
    multiplier = (v - w - t * w.sign())[nonzero] / w[nonzero]
    torch.testing.assert_close(multiplier, multiplier[:1].expand_as(multiplier))
    assert multiplier[0] > 0
    assert (v[~nonzero].abs() <= t).all()
