"""The same training by torch alone: one model, one optimizer, one batch after the other."""

from collections.abc import Callable

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from tests.unit.training.conftest import blobs
from worker.training import noise
from worker.training.engine import Engine

SEED = 3

Change = Callable[[nn.Module], object]


def unchanged(model: nn.Module) -> None:
    """Do nothing to a model."""


def perceptron() -> nn.Module:
    """The built-in model, as one would write it down."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(6, 16, bias=False),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Linear(16, 3),
    )


def plain_training(
    engine: Engine,
    epochs: int,
    optimizer: str = "adamw",
    decay: float = 0.0,
    *,
    build: Callable[[], nn.Module] = perceptron,
    before_step: Change = unchanged,
    after_step: Change = unchanged,
    evaluated: Callable[[nn.Module, list[Tensor]], nn.Module] = lambda model, batches: model,
) -> Tensor:
    """Train one model as ``engine`` would a lane; return each epoch's training and validation loss.

    ``before_step`` is called when the gradients are known, ``after_step`` when the weights have
    moved; ``evaluated`` says at an epoch's end, of the model and the batches of inputs, what is
    validated.
    """
    data = blobs(None)
    rows, held_out = train_test_split(
        np.arange(len(data.train_y)), test_size=0.2, stratify=data.train_y, random_state=SEED
    )
    rows, held_out = np.sort(rows), np.sort(held_out)
    mean, deviation = (f(data.train_x[rows], axis=0, dtype=np.float64) for f in (np.mean, np.std))
    x = torch.from_numpy((data.train_x - mean) / deviation)
    y = torch.from_numpy(data.train_y)
    torch.manual_seed(SEED)
    model = build().double()
    stepper = plain_optimizer(optimizer, model, decay)
    curve = []
    for number in range(1, epochs + 1):
        order = torch.from_numpy(rows[noise.data_order(SEED, number, len(rows))])
        total = 0.0
        batches = order.tensor_split(engine.steps_per_epoch)
        for index in batches:
            stepper.zero_grad()
            loss = nn.functional.cross_entropy(model.train()(x[index]), y[index])
            loss.backward()
            before_step(model)
            stepper.step()
            with torch.no_grad():
                after_step(model)
            total += loss.item() * len(index)
        validated = evaluated(model, [x[index] for index in batches]).eval()
        with torch.no_grad():
            validation = nn.functional.cross_entropy(validated(x[held_out]), y[held_out])
        curve.append([total / len(rows), validation.item()])
    return torch.tensor(curve, dtype=torch.float64)


def plain_optimizer(name: str, model: nn.Module, decay: float) -> torch.optim.Optimizer:
    """Return torch's optimizer of this name, with decay on the weights alone."""
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": weights, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    match name:
        case "sgd":
            return torch.optim.SGD(groups, lr=0.01, momentum=0.9)
        case "adam":
            return torch.optim.Adam(groups, lr=0.01)
        case "adamw":
            return torch.optim.AdamW(groups, lr=0.01)
        case _:
            return torch.optim.RMSprop(groups, lr=0.01)
