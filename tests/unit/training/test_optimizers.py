"""Every optimizer against its twin in torch.optim, for lanes that joined at different times."""

import numpy as np
import pytest
import torch
from torch import Tensor

from worker.training.optimizers import OPTIMIZERS, scheduled_rate
from worker.training.regularizers import add_coupled_decay_, decay_

STEPS = 200
JOINED_AFTER = [0, 37, 120]
RATES = [0.01, 0.003, 0.02]
DECAYS = [0.0, 0.1, 0.4]
WEIGHTS = 5


def gradient(w: Tensor) -> Tensor:
    """Of a function with valleys, so that no two steps are alike."""
    return torch.sin(3 * w) + 0.3 * w * torch.linspace(0.1, 2, WEIGHTS, dtype=w.dtype)


def start(lane: int) -> Tensor:
    return torch.linspace(-2, 2 + lane, WEIGHTS, dtype=torch.float64)


def twin(name: str, w: Tensor, lane: int) -> torch.optim.Optimizer:
    arguments = {"lr": RATES[lane], "weight_decay": DECAYS[lane]}
    match name:
        case "sgd":
            return torch.optim.SGD([w], momentum=0.9, **arguments)
        case "adam":
            return torch.optim.Adam([w], **arguments)
        case "adamw":
            return torch.optim.AdamW([w], **arguments)
        case "rmsprop":
            return torch.optim.RMSprop([w], **arguments)
    raise ValueError(name)


def trained_by_twin(name: str, lane: int, steps: int) -> list[Tensor]:
    w = start(lane).requires_grad_()
    optimizer = twin(name, w, lane)
    path = []
    for _ in range(steps):
        w.grad = gradient(w.detach())
        optimizer.step()
        path.append(w.detach().clone())
    return path


def trained_as_lanes(name: str) -> dict[int, list[Tensor]]:
    """Each lane starts with a step count of its own while the others are already under way."""
    optimizer = OPTIMIZERS[name]
    w_KP = torch.empty(0, WEIGHTS, dtype=torch.float64)
    moments = [torch.empty_like(w_KP) for _ in range(optimizer.moments)]
    paths: dict[int, list[Tensor]] = {}
    for step in range(STEPS):
        if step in JOINED_AFTER:
            w_KP = torch.cat([w_KP, start(len(w_KP))[None]])
            moments = [torch.cat([m, torch.zeros(1, WEIGHTS).to(m)]) for m in moments]
        lanes = range(len(w_KP))
        step_SK = np.array([[step + 1.0 - JOINED_AFTER[k] for k in lanes]])
        rate_SK = np.array([[RATES[k] for k in lanes]])
        decay_K1 = torch.tensor([[DECAYS[k]] for k in lanes], dtype=torch.float64)
        gradient_KP = gradient(w_KP)
        if optimizer.decoupled_decay:
            decay_(w_KP, decay_K1, torch.from_numpy(rate_SK).T)
        else:
            add_coupled_decay_(gradient_KP, w_KP, decay_K1)
        coefficients = torch.from_numpy(optimizer.coefficients(rate_SK, step_SK))[:, 0, :, None]
        optimizer.update_(w_KP, gradient_KP, moments, coefficients.unbind())
        for k in lanes:
            paths.setdefault(k, []).append(w_KP[k].clone())
    return paths


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_lane_takes_the_steps_of_its_twin_in_torch(name):
    for lane, path in trained_as_lanes(name).items():
        assert len(path) == STEPS - JOINED_AFTER[lane]
        expected = trained_by_twin(name, lane, len(path))
        torch.testing.assert_close(torch.stack(path), torch.stack(expected), rtol=1e-9, atol=1e-12)


def test_the_cosine_schedule_is_that_of_torch():
    w = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=0.3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50)
    expected = []
    for _ in range(50):
        expected.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    rates = scheduled_rate("cosine", 0.3, np.arange(1.0, 51.0), 50)
    np.testing.assert_allclose(rates, expected, rtol=1e-9)


def test_the_constant_schedule_is_constant():
    assert scheduled_rate("constant", 0.3, np.arange(1.0, 4.0), 3).tolist() == [0.3, 0.3, 0.3]
