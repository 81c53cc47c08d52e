"""Rows that stay on the host: the same training, a few steps ahead."""

import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from regtune.spec import Validation
from regtune.task import Columns, Data, Storage
from tests.unit.training.conftest import losses, overlapping_blobs, train, trial
from tests.unit.training.test_architectures import convolutional, small_images
from tests.waiting import wait_until
from worker.errors import NoRoom
from worker.tasks.preparation import prepare
from worker.training import compiling, cores, residence, supply
from worker.training.cores import Brake
from worker.training.engine import Engine
from worker.training.residence import choose
from worker.training.step import gather
from worker.training.supply import STEPS_AHEAD, Streamed

CPU = torch.device("cpu")
EPOCHS = 5
STRONG = {"weight_decay": 0.3, "dropout": 0.4, "l1_lambda": 0.02, "input_noise": 0.1}
OTHERS = [trial(1, weight_decay=1.0), trial(2, dropout=0.9), trial(3, l1_lambda=0.3)]
AUGMENT = ["shift", "flip", "rotation", "erasing"]


def columns(storage: Storage) -> Data:
    """A table of two numbers and a category, some of them missing."""

    def draw(rows: int, seed: int) -> tuple[Columns, np.ndarray]:
        x, y = overlapping_blobs(rows, seed)
        x[::7, 0] = np.nan
        categories = (np.arange(rows) % 4 - 1).astype(np.int32)
        return Columns(x[:, :2], categories[:, None]), y

    return Data(*draw(76, 1), *draw(40, 2), classes=3)


def two_classes(storage: Storage) -> Data:
    (x, y), (test_x, test_y) = overlapping_blobs(76, 1), overlapping_blobs(40, 2)
    return Data(x, (y > 0).astype(np.int64), test_x, (test_y > 0).astype(np.int64), classes=2)


def numbers(storage: Storage) -> Data:
    (x, _), (test_x, _) = overlapping_blobs(76, 1), overlapping_blobs(40, 2)
    return Data(x, x[:, 0] + x[:, 1], test_x, test_x[:, 0] + test_x[:, 1], classes=None)


def on_disk(folder: Path) -> Callable[[Storage], Data]:
    """The small images, in a file that can only be read."""
    data = small_images(Storage(folder))
    np.save(folder / "x.npy", data.train_x)
    return lambda storage: Data(
        np.load(folder / "x.npy", mmap_mode="r"), data.train_y, data.test_x, data.test_y, 4
    )


IMAGES = {"model": convolutional, "batch_size": 8, "augment": AUGMENT}
CASES: dict[str, dict[str, Any]] = {
    "mlp": {},
    "averaged weights": {"averaging": "swa", "averaging_start": 0.3},
    "folds": {"validation": Validation(folds=3, repeats=2), "max_lanes": 24},
    "single precision": {"dtype": torch.float32},
    "a regression": {"data": numbers, "knobs": frozenset({"weight_decay", "dropout"})},
    "ranked": {"data": two_classes, "settings": {"hidden": [16], "score": "auroc"}},
    "ranked in folds": {
        "data": two_classes,
        "settings": {"hidden": [16], "score": "auroc"},
        "validation": Validation(folds=3),
        "max_lanes": 12,
    },
    "a table": {"data": columns},
    "folds of a table": {"data": columns, "validation": Validation(folds=3), "max_lanes": 12},
    "augmented images": {"data": small_images, **IMAGES},
    "folds of images": {
        "data": small_images,
        **IMAGES,
        "validation": Validation(folds=2),
        "max_lanes": 8,
    },
}


@pytest.fixture
def build(make_engine, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Engine]:
    def make(wish: str, *, data: Any = None, **settings: Any) -> Engine:
        if data is not None:
            monkeypatch.setattr("tests.unit.training.conftest.blobs", data)
        engine: Engine = make_engine(data_on_device=wish, **settings)
        assert str(engine.residence) == ("streamed" if wish == "never" else "resident")
        return engine

    return make


def alone(engine: Engine) -> tuple[torch.Tensor, tuple[float, float]]:
    """The curve of a trial, and what its best weights reach in the test."""
    engine.join([trial(0, **STRONG)])
    curve = losses(train(engine, EPOCHS)[0])
    (result,) = engine.results([0])
    return curve, (result.test_loss, result.test_score)


def joined_later(engine: Engine) -> tuple[torch.Tensor, tuple[float, float]]:
    """The same, where others are two epochs ahead."""
    engine.join(OTHERS)
    train(engine, 2)
    engine.leave([2])
    return alone(engine)


@pytest.mark.parametrize("case", CASES)
def test_a_trial_is_the_same_whether_its_rows_are_resident_or_streamed(build, case):
    for way in (alone, joined_later):
        resident, streamed = (way(build(wish, **CASES[case])) for wish in ("always", "never"))
        assert torch.equal(streamed[0], resident[0])
        assert streamed[1] == resident[1]


def test_streamed_trials_are_the_same_in_company_and_in_several_chunks(build, monkeypatch):
    monkeypatch.setattr(cores, "CPU_CHUNK", 2)
    by_itself, _ = alone(build("always"))
    company, _ = joined_later(build("never", threads=2))
    torch.testing.assert_close(company, by_itself, rtol=1e-8, atol=0)


@pytest.mark.parametrize(
    "case", ["mlp", "augmented images", pytest.param("folds", marks=pytest.mark.slow)]
)
def test_streamed_steps_may_be_recorded(build, monkeypatch, case):
    expected, _ = joined_later(build("always", **CASES[case]))
    monkeypatch.setattr(compiling, "CALLS_BEFORE_RECORDING", 2)
    engine = build("never", **CASES[case])
    recorded, _ = joined_later(engine)
    assert any(program.recording for program in engine.programs)
    torch.testing.assert_close(recorded, expected, rtol=1e-8, atol=0)


def test_streamed_steps_may_be_compiled(build, monkeypatch):
    monkeypatch.setattr(compiling, "CALLS_BEFORE_RECORDING", 2)
    expected, _ = alone(build("always"))
    engine = build("never")
    alone(engine)
    (step,) = (program for program in engine.programs if program.name == "step")
    assert step.recording is not None
    step._form = compiling.compile_recording(step.recording, step.examples, step.threads)
    engine.leave([0])
    torch.testing.assert_close(alone(engine)[0], expected, rtol=1e-8, atol=0)


def test_images_in_a_file_are_streamed_from_there(build, tmp_path):
    resident, _ = alone(build("always", data=small_images, **IMAGES))
    streamed, _ = alone(build("never", data=on_disk(tmp_path), **IMAGES))
    assert torch.equal(streamed, resident)


class Watched:
    """Notes what is gathered."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[int] = []
        bring = Streamed._bring

        def watched(of: Streamed, numbers: np.ndarray, room: int) -> Any:
            self.rows.append(len(numbers))
            return bring(of, numbers, room)

        monkeypatch.setattr(Streamed, "_bring", watched)


def test_lanes_that_see_the_same_rows_have_them_gathered_once(build, monkeypatch):
    engine = build("never", batch_size=1000)
    watched = Watched(monkeypatch)
    engine.join([trial(0), trial(1)])
    engine.train_epoch()
    assert watched.rows == [60, 16]  # to train on, and to validate on
    watched.rows.clear()
    engine.join([trial(2), trial(3)])
    engine.train_epoch()
    assert watched.rows == [120, 16]  # lanes at two epochs


def test_only_a_few_steps_ahead_are_gathered(build, monkeypatch):
    engine = build("never", batch_size=2)
    watched = Watched(monkeypatch)
    steps = itertools.count(1)
    most_ahead = 0

    def tick() -> None:
        nonlocal most_ahead
        most_ahead = max(most_ahead, len(watched.rows) - next(steps))

    engine.join([trial(0)])
    engine.train_epoch(tick)
    assert engine.steps_per_epoch > 2 * STEPS_AHEAD
    assert 0 < most_ahead <= STEPS_AHEAD


@pytest.mark.parametrize("bad_tick", [2, 9])
def test_an_aborted_epoch_leaves_nobody_gathering_and_nothing_behind(build, monkeypatch, bad_tick):
    """In the midst of the steps, and of the validation.

    When it is aborted, the next batch is being gathered, by the one thread there is, and is done
    only once somebody waits for it.
    """
    engine, undisturbed = (build("never", batch_size=8, threads=1) for _ in range(2))
    engine._epochs._evaluation_rows = undisturbed._epochs._evaluation_rows = 4
    ticks, begun, ended = itertools.count(1), itertools.count(1), itertools.count(1)
    waited_for = threading.Event()
    bring, wait = Streamed._bring, supply.wait
    counted = [0, 0]

    def bring_slowly(of: Streamed, numbers: np.ndarray, room: int) -> Any:
        counted[0] = number = next(begun)
        if number > bad_tick:
            waited_for.wait(10)
        brought = bring(of, numbers, room)
        counted[1] = next(ended)
        return brought

    def note_wait(futures: Any) -> Any:
        futures = list(futures)
        if futures:  # none are left where an epoch's steps have come to their end
            waited_for.set()
        return wait(futures)

    def tick() -> None:
        if next(ticks) == bad_tick:
            raise ZeroDivisionError

    assert engine.steps_per_epoch == 8
    engine.join([trial(0, **STRONG)])
    with monkeypatch.context() as patch:
        patch.setattr(Streamed, "_bring", bring_slowly)
        patch.setattr(supply, "wait", note_wait)
        with pytest.raises(ZeroDivisionError):
            engine.train_epoch(tick)
        assert counted == [bad_tick + 1, bad_tick + 1]
        assert engine._epochs._pool._work_queue.empty()
    engine.leave([0])
    assert torch.equal(alone(engine)[0], alone(undisturbed)[0])


def test_rows_that_cannot_be_read_end_the_epoch_and_the_lanes_stand_where_they_stood(
    build, monkeypatch
):
    engine, undisturbed = build("never"), build("never")
    engine.join([trial(0, **STRONG)])
    with monkeypatch.context() as patch:
        patch.setattr(supply.np, "take", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.train_epoch()
    undisturbed.join([trial(0, **STRONG)])
    both = (losses(train(each, EPOCHS)[0]) for each in (engine, undisturbed))
    assert torch.equal(*both)


def test_a_closed_engine_gives_its_threads_back(build):
    before = set(threading.enumerate())
    engine = build("never")
    engine.join([trial(0)])
    engine.train_epoch()
    started = set(threading.enumerate()) - before
    assert any(thread.name.startswith("rows") for thread in started)
    engine.close()
    wait_until(lambda: not any(thread.is_alive() for thread in started), 10)


def prepared(data: Callable[[Storage], Data] = small_images) -> Any:
    return prepare(data(Storage(Path("unused"))), Validation(), 0, torch.float32)


def with_free(monkeypatch: pytest.MonkeyPatch, free: float) -> None:
    monkeypatch.setattr(residence, "free_bytes", lambda device: free)


@pytest.fixture(params=[False, True], ids=["fast", "slow"])
def bytes_are_slow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(residence, "reads_bytes_slowly", lambda device: request.param)
    return request.param


def test_rows_are_resident_if_they_take_no_more_than_half_of_what_is_free(
    monkeypatch, bytes_are_slow
):
    row = 3 * 16 * 16 + 8  # images of bytes stay bytes
    with_free(monkeypatch, 2 * 28 * row)
    assert choose(prepared(), CPU, "auto", 1) == residence.Residence(True, 28 * row)
    assert not choose(prepared(), CPU, "never", 1).resident
    with_free(monkeypatch, 2 * 28 * row - 1)
    assert not choose(prepared(), CPU, "auto", 1).resident
    assert choose(prepared(), CPU, "always", 1).resident


def test_images_become_numbers_where_bytes_are_slow_and_there_is_plenty_of_room(monkeypatch):
    monkeypatch.setattr(residence, "reads_bytes_slowly", lambda device: True)
    needed = 28 * (3 * 16 * 16 * 4 + 8)
    with_free(monkeypatch, 10 * needed)
    assert choose(prepared(), CPU, "auto", 1) == residence.Residence(True, needed, False)
    assert choose(prepared(), CPU, "always", 1) == residence.Residence(True, needed, False)
    assert not choose(prepared(), CPU, "never", 1).resident
    with_free(monkeypatch, 10 * needed - 1)
    assert choose(prepared(), CPU, "auto", 1).keeps_bytes
    monkeypatch.setattr(residence, "reads_bytes_slowly", lambda device: False)
    with_free(monkeypatch, 1000 * needed)
    assert choose(prepared(), CPU, "auto", 1).keeps_bytes


@pytest.mark.parametrize(
    ("kind", "capability", "slow"),
    [
        ("cpu", "AVX2", True),
        ("cpu", "AVX512", False),
        ("cpu", "DEFAULT", False),
        ("cuda", "AVX2", False),
    ],
)
def test_bytes_are_slow_where_a_processor_computes_with_avx2(monkeypatch, kind, capability, slow):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert residence.reads_bytes_slowly(torch.device(kind)) == slow


def test_numbers_take_four_bytes_each_where_they_are_resident(monkeypatch):
    row = 6 * 4 + 4
    with_free(monkeypatch, 2 * 116 * row)
    assert choose(prepared(numbers), CPU, "auto", 1) == residence.Residence(True, 116 * row)


def test_images_are_kept_as_bytes_or_as_numbers_and_a_step_sees_the_same(build, bytes_are_slow):
    engine = build("always", **CASES["augmented images"])
    kept = engine._epochs._validation.rows
    finished = prepare(small_images(Storage(Path("unused"))), Validation(), 3, torch.float64).on(
        CPU, torch.channels_last
    )
    assert kept.x.dtype is (torch.float64 if bytes_are_slow else torch.uint8)
    assert kept.x.is_contiguous(memory_format=torch.channels_last)
    x, y, per_lane = gather(engine._epochs._supply.fixed, [torch.tensor([[3, 1], [0, 3]])])
    assert per_lane
    assert torch.equal(x, finished.rows.x[[3, 1, 0, 3]].view(x.shape))
    assert torch.equal(y, finished.rows.y[[3, 1, 0, 3]].view(2, 2))


def test_an_encoded_table_is_where_a_cpu_needs_it_anyway(monkeypatch):
    with_free(monkeypatch, 1)
    assert choose(prepared(columns), CPU, "auto", 8).resident


def test_what_fits_neither_way_is_refused_with_its_sizes(monkeypatch):
    with_free(monkeypatch, 20_000)
    with pytest.raises(NoRoom, match=r"21\.7 kB on cpu, which has 20\.0 kB free; .*=auto"):
        choose(prepared(), CPU, "always", 8)
    with pytest.raises(NoRoom, match=r"batches of 8 rows 123\.2 kB, but 20\.0 kB are free"):
        choose(prepared(), CPU, "auto", 8)


def test_a_step_or_a_trial_that_does_not_fit_is_refused_with_its_sizes(build, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("worker.training.engine.free_bytes", lambda device: 20_000)
        with pytest.raises(NoRoom, match=r"a trial takes .* 20\.0 kB free; take a smaller"):
            build("never")

    def too_much(*_: object) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("worker.training.engine.Engine._weigh", too_much)
    with pytest.raises(NoRoom, match=r"no room for a step of batch size 16: .*allocate 2"):
        build("auto")


def test_rows_that_do_not_fit_the_machine_are_refused(build):
    def endless(storage: Storage) -> Data:
        raise MemoryError("Unable to allocate 9 TiB")

    with pytest.raises(NoRoom, match=r"no room for the data set: .* allocate 9 TiB"):
        build("auto", data=endless)


@pytest.mark.parametrize(
    ("where", "most"), [("never", supply.BATCHES_AT_ONCE - STEPS_AHEAD - 1), ("always", 8)]
)
def test_no_more_than_a_few_launched_steps_wait_for_another(build, monkeypatch, where, most):
    """As on a device that computes a step some time after it was launched."""
    engine = build(where, batch_size=2)
    launched, done, unfinished = itertools.count(1), [0], []

    class Mark:
        def __init__(self) -> None:
            self.step = next(launched)
            unfinished.append(self.step - done[0])

        def synchronize(self) -> None:
            done[0] = self.step

    monkeypatch.setattr(Brake, "_mark", lambda self: Mark())
    engine.join([trial(0)])
    engine.train_epoch()
    assert max(unfinished[: engine.steps_per_epoch - STEPS_AHEAD]) == most + 1


def test_a_batch_takes_no_more_rows_than_there_are(build, monkeypatch):
    rows, row_bytes = 60, 6 * 8 + 8
    with_free(monkeypatch, rows * row_bytes * supply.BATCHES_AT_ONCE)
    assert build("never", batch_size=1_000_000).steps_per_epoch == 1


def test_graphs_of_lanes_that_are_no_more_are_dropped(build):
    """With what they keep, which is a batch each."""
    engine = build("never")
    engine.join([trial(0)])

    def joins() -> None:
        engine.join([trial(1)])

    def is_replaced() -> None:
        engine.leave([1])
        engine.join([trial(2)])

    def leaves() -> None:
        engine.leave([0])
        engine.close_gaps()

    for change, keeps in ((joins, False), (is_replaced, True), (leaves, False)):
        engine.train_epoch()
        programs = list(engine._epochs.programs)
        for program in programs:
            program._captured = program._place = object()
        change()
        assert programs
        assert {bool(p._captured and p._place) for p in programs} == {keeps}
        engine._epochs.programs.forget_captures()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", ["mlp", "augmented images", "folds"])
def test_on_a_gpu_a_streamed_trial_is_the_resident_one_captured_steps_included(
    build, monkeypatch, case
):
    monkeypatch.setattr(compiling, "CALLS_BEFORE_RECORDING", 2)
    monkeypatch.setattr(compiling, "CALLS_BEFORE_CAPTURING", 2)
    resident, streamed = (
        joined_later(build(wish, device="cuda", **CASES[case]))[0] for wish in ("always", "never")
    )
    torch.testing.assert_close(streamed, resident, rtol=1e-12, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_steps_are_captured_while_other_threads_bring_rows(build, monkeypatch):
    """Each batch is brought for longer than a capture takes, with CUDA called all the while."""
    monkeypatch.setattr(compiling, "CALLS_BEFORE_RECORDING", 2)
    monkeypatch.setattr(compiling, "CALLS_BEFORE_CAPTURING", 2)
    bring = Streamed._bring

    def bring_slowly(of: Streamed, numbers: np.ndarray, room: int) -> Any:
        ends = time.monotonic() + 0.3
        while time.monotonic() < ends:
            torch.empty(2**20, dtype=torch.uint8, pin_memory=True).to("cuda", non_blocking=True)
        return bring(of, numbers, room)

    monkeypatch.setattr(Streamed, "_bring", bring_slowly)
    engine = build("never", device="cuda")
    engine.join([trial(0, **STRONG)])
    for _ in range(3):
        engine.train_epoch()
    (step,) = (program for program in engine.programs if program.name == "step")
    assert step._captured is not None
