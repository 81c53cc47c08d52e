"""Every optimizer against its twin in torch.optim, for lanes that joined at different times."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from regtune.spec import Training
from worker.training.optimizers import LaneOptimizer, find_optimizer, scheduled_rates
from worker.training.regularizers import add_coupled_decay_, decay_

STEPS = 200
JOINED_AFTER = [0, 37, 120]
RATES = [0.01, 0.003, 0.02]
DECAYS = [0.1, 0.0, 0.4]
WEIGHTS = 5


def gradient(w: Tensor) -> Tensor:
    """Of a function with valleys, so that no two steps are alike."""
    return torch.sin(3 * w) + 0.3 * w * torch.linspace(0.1, 2, WEIGHTS, dtype=w.dtype)


def start(lane: int) -> Tensor:
    return torch.linspace(-2, 2 + lane, WEIGHTS, dtype=torch.float64)


KINDS = {
    "sgd": Training(optimizer="sgd"),
    "sgd without momentum": Training(optimizer="sgd", momentum=0.0),
    "sgd, Nesterov": Training(optimizer="sgd", momentum=0.8, nesterov=True),
    "adam": Training(optimizer="adam"),
    "adamw": Training(optimizer="adamw"),
    "rmsprop": Training(optimizer="rmsprop"),
    "sgd, decoupled": Training(optimizer="sgd", decay="decoupled"),
    "adam, decoupled": Training(optimizer="adam", decay="decoupled"),
    "rmsprop, decoupled": Training(optimizer="rmsprop", decay="decoupled"),
}


def twin(name: str, w: Tensor, lane: int) -> torch.optim.Optimizer:
    arguments = {"lr": RATES[lane], "weight_decay": DECAYS[lane]}
    match name:
        case "sgd":
            return torch.optim.SGD([w], momentum=0.9, **arguments)
        case "sgd without momentum":
            return torch.optim.SGD([w], **arguments)
        case "sgd, Nesterov":
            return torch.optim.SGD([w], momentum=0.8, nesterov=True, **arguments)
        case "adam":
            return torch.optim.Adam([w], **arguments)
        case "adamw":
            return torch.optim.AdamW([w], **arguments)
        case "rmsprop":
            return torch.optim.RMSprop([w], **arguments)
        case "sgd, decoupled":
            return torch.optim.SGD([w], lr=RATES[lane], momentum=0.9)
        case "adam, decoupled":
            return torch.optim.AdamW([w], **arguments)
        case "rmsprop, decoupled":
            return torch.optim.RMSprop([w], lr=RATES[lane])
    raise ValueError(name)


def trained_by_twin(name: str, lane: int, steps: int) -> list[Tensor]:
    w = start(lane).requires_grad_()
    optimizer = twin(name, w, lane)
    path = []
    for _ in range(steps):
        w.grad = gradient(w.detach())
        if name in ("sgd, decoupled", "rmsprop, decoupled"):  # which torch does not have
            w.data.mul_(1 - RATES[lane] * DECAYS[lane])
        optimizer.step()
        path.append(w.detach().clone())
    return path


def trained_as_lanes(name: str) -> dict[int, list[Tensor]]:
    """Each lane starts with a step count of its own while the others are already under way."""
    optimizer: LaneOptimizer = find_optimizer(KINDS[name])
    w_KP = torch.empty(0, WEIGHTS, dtype=torch.float64)
    moments = [torch.empty_like(w_KP) for _ in range(optimizer.moments)]
    paths: dict[int, list[Tensor]] = {}
    for step in range(STEPS + max(JOINED_AFTER)):
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


@pytest.mark.parametrize("name", KINDS)
def test_each_lane_takes_the_steps_of_its_twin_in_torch(name):
    for lane, path in trained_as_lanes(name).items():
        assert len(path) == STEPS + max(JOINED_AFTER) - JOINED_AFTER[lane]
        expected = trained_by_twin(name, lane, len(path))
        torch.testing.assert_close(torch.stack(path), torch.stack(expected), rtol=1e-9, atol=1e-12)


WARMUP_STEPS, STEPS_PER_EPOCH = 20, 10


def constant(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


def cosine(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50)


def warm(after: Callable) -> Callable:
    """A linear warm-up in front; torch counts from zero, so its first step has the first rate."""

    def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        warmup = torch.optim.lr_scheduler.LinearLR(
            optimizer, 1 / WARMUP_STEPS, total_iters=WARMUP_STEPS - 1
        )
        return torch.optim.lr_scheduler.SequentialLR(
            optimizer, [warmup, after(optimizer)], [WARMUP_STEPS]
        )

    return schedule


def rates_of_torch(schedule: Callable, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    scheduled = schedule(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(scheduled.get_last_lr()[0])
        optimizer.step()
        scheduled.step()
    return rates


@pytest.mark.parametrize(
    ("training", "schedule"),
    [
        ({"schedule": "constant", "max_epochs": 5}, constant),
        ({"schedule": "cosine", "max_epochs": 5}, cosine),
        ({"schedule": "constant", "max_epochs": 5, "warmup_epochs": 2}, warm(constant)),
        ({"schedule": "cosine", "max_epochs": 7, "warmup_epochs": 2}, warm(cosine)),
    ],
)
def test_a_schedule_is_that_of_torch_for_lanes_at_any_step(training, schedule):
    expected = np.array(rates_of_torch(schedule, 50))
    step_SK = np.stack([np.arange(1.0, 31.0), np.arange(21.0, 51.0)], axis=1)
    rates_SK = scheduled_rates(Training(**training), np.array([0.3, 0.6]), step_SK, STEPS_PER_EPOCH)
    np.testing.assert_allclose(rates_SK[:, 0], expected[:30], rtol=1e-9)
    np.testing.assert_allclose(rates_SK[:, 1], 2 * expected[20:], rtol=1e-9)
