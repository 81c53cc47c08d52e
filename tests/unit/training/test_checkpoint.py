"""A trial that is stopped and goes on elsewhere is the trial that was never stopped."""

from typing import Any

import pytest
import torch

from tests.unit.training.conftest import losses, train, train_until_it_ends, trial

EPOCHS = 12
STRONG = {"weight_decay": 0.3, "dropout": 0.4, "l1_lambda": 0.02, "input_noise": 0.1}
OTHERS = [trial(1, weight_decay=1.0), trial(2, dropout=0.9, patience=2)]


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd", "rmsprop"])
def test_a_resumed_trial_has_the_curve_of_an_uninterrupted_one(make_engine, optimizer):
    settings: dict[str, Any] = {"optimizer": optimizer, "schedule": "cosine", "warmup_epochs": 2}
    whole, first, second = (make_engine(**settings) for _ in range(3))
    whole.join([trial(0, **STRONG)])
    expected = losses(train(whole, EPOCHS)[0])
    first.join([OTHERS[0], trial(0, **STRONG)])
    begun = losses(train(first, 5)[0])
    (checkpoint,) = first.checkpoint([0])
    train(first, 1)  # what comes after is none of the checkpoint's business
    second.join(OTHERS)
    train(second, 2)
    second.join([trial(0, **STRONG)], {0: checkpoint})
    curve = torch.cat([begun, losses(train(second, EPOCHS)[0])])
    assert len(curve) == EPOCHS
    torch.testing.assert_close(curve, expected, rtol=1e-8, atol=0)


def test_a_resumed_trial_still_knows_its_best_weights_and_its_patience(make_engine):
    settings = {"max_epochs": 60, "learning_rate": 0.05}
    patient = trial(0, patience=20, learning_rate=0.05)
    whole, first, second = (make_engine(**settings) for _ in range(3))
    whole.join([patient])
    curve = train_until_it_ends(whole)
    best_epoch = min(curve, key=lambda e: e.validation_loss).epoch
    first.join([patient])
    train(first, best_epoch + 5)
    second.join([patient], {0: first.checkpoint([0])[0]})
    resumed = train_until_it_ends(second)
    assert resumed[-1].epoch == curve[-1].epoch < 60
    (expected,), (result,) = whole.results([0]), second.results([0])
    assert result.best_epoch == expected.best_epoch == best_epoch
    assert result.validation_score == expected.validation_score
    assert result.test_loss == pytest.approx(expected.test_loss, rel=1e-8)


@pytest.mark.parametrize(
    "other", [{"settings": {"hidden": [8]}}, {"optimizer": "sgd"}, {"dtype": torch.float32}]
)
def test_a_checkpoint_of_another_model_or_training_is_refused(make_engine, other):
    engine, different = make_engine(), make_engine(**other)
    engine.join([trial(0)])
    with pytest.raises(ValueError, match="of another model or training"):
        different.join([trial(0)], {0: engine.checkpoint([0])[0]})
    assert different.lanes == []


def test_a_checkpoint_is_a_copy(make_engine):
    engine = make_engine()
    engine.join([trial(0)])
    (checkpoint,) = engine.checkpoint([0])
    before = {name: part.clone() for name, part in checkpoint.tensors.items()}
    train(engine, 1)
    assert all(torch.equal(checkpoint.tensors[name], part) for name, part in before.items())
