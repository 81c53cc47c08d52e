"""A trial with folds and repeats: several lanes, of which it is the mean."""

import pytest
import torch

from regtune.spec import Validation
from tests.unit.training.conftest import Curves, losses, train, trial
from worker.training.batches import Place
from worker.training.engine import Engine

EPOCHS = 8
STRONG = {"weight_decay": 0.3, "dropout": 0.4, "l1_lambda": 0.02, "input_noise": 0.1}
CROSS_VALIDATION = Validation(folds=3, repeats=2)
MEMBERS = 6


def only(engine: Engine, member: int) -> Engine:
    """Make an engine of all members one of a single one."""
    engine._members = 1
    engine._initial, engine._initial_buffers = (
        {name: part[member : member + 1] for name, part in parts.items()}
        for parts in (engine._initial, engine._initial_buffers)
    )
    engine._tensors = engine._starting_tensors(0)
    train_any = engine._epochs.train

    def train_member(tensors, strengths, rates, places, tick, **options):
        own = [Place(member, place.epoch) for place in places]
        return train_any(tensors, strengths, rates, own, tick, **options)

    engine._epochs.train = train_member
    return engine


def curves_of_members(make_engine) -> torch.Tensor:
    curves = []
    for member in range(MEMBERS):
        engine = only(make_engine(validation=CROSS_VALIDATION), member)
        engine.join([trial(0, **STRONG)])
        curves.append(losses(train(engine, EPOCHS)[0]))
    return torch.stack(curves)


def test_a_trial_is_the_mean_of_its_members_each_trained_alone(make_engine):
    engine = make_engine(validation=CROSS_VALIDATION, max_lanes=12, max_epochs=EPOCHS)
    engine.join([trial(1), trial(0, **STRONG)])
    curves: Curves = {}
    for _ in range(EPOCHS):
        for epoch in engine.train_epoch():
            curves.setdefault(epoch.key, []).append(epoch)
    together, members = losses(curves[0]), curves_of_members(make_engine)
    assert len({tuple(curve.flatten().tolist()) for curve in members}) == MEMBERS
    torch.testing.assert_close(together, members.mean(0), rtol=1e-8, atol=0)
    (result,) = engine.results([0])
    best = int(together[:, 1].argmin())
    assert result.best_epoch == best + 1
    assert result.validation_loss == pytest.approx(float(together[best, 1]))
    assert result.validation_loss_spread == pytest.approx(float(members[:, best, 1].std()))


def test_a_trial_without_folds_has_no_spread(make_engine):
    engine = make_engine()
    engine.join([trial(0)])
    engine.train_epoch()
    assert engine.results([0])[0].validation_loss_spread is None


def test_a_trial_of_several_lanes_leaves_and_resumes_whole(make_engine):
    settings = {"validation": CROSS_VALIDATION, "max_lanes": 18}
    engine, other = make_engine(**settings), make_engine(**settings)
    assert (engine.members, engine.free_slots) == (MEMBERS, 3)
    engine.join([trial(1), trial(0, **STRONG)])
    train(engine, 3)
    engine.leave([1])
    (checkpoint,) = engine.checkpoint([0])
    other.join([trial(0, **STRONG)], {0: checkpoint})
    stayed, resumed = (losses(train(e, EPOCHS)[0]) for e in (engine, other))
    assert len(stayed) == EPOCHS
    torch.testing.assert_close(stayed, resumed, rtol=1e-8, atol=0)


def test_a_trial_of_more_members_than_lanes_still_finds_room(make_engine):
    engine = make_engine(validation=CROSS_VALIDATION, max_lanes=4)
    assert engine.free_slots == 1
    engine.join([trial(0)])
    assert engine.free_slots == 0


def test_folds_whose_sizes_differ_take_steps_of_the_same_size(make_engine):
    """76 rows in three folds: two train on 51 rows and one on 50, of which all see 50."""
    engine = make_engine(validation=Validation(folds=3))
    assert engine.training_rows == 50
    engine.join([trial(0)])
    assert engine.train_epoch()[0].validation_loss > 0
