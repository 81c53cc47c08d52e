import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from regtune.space import Choices, LimitChoices, LimitRange, Range


def test_a_range_with_a_zero_is_one_decade_longer_to_the_sampler() -> None:
    parameter = Range[float](low=1e-4, high=3, log=True, or_zero=True)
    assert parameter.distribution() == FloatDistribution(1e-5, 3, log=True)


@given(st.floats(1e-5, 3))
def test_what_falls_below_low_is_trained_as_exactly_zero(suggested: float) -> None:
    parameter = Range[float](low=1e-4, high=3, log=True, or_zero=True)
    used = parameter.used(suggested)
    assert used == (suggested if suggested >= 1e-4 else 0.0)


@given(st.floats(1e-4, 3))
def test_without_a_zero_what_is_suggested_is_used(suggested: float) -> None:
    parameter = Range[float](low=1e-4, high=3, log=True)
    assert parameter.used(suggested) == suggested
    assert parameter.distribution() == FloatDistribution(1e-4, 3, log=True)


def test_whole_numbers_stay_whole() -> None:
    parameter = Range[int](low=5, high=25)
    assert parameter.distribution() == IntDistribution(5, 25)
    assert isinstance(parameter.nearest(10), int)


@pytest.mark.parametrize(
    ("value", "nearest"), [(0.0, 1e-5), (1e-9, 1e-4), (0.01, 0.01), (99.0, 3.0)]
)
def test_the_nearest_value_to_zero_is_zero_where_there_is_one(value: float, nearest: float) -> None:
    assert Range[float](low=1e-4, high=3, log=True, or_zero=True).nearest(value) == nearest


def test_choices_are_a_category_to_the_sampler() -> None:
    parameter = Choices[float]((0.5, 0.0, 0.2))
    assert parameter.distribution() == CategoricalDistribution((0.5, 0.0, 0.2))
    assert (parameter.lowest(), parameter.highest(), parameter.nearest(0.3)) == (0.0, 0.5, 0.2)


@given(st.floats(1.0, 40.0))
def test_what_lies_above_a_limits_range_is_no_limit(suggested: float) -> None:
    parameter = LimitRange(low=1.0, high=4.0, log=True, or_zero=True)
    assert parameter.distribution() == FloatDistribution(1.0, 40.0, log=True)
    assert parameter.used(suggested) == (suggested if suggested <= 4 else 0.0)


def test_a_limit_does_the_least_where_there_is_none() -> None:
    parameter = LimitRange(low=1.0, high=4.0, log=True, or_zero=True)
    assert (parameter.lowest(), parameter.highest(), parameter.nearest(0)) == (40.0, 1.0, 40.0)
    assert (parameter.nearest(3.0), parameter.nearest(9.0)) == (3.0, 4.0)
    without = LimitRange(low=1.0, high=4.0)
    assert (without.lowest(), without.highest(), without.nearest(0)) == (4.0, 1.0, 4.0)
    choices = LimitChoices((2.0, 0.0, 1.0))
    assert (choices.lowest(), choices.highest(), choices.nearest(0)) == (0.0, 1.0, 0.0)
    assert (LimitChoices((2.0, 1.0)).lowest(), LimitChoices((2.0, 1.0)).nearest(0)) == (2.0, 2.0)
