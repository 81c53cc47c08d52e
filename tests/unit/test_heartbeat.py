import threading

from worker.heartbeat import Heartbeat


def test_it_renews_while_training_makes_progress() -> None:
    renewed = threading.Event()
    heartbeat = Heartbeat(renewed.set, 0.03, 60)
    heartbeat.start()
    while not renewed.wait(0.001):
        heartbeat.step()
    heartbeat.stop()


def test_it_does_not_renew_for_a_worker_that_hangs() -> None:
    renewals = 0
    renewed = threading.Event()

    def renew() -> None:
        nonlocal renewals
        renewals += 1
        renewed.set()

    heartbeat = Heartbeat(renew, 0.03, 60)
    heartbeat.start()
    heartbeat.step()
    assert renewed.wait(30)
    beats = threading.Event()
    assert not beats.wait(0.2)
    heartbeat.stop()
    assert renewals == 1


def test_what_happens_between_steps_is_progress_as_well() -> None:
    """To record a large network takes longer than a lease lasts."""
    renewed, gave_up, recording = threading.Event(), threading.Event(), threading.Event()
    recording.set()
    heartbeat = Heartbeat(renewed.set, 0.03, 0.2, gave_up.set, between_steps=recording.is_set)
    heartbeat.start()
    for _ in range(20):
        assert renewed.wait(30)
        renewed.clear()
    assert not gave_up.is_set()
    recording.clear()
    assert gave_up.wait(30)
    heartbeat.stop()


def test_a_renewal_that_fails_is_tried_again() -> None:
    failures = 0
    recovered = threading.Event()

    def renew() -> None:
        nonlocal failures
        failures += 1
        if failures < 3:
            raise ConnectionError("gone")
        recovered.set()

    heartbeat = Heartbeat(renew, 0.03, 60)
    heartbeat.start()
    while not recovered.wait(0.001):
        heartbeat.step()
    heartbeat.stop()


def test_it_gives_up_on_a_worker_that_hangs_for_long() -> None:
    gave_up = threading.Event()
    heartbeat = Heartbeat(lambda: None, 0.03, 0.2, gave_up.set)
    heartbeat.start()
    for _ in range(50):
        heartbeat.step()
        assert not gave_up.wait(0.01)
    assert gave_up.wait(30)
    heartbeat.stop()
