import pytest
import torch
from torch import nn

from worker.training import regularizers

KEY = torch.tensor([123, -456], dtype=torch.int32)


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def test_only_weights_are_penalized_never_biases_or_normalization():
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3),
        nn.BatchNorm2d(2),
        nn.LayerNorm((2, 6, 6)),  # its scale has three dimensions
        nn.Flatten(),
        nn.Linear(72, 3),
        nn.RMSNorm(3),
    )
    assert list(regularizers.penalized(model, "weights")) == ["0.weight", "4.weight"]
    every = [name for name, _ in model.named_parameters()]
    assert list(regularizers.penalized(model, "all")) == every


def test_coupled_decay_is_the_gradient_of_half_the_squared_norm():
    w = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    decay = column(0.3, 2.0)
    (expected,) = torch.autograd.grad((decay / 2 * w**2).sum(), w)
    gradient = torch.zeros_like(w)
    regularizers.add_coupled_decay_(gradient, w.detach(), decay)
    torch.testing.assert_close(gradient, expected)


def test_the_l1_subgradient_is_the_gradient_of_the_norm():
    w = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    strength = column(0.3, 2.0)
    (expected,) = torch.autograd.grad((strength * w.abs()).sum(), w)
    gradient = torch.zeros_like(w)
    regularizers.add_l1_subgradient_(gradient, w.detach(), strength)
    torch.testing.assert_close(gradient, expected)


def test_decoupled_decay_shrinks_by_rate_times_strength():
    w = torch.ones(2, 3, dtype=torch.float64)
    regularizers.decay_(w, column(0.0, 0.5), column(0.1, 0.1))
    torch.testing.assert_close(w, torch.tensor([[1.0] * 3, [0.95] * 3], dtype=torch.float64))


def test_the_proximal_step_solves_its_minimization():
    """Of (w − v)² / 2 + t·|w| over w, here by a fine grid."""
    v = torch.tensor([[-1.5, -0.2, 0.0, 0.1, 0.3, 2.0]], dtype=torch.float64)
    grid = torch.linspace(-3, 3, 60_001, dtype=torch.float64)[:, None]
    expected = grid[((grid - v) ** 2 / 2 + 0.25 * grid.abs()).argmin(0), 0]
    w = v.clone()
    regularizers.soft_threshold_(w, column(0.25))
    torch.testing.assert_close(w[0], expected, atol=1e-4, rtol=0)
    assert (w[0, 1:4] == 0).all()


def test_the_proximal_step_with_a_strength_of_zero_changes_nothing():
    w = torch.randn(1, 9)
    before = w.clone()
    regularizers.soft_threshold_(w, torch.zeros(1, 1))
    assert torch.equal(w, before)


def test_the_penalty_is_l1_plus_half_the_squared_norm():
    w = torch.tensor([[1.0, -2.0], [3.0, 0.0]], dtype=torch.float64)
    l1, decay = column(0.1, 0.2)[:, 0], column(2.0, 4.0)[:, 0]
    assert regularizers.penalty([w[:, :1], w[:, 1:, None]], l1, decay).tolist() == [
        0.1 * 3 + 5,
        0.2 * 3 + 18,
    ]
    torch.testing.assert_close(regularizers.penalty([w], l1, None), l1 * 3)


def test_sparsity_counts_exact_zeros():
    assert regularizers.sparsity(
        [torch.tensor([[0.0, 1e-30], [0, 0]]), torch.tensor([[[1.0], [0]], [[0], [0]]])]
    ).tolist() == [0.5, 1.0]


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_label_smoothing_is_that_of_torch(smoothing):
    logits = torch.randn(6, 4, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 3, 0, 1])
    expected = nn.functional.cross_entropy(logits, y, label_smoothing=smoothing)
    ours = regularizers.smoothed_cross_entropy(logits, y, torch.tensor(smoothing).double()).mean()
    torch.testing.assert_close(ours, expected)


def test_a_perturbation_has_its_deviation_and_none_at_zero():
    x = torch.full((300, 300), 2.0, dtype=torch.float64)
    (noisy,) = regularizers.perturbed([x], torch.tensor(0.3).double(), KEY)
    assert abs(noisy.mean() - 2) < 4.5 * 0.3 / 300
    assert abs(noisy.std() - 0.3) < 4.5 * 0.3 / (2**0.5 * 300)
    (still,) = regularizers.perturbed([x], torch.tensor(0.0).double(), KEY)
    assert torch.equal(still, x)
