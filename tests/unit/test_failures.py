from service.scheduler.failures import Failures


def test_failures_are_in_a_row_by_number() -> None:
    failures = Failures()
    for number in (0, 5, 2):
        failures.note(number, "failed")
    assert failures.in_a_row() == 3
    assert failures.in_a_row([6, 7]) == 5
    failures.note(3, "complete")
    assert failures.in_a_row([1, 6, 7]) == 3
    failures.note(1, "pruned")
    assert failures.in_a_row() == 1
    failures.note(6, "complete")
    assert failures.in_a_row([4, 7]) == 1


def test_what_was_cancelled_or_is_open_says_nothing() -> None:
    failures = Failures()
    for number, state in enumerate(["failed", "cancelled", "waiting", "running"]):
        failures.note(number, state)
    assert failures.in_a_row() == 1
