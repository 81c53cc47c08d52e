"""Stochastic weight averaging against torch's own."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

from tests.unit.training.conftest import losses, train, trial
from tests.unit.training.plain import plain_training
from worker.training import compiling
from worker.training.model import loop

EPOCHS = 8
SWA: dict[str, Any] = {"averaging": "swa", "averaging_start": 0.5, "max_epochs": EPOCHS}
STRONG = {"weight_decay": 0.3, "dropout": 0.4, "l1_lambda": 0.02, "mixup": 0.3}


class Averaging:
    """Torch's averaging of a model, from the fifth epoch of eight on."""

    def __init__(self) -> None:
        self.epoch = 0
        self.average: AveragedModel | None = None

    def __call__(self, model: nn.Module, batches: list[Tensor]) -> nn.Module:
        self.epoch += 1
        if self.epoch <= EPOCHS // 2:
            return model
        if self.average is None:
            self.average = AveragedModel(model)
        self.average.update_parameters(model)
        if self.epoch > EPOCHS // 2 + 1:  # of a single epoch the running statistics are used
            update_bn(batches, self.average)
        else:
            for own, other in zip(self.average.module.buffers(), model.buffers(), strict=True):
                own.copy_(other)
        return self.average


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_lane_is_validated_by_the_average_that_torch_would_have(make_engine, optimizer):
    engine = make_engine(optimizer=optimizer, **SWA)
    engine.join([trial(1, dropout=0.3), trial(0, weight_decay=0.1)])
    lane = losses(train(engine, EPOCHS)[0])
    averaging = Averaging()
    expected = plain_training(engine, EPOCHS, optimizer, 0.1, evaluated=averaging)
    torch.testing.assert_close(lane, expected, rtol=1e-8, atol=0)
    plain = plain_training(engine, EPOCHS, optimizer, 0.1)
    assert torch.equal(expected[:, 0], plain[:, 0])  # training goes on as if there were none
    assert (expected[EPOCHS // 2 + 1 :, 1] != plain[EPOCHS // 2 + 1 :, 1]).all()


class Frozen(nn.Sequential):
    """A batch norm that keeps the statistics that it came with, as in fine-tuning."""

    def train(self, mode: bool = True) -> "Frozen":
        super().train(mode)
        self[2].eval()
        return self


def test_what_a_frozen_norm_knows_is_not_found_anew(make_engine):
    def build(settings, shape, outputs):
        return Frozen(nn.Flatten(), nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, outputs))

    engine = make_engine(model=build, settings={}, **SWA | {"averaging_start": 0.0})
    engine.join([trial(0)])
    train(engine, 3)
    _, buffers = engine._tensors.evaluated
    assert torch.equal(buffers["2.running_mean"], torch.zeros(1, 4, dtype=torch.float64))
    assert torch.equal(buffers["2.running_var"], torch.ones(1, 4, dtype=torch.float64))


def test_the_best_weights_and_the_test_are_the_averages_of_the_best_epoch(make_engine):
    engine = make_engine(**SWA | {"averaging_start": 0.0})
    engine.join([trial(0)])
    tensors, averages, curve = engine._tensors, [], []
    for _ in range(EPOCHS):
        curve += engine.train_epoch()
        averages.append([{k: v.clone() for k, v in parts.items()} for parts in tensors.evaluated])
    (result,) = engine.results([0])
    best, buffers = averages[result.best_epoch - 1]
    assert result.best_epoch > 1
    assert result.validation_loss == curve[result.best_epoch - 1].validation_loss
    for name, kept in tensors.best_parameters.items():
        assert torch.equal(kept, best[name])
    ((loss, score),) = engine._epochs.test(best, buffers, [0], lambda: None).tolist()
    assert (result.test_loss, result.test_score) == (pytest.approx(loss), score)


def test_an_average_is_the_same_alone_in_company_resumed_and_lane_by_lane(make_engine):
    alone, company, resumed, looped = (make_engine(**SWA) for _ in range(4))
    alone.join([trial(0, **STRONG)])
    expected = losses(train(alone, EPOCHS)[0])
    company.join([trial(1)])
    train(company, 3)
    company.join([trial(0, **STRONG)])  # others average already when it does not yet
    first = losses(train(company, 6)[0])
    resumed.join([trial(5)])
    train(resumed, 1)
    resumed.join([trial(0, **STRONG)], {0: company.checkpoint([0])[0]})
    for engine in (company, resumed):
        rest = losses(train(engine, EPOCHS - 6)[0])
        torch.testing.assert_close(torch.cat([first, rest]), expected, rtol=1e-8, atol=0)
    for step in list(looped._epochs._replicas.queue):
        step._model._over_lanes = loop
    looped.join([trial(1), trial(0, **STRONG)])
    torch.testing.assert_close(losses(train(looped, EPOCHS)[0]), expected, rtol=1e-8, atol=0)


def test_what_is_averaged_counts_as_state_of_a_lane(make_engine):
    plain, averaging = make_engine(), make_engine(**SWA)
    part = averaging._initial | averaging._initial_buffers
    more = 2 * sum(tensor[0].nbytes for tensor in part.values())  # and a copy for each epoch
    assert averaging.footprint.state - plain.footprint.state == more
    averaging.join([trial(0)])
    with pytest.raises(ValueError, match="another model or training"):
        plain.join([trial(0)], {0: averaging.checkpoint([0])[0]})


@pytest.mark.slow
def test_an_average_is_the_same_compiled(make_engine, monkeypatch):
    monkeypatch.setattr(compiling, "CALLS_BEFORE_RECORDING", 2)
    plain, engine = make_engine(**SWA), make_engine(**SWA)
    plain.join([trial(0, **STRONG), trial(1)])
    expected = losses(train(plain, EPOCHS)[0])
    engine.join([trial(2), trial(3)])
    train(engine, EPOCHS - 1)
    engine.leave([2, 3])
    found = [p for p in engine._epochs.programs if p.name == "statistics" and p.recording]
    assert found
    for program in found:
        program._form = compiling.compile_recording(
            program.recording, program.examples, program.threads
        )
    engine.join([trial(0, **STRONG), trial(1)])
    torch.testing.assert_close(losses(train(engine, EPOCHS)[0]), expected, rtol=1e-8, atol=0)
