from math import inf, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.training.early_stopping import EarlyStopping, replay

curves = st.lists(st.floats(0, 10) | st.just(nan) | st.just(inf), min_size=1, max_size=40)
patiences = st.integers(1, 12)
min_deltas = st.sampled_from([0.0, 0.01, 1.0])


def test_it_stops_after_patience_epochs_in_a_row_without_improvement():
    state = replay([3, 2, 2.5, 1, 1.1, 1.2, 1.3, 0.1], patience=3, min_delta=0)
    assert (state.epoch, state.best_epoch, state.best_loss) == (7, 4, 1)


def test_an_improvement_of_min_delta_is_not_enough():
    assert replay([1.0, 0.5], patience=9, min_delta=0.5).best_epoch == 1
    assert replay([1.0, 0.49], patience=9, min_delta=0.5).best_epoch == 2


def test_small_improvements_add_up():
    assert replay([1.0, 0.8, 0.6, 0.4], patience=9, min_delta=0.5).best_epoch == 4


def test_a_loss_that_is_no_number_never_improves():
    state = replay([nan, inf, nan], patience=3, min_delta=0)
    assert state.stops
    assert not state.improved
    assert state.best_epoch == 0


@given(curves, patiences, patiences, min_deltas)
def test_replay_of_a_recorded_curve_is_what_training_with_less_patience_would_have_done(
    curve, recorded_with, smaller_by, min_delta
):
    """A recorded curve ends where its own patience ran out."""
    recorded = curve[: replay(curve, recorded_with, min_delta).epoch]
    smaller = max(1, recorded_with - smaller_by)
    assert replay(recorded, smaller, min_delta) == replay(curve, smaller, min_delta)


@given(curves, patiences, min_deltas)
def test_the_best_epoch_is_never_further_back_than_patience(curve, patience, min_delta):
    state = EarlyStopping(patience, min_delta)
    for loss in curve:
        if state.stops:
            break
        state = state.observe(loss)
        assert state.epoch - state.best_epoch <= patience


@given(curves, patiences)
def test_the_best_loss_is_the_smallest_seen(curve, patience):
    state = replay(curve, patience, min_delta=0)
    seen = [loss for loss in curve[: state.epoch] if loss == loss]
    assert state.best_loss == min(seen, default=inf)
    if state.best_epoch:
        assert curve[state.best_epoch - 1] == state.best_loss


@pytest.mark.parametrize("patience", [1, 2, 5])
def test_a_curve_that_never_improves_after_its_first_epoch_stops_after_patience(patience):
    assert replay([1.0] * 20, patience, min_delta=0).epoch == 1 + patience
