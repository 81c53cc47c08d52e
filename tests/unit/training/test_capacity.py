"""How many lanes: as many as memory and speed are good for."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.unit.training.conftest import losses, train, trial
from worker.training import capacity, epoch
from worker.training.capacity import Capacity, Footprint, Memory, measure, most

CPU = torch.device("cpu")
SMALL = 1600
"""Bytes of a lane."""


@pytest.fixture(autouse=True)
def one_lane_to_begin_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "provisional", lambda device, chunk=4: 1)
    monkeypatch.setattr(capacity, "most", lambda device, chunk=4: capacity.MOST_LANES)


def saturating_at(lanes: int) -> Callable[[int], float]:
    return lambda k: float(min(k, lanes))


def test_lanes_are_doubled_until_that_is_no_longer_faster():
    found = measure(saturating_at(16), SMALL, CPU)
    assert found.lanes == 16
    assert found.reason == "32 lanes are hardly faster"
    assert found.trial_epochs_per_second == 16
    assert found.bytes_per_lane == SMALL


def test_of_two_numbers_that_are_about_as_fast_the_smaller_is_taken():
    rates = {1: 1.0, 2: 1.9, 4: 2.0}
    assert measure(rates.__getitem__, SMALL, CPU).lanes == 2


@pytest.mark.parametrize("usual", [0.01, 3.0])
def test_a_rehearsal_does_not_count_its_first_step(monkeypatch: pytest.MonkeyPatch, usual: float):
    """In a new process torch loads for seconds what it has not needed yet."""
    now = 0.0
    monkeypatch.setattr(epoch, "perf_counter", lambda: now)
    clock = epoch._Rehearsal(CPU)
    for seconds in [5.0] + 60 * [usual]:
        assert not clock.over
        counts = now > 0
        now += seconds
        clock.note(1, count=counts)
        if clock.over:
            break
    assert clock.over
    assert clock.rate == pytest.approx(1 / usual)


@pytest.mark.parametrize(("device", "warm_up"), [("cpu", 1.0), ("cuda", 10.0)])
def test_steps_that_are_not_yet_what_they_will_be_count_after_a_while(monkeypatch, device, warm_up):
    """Before that, only such as are: a GPU's are some times as fast once they are captured."""
    now = 0.0
    monkeypatch.setattr(epoch, "perf_counter", lambda: now)
    clock = epoch._Rehearsal(torch.device(device))
    while not clock.over:
        now += 0.09
        clock.note(1, count=False)
    assert warm_up < now < warm_up + 0.5


def test_steps_that_are_taken_at_once_count_each(monkeypatch):
    now = 0.0
    monkeypatch.setattr(epoch, "perf_counter", lambda: now)
    clock = epoch._Rehearsal(CPU)
    for seconds, steps in ((0.03, 1), (0.05, 1), (0.1, 50), (0.06, 1)):
        assert not clock.over
        now += seconds
        clock.note(steps, count=True)
    assert clock.over
    assert clock.rate == pytest.approx(50 / 0.1)


def test_memory_ends_the_doubling_before_it_is_tried(monkeypatch):
    monkeypatch.setattr(capacity, "free_bytes", lambda device: 10 * SMALL / capacity.MEMORY_MARGIN)
    tried = []

    def rehearse(lanes: int) -> float:
        tried.append(lanes)
        return float(lanes)

    found = measure(rehearse, SMALL, CPU)
    assert (found.lanes, found.reason) == (8, "there is room for 10")
    assert tried == [1, 2, 4, 8]


def test_on_a_cpu_no_more_lanes_are_tried_than_its_cores_compute_at_a_time(monkeypatch):
    monkeypatch.setattr(capacity, "provisional", lambda device, chunk=4: 8)
    monkeypatch.setattr(capacity, "most", most)
    found = measure(float, SMALL, CPU)
    assert (found.lanes, found.trial_epochs_per_second) == (8, 8.0)
    assert found.reason == "8 lanes are the most that are computed at a time"
    assert most(torch.device("cuda")) > 1000


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`"),
    ],
)
def test_running_out_of_memory_ends_the_doubling_too(error):
    def rehearse(lanes: int) -> float:
        if lanes > 4:
            raise error
        return float(lanes)

    found = measure(rehearse, SMALL, CPU)
    assert (found.lanes, found.reason) == (4, "8 lanes ran out of memory")


def test_an_error_of_the_model_is_no_lack_of_memory():
    def rehearse(lanes: int) -> float:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        measure(rehearse, SMALL, CPU)


def test_lanes_are_those_of_whole_trials(monkeypatch):
    monkeypatch.setattr(capacity, "provisional", lambda device, chunk=4: 8)
    assert measure(saturating_at(1), SMALL, CPU, members=5).lanes == 10


@pytest.mark.parametrize(("members", "room", "lanes"), [(5, 6, 5), (7, 8, 7), (3, 9, 9), (9, 4, 9)])
def test_no_more_lanes_are_tried_than_there_is_room_for_whole_trials(
    monkeypatch, members, room, lanes
):
    monkeypatch.setattr(capacity, "provisional", lambda device, chunk=4: 8)
    free = room * SMALL / capacity.MEMORY_MARGIN
    monkeypatch.setattr(capacity, "free_bytes", lambda device: free + 1)
    tried = []
    measure(lambda lanes: tried.append(lanes) or 1.0, SMALL, CPU, members=members)
    assert tried == [lanes]


def test_half_the_lanes_remain_after_an_accident_and_never_none():
    assert Capacity(9, "").halved(9) == Capacity(4, "9 lanes ran out of memory")
    assert Capacity(9, "").halved(3) == Capacity(1, "3 lanes ran out of memory")
    assert Capacity(1, "").halved(1).lanes == 1


@pytest.mark.parametrize("lack", ["room", "an accident", "an accident in training"])
def test_a_lack_of_memory_is_remembered_for_a_day(tmp_path, monkeypatch, lack):
    """Another program may have held it."""

    def rehearse(lanes: int) -> float:
        if lanes > 4 and lack == "an accident":
            raise MemoryError
        return float(lanes)

    if lack == "room":
        monkeypatch.setattr(capacity, "free_bytes", lambda device: 10 * SMALL)
    short = measure(rehearse, SMALL, CPU)
    if lack == "an accident in training":
        short = short.halved(8)
    memory = Memory(tmp_path / "capacity.json")
    memory.keep(short, "here")
    memory.keep(Capacity(8, "8 lanes are hardly faster"), "there")
    assert memory.recall("here") == short
    monkeypatch.setattr(capacity, "time", lambda: time.time() + capacity.ACCIDENT_SECONDS + 1)
    assert memory.recall("here") is None
    assert memory.recall("there") == Capacity(8, "8 lanes are hardly faster")


def test_of_less_room_than_the_cores_could_use_that_is_the_reason(monkeypatch):
    monkeypatch.setattr(capacity, "provisional", lambda device, chunk=4: 64)
    monkeypatch.setattr(capacity, "most", lambda device, chunk=4: 64)
    free = 50 * SMALL / capacity.MEMORY_MARGIN
    monkeypatch.setattr(capacity, "free_bytes", lambda device: free + 1)
    found = measure(float, SMALL, CPU)
    assert (found.lanes, found.reason) == (50, "there is room for 50")


def test_what_another_version_remembered_is_measured_again(tmp_path):
    memory = Memory(tmp_path / "capacity.json")
    memory.keep(Capacity(4, ""), "here")
    stored = json.loads((tmp_path / "capacity.json").read_text())
    for entry in stored.values():
        entry["colour"] = "red"
    (tmp_path / "capacity.json").write_text(json.dumps(stored))
    assert memory.recall("here") is None


def test_what_was_measured_is_remembered_for_the_same_situation_alone(tmp_path):
    memory, found = Memory(tmp_path / "new" / "capacity.json"), Capacity(16, "why", 10, 2.5)
    assert memory.recall("gpu", "mlp") is None
    memory.keep(found, "gpu", "mlp")
    memory.keep(Capacity(4, "why"), "gpu", "cnn")
    assert Memory(tmp_path / "new" / "capacity.json").recall("gpu", "mlp") == found
    assert memory.recall("gpu", "cnn") == Capacity(4, "why")
    assert memory.recall("cpu", "mlp") is None


@pytest.mark.parametrize("content", ["", "[]", "{", "\x00"])
def test_a_broken_file_is_as_good_as_none(tmp_path: Path, content: str):
    path = tmp_path / "capacity.json"
    path.write_text(content)
    memory = Memory(path)
    assert memory.recall("gpu") is None
    memory.keep(Capacity(2, "why"), "gpu")
    assert memory.recall("gpu") == Capacity(2, "why")
    assert len(json.loads(path.read_text())) == 1


def test_an_engine_rehearses_without_touching_its_lanes(make_engine):
    plain, rehearsed = make_engine(), make_engine()
    for engine in (plain, rehearsed):
        engine.join([trial(0, dropout=0.3)])
        train(engine, 2)
    assert rehearsed.rehearse(3) > 0
    ours, theirs = (losses(train(engine, 3)[0]) for engine in (rehearsed, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=0)


def test_the_footprint_counts_weights_moments_copies_and_activations(make_engine):
    """6 inputs, 16 hidden and 3 classes, AdamW, batches of 16 rows, float64."""
    engine = make_engine(settings={"hidden": [16], "norm": "none"}, knobs=frozenset({"dropout"}))
    weights = 6 * 16 + 16 + 16 * 3 + 3
    footprint = engine.footprint
    assert footprint.held == 8 * weights * 4  # current, two moments and the best
    copies = footprint.epoch - engine._epochs.batches.bytes_of_epoch
    assert copies == 8 * weights * 3  # of all but the best


@pytest.mark.parametrize(
    ("held", "step", "device", "most"),
    [
        (400, 500, "cuda", 400 + 300 + 500),
        (400, 500, "cpu", 400 + 300 + 500 + 400),  # a checkpoint waits to be written
        (900, 500, "cuda", 900 + 900),  # lanes are copied as others join
        (900, 500, "cpu", 900 + 900 + 900),
    ],
)
def test_a_lane_takes_most_in_a_step_or_while_it_is_copied(
    held: int, step: int, device: str, most: int
):
    assert Footprint(held, 300, step).most(torch.device(device)) == most
