"""Studies that a worker leaves to others."""

from worker.refusals import FIRST_SECONDS, MOST_SECONDS, Refusals


def test_a_study_is_refused_for_good_or_until_its_time_has_come() -> None:
    now = 0.0
    refused = Refusals(lambda: now)
    refused.add(1)
    assert refused.postpone(2) == FIRST_SECONDS
    assert (list(refused), len(refused), 2 in refused) == ([1, 2], 2, True)
    now = FIRST_SECONDS
    assert (list(refused), len(refused), 2 in refused) == ([1], 1, False)
    assert (refused.postponed(1), refused.postponed(2)) == (False, True)


def test_what_was_refused_for_one_shape_is_forgotten_when_that_is_trained() -> None:
    refused = Refusals()
    refused.postpone(2, "wide")
    assert (refused.postponed(2, "wide"), refused.postponed(2, "deep")) == (True, False)
    refused.forget(2, "wide")
    assert not refused.postponed(2, "wide")
    assert refused.postpone(2, "deep") == FIRST_SECONDS


def test_each_time_the_wait_is_twice_as_long_up_to_a_limit() -> None:
    refused = Refusals()
    waits = [refused.postpone(2) for _ in range(8)]
    assert waits[:4] == [FIRST_SECONDS * factor for factor in (1, 2, 4, 8)]
    assert waits[-1] == MOST_SECONDS
