"""What modules of a user's own do in a forward pass, beside plain torch."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.unit.training.conftest import CLASSES, FEATURES, losses, train, trial
from tests.unit.training.plain import plain_training
from worker.training.model import UnsupportedModel, loop

EPOCHS = 20
"""Long enough for a step to be recorded."""


class Headed(nn.Module):
    """Some features, and a linear layer on them."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.body = nn.Linear(FEATURES, 8)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x))


class WritesIntoItsInput(Headed):
    def features(self, x: Tensor) -> Tensor:
        return super().features(x.sub_(0.5).mul_(2.0))


class WritesIntoItsInputAndBranches(WritesIntoItsInput):
    """So that ``vmap`` refuses it."""

    def features(self, x: Tensor) -> Tensor:
        features = super().features(x)
        return features if float(features.detach().sum()) < 1e9 else -features


class FillsAState(Headed):
    """Step by step, in what is made like the input."""

    def features(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), 8)
        for number in range(3):
            state[:, number] = torch.tanh(self.body(x)[:, number] + state[:, number - 1])
        return state


class KeepsAMask(Headed):
    """Made when it is first needed, as masks of attention are."""

    mask: Tensor | None = None

    def features(self, x: Tensor) -> Tensor:
        if self.mask is None:
            self.mask = torch.triu(torch.ones(8, 8, dtype=x.dtype))
        return super().features(x) @ self.mask


class RemembersItsFeatures(Headed):
    """For a look at them afterwards."""

    def features(self, x: Tensor) -> Tensor:
        self.seen = super().features(x)
        return self.seen


class Recurrent(Headed):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.LSTM(1, 8, batch_first=True)

    def features(self, x: Tensor) -> Tensor:
        return self.body(x[:, :, None])[0][:, -1]


class InstanceNormed(Headed):
    def __init__(self) -> None:
        super().__init__(width=4 * FEATURES)
        self.body = nn.Conv1d(1, 4, 3, padding=1)
        self.norm = nn.InstanceNorm1d(4, affine=True, track_running_stats=True)

    def features(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.body(x[:, None]))).flatten(1)


class Averaging(Headed):
    """A batch norm whose statistics are the mean over all batches so far."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8, momentum=None)

    def features(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.body(x)))


class WeightNormed(Headed):
    def __init__(self) -> None:
        super().__init__()
        self.body = parametrizations.weight_norm(self.body)


class SpectralNormed(Headed):
    def __init__(self) -> None:
        super().__init__()
        self.body = parametrizations.spectral_norm(self.body)


class Embedded(Headed):
    def __init__(self) -> None:
        super().__init__(width=4 * FEATURES)
        self.body = nn.Embedding(9, 4, padding_idx=0)

    def features(self, x: Tensor) -> Tensor:
        return self.body((4 + 2 * x).long().clamp(0, 8)).flatten(1)


class Rounded(torch.autograd.Function):
    """Straight-through rounding, as it was written before there was ``setup_context``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (4 * x).round() / 4

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * (x.abs() < 2)


class RoundsItsFeatures(Headed):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def features(self, x: Tensor) -> Tensor:
        return Rounded.apply(self.norm(super().features(x)))


class FollowsAGradient(Headed):
    """One step along that of an energy of its own."""

    def features(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            place = x.detach().requires_grad_()
            energy = torch.tanh(self.body(place)).sum()
            (slope,) = torch.autograd.grad(energy, place, create_graph=self.training)
        return super().features(x - 0.1 * slope)


class DrawsFromPython(Headed):
    def features(self, x: Tensor) -> Tensor:
        return super().features(x) * (random.random() < 2)


class DrawsFromNumPy(Headed):
    def features(self, x: Tensor) -> Tensor:
        return super().features(x) * float(np.random.rand() < 2)


class DrawsFromItsOwn(Headed):
    def __init__(self) -> None:
        super().__init__()
        self.generator = [torch.Generator().manual_seed(0)]

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.rand(CLASSES, dtype=x.dtype, generator=self.generator[0])
        return super().forward(x) + noise

    def __deepcopy__(self, memo: object) -> "DrawsFromItsOwn":
        return self


class Counts(Headed):
    calls = 0

    def features(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().features(x) * min(1.0, self.calls / 100)


LIKE_TORCH = [
    WritesIntoItsInput,
    WritesIntoItsInputAndBranches,
    FillsAState,
    KeepsAMask,
    RemembersItsFeatures,
    Recurrent,
    InstanceNormed,
    Averaging,
    WeightNormed,
    SpectralNormed,
    Embedded,
    RoundsItsFeatures,
    FollowsAGradient,
]


SLOW = [InstanceNormed, KeepsAMask, RemembersItsFeatures, Recurrent, FillsAState, Embedded]
"""Of those, what takes long one lane after the other."""


@pytest.mark.parametrize(
    "own", [pytest.param(own, marks=pytest.mark.slow) if own in SLOW else own for own in LIKE_TORCH]
)
def test_a_module_trains_as_torch_alone_would_train_it_in_company_and_lane_by_lane(
    make_engine, own
):
    alone, company, looped = (
        make_engine(model=lambda *_: own(), max_epochs=EPOCHS) for _ in range(3)
    )
    expected = plain_training(alone, EPOCHS, build=own)
    alone.join([trial(0)])
    torch.testing.assert_close(losses(train(alone, EPOCHS)[0]), expected, rtol=1e-8, atol=0)
    for step in list(looped._epochs._replicas.queue):
        step._model._over_lanes = loop
    for engine in (company, looped):
        engine.join([trial(1, learning_rate=0.03), trial(2, weight_decay=0.5), trial(0)])
        curves = train(engine, EPOCHS)
        torch.testing.assert_close(losses(curves[0]), expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize(
    ("own", "reason"),
    [(RoundsItsFeatures, "setup_context"), (FollowsAGradient, "requires_grad_")],
)
def test_what_torch_func_refuses_is_differentiated_lane_by_lane(make_engine, own, reason):
    model = make_engine(model=lambda *_: own()).model
    assert not model.vectorized
    assert reason in model.refusal


def test_an_error_of_the_models_own_stays_what_it_is(make_engine):
    class Fails(Headed):
        def features(self, x: Tensor) -> Tensor:
            raise RuntimeError("no features today")

    with pytest.raises(RuntimeError, match="no features today"):
        make_engine(model=lambda *_: Fails())


@pytest.mark.parametrize(
    ("own", "reason"),
    [
        (DrawsFromPython, "draws random numbers other than in nn.Dropout"),
        (DrawsFromNumPy, "draws random numbers other than in nn.Dropout"),
        (DrawsFromItsOwn, "something else of the same rows the second time"),
        (Counts, "something else of the same rows the second time"),
    ],
)
def test_a_module_that_does_not_do_the_same_twice_is_refused(make_engine, own, reason):
    with pytest.raises(UnsupportedModel, match=reason):
        make_engine(model=lambda *_: own())


def test_complex_numbers_are_refused(make_engine):
    class Fourier(Headed):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones(8, dtype=torch.cfloat))

    with pytest.raises(UnsupportedModel, match="factor holds complex numbers"):
        make_engine(model=lambda *_: Fourier())


def test_a_class_that_the_model_excludes_does_no_harm_while_labels_are_not_smoothed(make_engine):
    class Excluding(Headed):
        def forward(self, x: Tensor) -> Tensor:
            logits = super().forward(x)
            return torch.cat([logits, torch.full_like(logits[:, :1], -torch.inf)], dim=1)

    engine = make_engine(model=lambda *_: Excluding(), max_epochs=3)
    expected = plain_training(engine, 3, build=Excluding)
    engine.join([trial(0), trial(1, label_smoothing=0.1)])
    curves = train(engine, 3)
    torch.testing.assert_close(losses(curves[0]), expected, rtol=1e-8, atol=0)
    assert curves[1][0].ended == "diverged"


def test_weights_drawn_from_any_generator_come_from_the_seed(make_engine):
    class Drawn(Headed):
        def __init__(self) -> None:
            super().__init__()
            scale = random.random() + np.random.rand()
            self.body.weight.data *= scale

    first, again, other = (
        make_engine(model=lambda *_: Drawn(), seed=seed).model._model.body.weight
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
