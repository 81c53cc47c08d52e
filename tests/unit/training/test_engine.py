"""What a trial's numbers may depend on, and what never touches them."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs
from torch import nn

from regtune.spec import Validation
from tests.unit.training.conftest import losses, train, trial
from tests.unit.training.plain import plain_training
from worker.training import compiling, cores
from worker.training import engine as engine_module
from worker.training.batches import batch_sizes
from worker.training.cores import trials_computed
from worker.training.early_stopping import replay
from worker.training.engine import Engine
from worker.training.lanes import LaneEpoch, LaneTensors
from worker.training.model import loop

STRONG = {"weight_decay": 0.3, "dropout": 0.4, "l1_lambda": 0.02}
OTHERS = [
    trial(1, weight_decay=1.0),
    trial(2, dropout=0.9, patience=2),
    trial(3, l1_lambda=0.3),
]
OPTIMIZERS = ["adam", "adamw", "sgd", "rmsprop"]
EPOCHS = 12


def of_lane(engine: Engine, names: Iterable[str], place: int = 0) -> torch.Tensor:
    """What a lane's parameters of these names hold, in one row."""
    parameters = engine._tensors.parameters
    return torch.cat([parameters[name][place].flatten() for name in names])


def alone(make_engine, **settings: Any) -> torch.Tensor:
    engine = make_engine(**settings)
    engine.join([trial(0, **STRONG)])
    return losses(train(engine, EPOCHS)[0])


@pytest.mark.parametrize("l1", ["proximal", "subgradient"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_trial_is_the_same_in_company_and_in_another_lane(make_engine, optimizer, l1):
    settings = {"optimizer": optimizer, "l1": l1, "schedule": "cosine"}
    engine = make_engine(**settings)
    engine.join([*OTHERS, trial(0, **STRONG)])
    company = losses(train(engine, EPOCHS)[0])
    torch.testing.assert_close(company, alone(make_engine, **settings), rtol=1e-8, atol=0)


@pytest.mark.parametrize("validation", [Validation(), Validation(folds=3)])
def test_a_validation_in_batches_is_one_program_and_gives_the_same(make_engine, validation):
    whole, in_batches = (make_engine(validation=validation, max_lanes=3) for _ in range(2))
    rows = whole._epochs._validation.numbers_MR.shape[1]
    in_batches._epochs._evaluation_rows = 7
    assert whole._epochs._evaluation_rows > rows
    assert rows % 3  # of three batches, the last one has to be filled up
    for engine in (whole, in_batches):
        engine.join([trial(0, **STRONG)])
    ours, expected = (losses(train(engine, 3)[0]) for engine in (in_batches, whole))
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)
    assert [p.name for p in in_batches.programs].count("measure") == 1


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_trial_is_the_same_refilled_into_a_running_stack(make_engine, optimizer):
    settings = {"optimizer": optimizer, "schedule": "cosine"}
    engine = make_engine(**settings)
    engine.join(OTHERS)
    train(engine, 5)
    engine.leave([1])
    engine.join([trial(0, **STRONG)])
    refilled = losses(train(engine, EPOCHS)[0])
    assert len(refilled) == EPOCHS
    torch.testing.assert_close(refilled, alone(make_engine, **settings), rtol=1e-8, atol=0)


def test_a_trial_is_the_same_through_the_loop_over_lanes(make_engine):
    engine = make_engine()
    for step in list(engine._epochs._replicas.queue):
        step._model._over_lanes = loop
    engine.join([OTHERS[0]])
    train(engine, 2)
    engine.join([trial(0, **STRONG)])
    looped = losses(train(engine, EPOCHS)[0])
    torch.testing.assert_close(looped, alone(make_engine), rtol=1e-8, atol=0)


def test_in_single_precision_the_first_epoch_is_the_same_to_rounding(make_engine):
    engine = make_engine(dtype=torch.float32)
    engine.join([*OTHERS, trial(0, **STRONG)])
    company = losses(train(engine, 1)[0])
    by_itself = alone(make_engine, dtype=torch.float32)[:1]
    torch.testing.assert_close(company, by_itself, rtol=1e-5, atol=0)


def test_a_trial_is_the_same_by_recorded_steps(make_engine, monkeypatch):
    as_called = alone(make_engine, schedule="cosine")
    monkeypatch.setattr(compiling, "CALLS_BEFORE_RECORDING", 2)
    engine = make_engine(schedule="cosine")
    engine.join([trial(0, **STRONG)])
    first = losses(train(engine, 3)[0])
    engine.join(OTHERS)
    curve = torch.cat([first, losses(train(engine, EPOCHS)[0])])
    assert any(program.recording for program in engine.programs)
    torch.testing.assert_close(curve, as_called, rtol=1e-8, atol=0)


@pytest.mark.parametrize("threads", [2, 3])
def test_a_trial_is_the_same_whatever_threads_compute_its_chunk(make_engine, monkeypatch, threads):
    monkeypatch.setattr(cores, "CPU_CHUNK", 2)
    engine = make_engine(threads=threads)
    engine.join([*OTHERS, trial(0, **STRONG)])
    curve = losses(train(engine, EPOCHS)[0])
    torch.testing.assert_close(curve, alone(make_engine), rtol=1e-8, atol=0)


def test_another_seed_is_another_training(make_engine):
    assert not torch.allclose(alone(make_engine, seed=3), alone(make_engine, seed=4))


def test_a_diverged_lane_ends_and_never_touches_its_neighbours(make_engine):
    settings = {"optimizer": "sgd", "learning_rate": 0.1}
    engine = make_engine(**settings)
    engine.join([trial(9, weight_decay=1e6, learning_rate=0.1), trial(0, **STRONG)])
    curves = train(engine, EPOCHS)
    assert curves[9][-1].ended == "diverged"
    assert len(curves[9]) < EPOCHS
    assert [e.ended for e in curves[0]] == [None] * (EPOCHS - 1) + ["finished"]
    torch.testing.assert_close(losses(curves[0]), alone(make_engine, **settings), rtol=1e-8, atol=0)


def test_a_trial_without_a_finite_epoch_has_no_result(make_engine):
    engine = make_engine(optimizer="sgd", learning_rate=100.0)
    engine.join([trial(9, weight_decay=1e300, learning_rate=100.0)])
    assert engine.train_epoch()[0].ended == "diverged"
    with pytest.raises(ValueError, match="no epoch with a finite validation loss"):
        engine.results([9])


def test_each_lane_stops_by_its_own_patience_as_replay_of_the_longest_says(make_engine):
    settings = {"max_epochs": 60, "learning_rate": 0.05, "min_delta": 0.01}
    engine = make_engine(**settings)
    engine.join([trial(p, patience=p) for p in (2, 5, 60)])
    curves = train(engine, 60)
    recorded = [epoch.validation_loss for epoch in curves[60]]
    assert len(recorded) == 60
    for patience in (2, 5):
        assert curves[patience][-1].ended == "early_stopped"
        assert len(curves[patience]) == replay(recorded, patience, min_delta=0.01).epoch < 60


def test_the_result_is_that_of_the_best_weights_which_were_copied_when_they_were_best(make_engine):
    settings = {"max_epochs": 60, "learning_rate": 0.05}
    engine = make_engine(**settings)
    engine.join([trial(0, patience=20), trial(1, dropout=0.5)])
    epochs = []
    while not epochs or epochs[-1].ended is None:
        epochs.append(engine.train_epoch()[0])
    (result,) = engine.results([0])
    best = min(epochs, key=lambda e: e.validation_loss)
    assert best.epoch == len(epochs) - 20
    assert result.best_epoch == best.epoch
    assert result.validation_loss == best.validation_loss < epochs[-1].validation_loss
    assert result.validation_score == best.validation_score

    stopped_there = make_engine(**settings)
    stopped_there.join([trial(0, patience=20)])
    train(stopped_there, best.epoch)
    now = stopped_there._tensors
    ((test_loss, test_score),) = stopped_there._epochs.test(
        now.parameters, now.buffers, [0], lambda: None
    ).tolist()
    assert result.test_loss == pytest.approx(test_loss, rel=1e-8)
    assert result.test_score == test_score


class Added(nn.Module):
    """Two parameters of one gradient, and one whose gradient is a single number."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.shared, self.own = (nn.Parameter(torch.randn(outputs, inputs)) for _ in range(2))
        self.offset = nn.Parameter(torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x.flatten(1), self.shared + self.own) + self.offset.sum()


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd", "rmsprop"])
@pytest.mark.parametrize("lanes", [1, 3])
def test_parameters_of_one_gradient_move_alike(make_engine, optimizer, lanes):
    engine = make_engine(
        model=lambda settings, shape, outputs: Added(6, outputs), settings={}, optimizer=optimizer
    )
    engine.join([trial(key) for key in range(lanes)])
    before = {name: part.clone() for name, part in engine._tensors.parameters.items()}
    train(engine, 2)
    moved = {name: part - before[name] for name, part in engine._tensors.parameters.items()}
    assert moved["own"].abs().min() > 0
    torch.testing.assert_close(moved["shared"], moved["own"])


def test_results_come_in_the_order_asked_for_and_change_nothing(make_engine):
    engine, twin = make_engine(), make_engine()
    for e in (engine, twin):
        e.join([trial(1), trial(2, **STRONG)])
        train(e, 4)
    first, second = engine.results([2, 1])
    assert (first.key, second.key) == (2, 1)
    (alone,) = engine.results([1])
    assert alone.test_loss == pytest.approx(second.test_loss, rel=1e-12)
    assert first.test_loss != second.test_loss
    torch.testing.assert_close(losses(train(engine, 4)[2]), losses(train(twin, 4)[2]))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_lane_is_the_plain_training_that_torch_would_do(make_engine, optimizer):
    """Also shows: decay is applied once, spares biases and norms, and stays out of the losses."""
    decay = 0.5 if optimizer == "adamw" else 0.05
    engine = make_engine(optimizer=optimizer)
    engine.join([trial(1, dropout=0.3)])
    train(engine, 2)
    engine.join([trial(0, weight_decay=decay)])
    lane = train(engine, EPOCHS)[0]
    expected = plain_training(engine, EPOCHS, optimizer, decay)
    torch.testing.assert_close(losses(lane), expected, rtol=1e-8, atol=0)


def test_a_batch_norms_scale_does_not_decay(make_engine):
    """With every weight decayed to nothing, only a bias can tell the classes' shares."""
    engine = make_engine(optimizer="adamw", learning_rate=0.5)
    engine.join([trial(0, weight_decay=2.0)])  # η·λ₂ = 1: weights are zero before every step
    engine.train_epoch()
    assert of_lane(engine, engine.model.spared).abs().max() > 0.5


def test_proximal_l1_gives_exact_zeros_and_the_subgradient_none(make_engine):
    sparsities = {}
    for l1 in ("proximal", "subgradient"):
        engine = make_engine(l1=l1)
        engine.join([trial(0), trial(1, l1_lambda=1.0)])
        free, penalized = (curve[-1].sparsity for curve in train(engine, EPOCHS).values())
        assert free == 0
        sparsities[l1] = penalized
    assert 0.2 < sparsities["proximal"] < 1
    assert sparsities["subgradient"] == 0


@pytest.mark.parametrize(("optimizer", "counted"), [("adam", True), ("adamw", False)])
def test_the_penalty_is_reported_apart_from_the_losses(make_engine, optimizer, counted):
    """A learning rate of almost zero leaves the weights, so that only the penalty can differ."""
    engine = make_engine(optimizer=optimizer)
    still = {"learning_rate": 1e-12}
    engine.join(
        [
            trial(0, **still),
            trial(1, weight_decay=10.0, **still),
            trial(2, l1_lambda=10.0, **still),
        ]
    )
    free, decayed, l1 = engine.train_epoch()
    weights = of_lane(engine, engine.model.penalized)
    assert free.penalty == 0
    assert decayed.penalty == pytest.approx(5 * float(weights.square().sum()) * counted)
    assert l1.penalty == pytest.approx(10 * float(weights.abs().sum()))
    for other in (decayed, l1):
        assert other.train_loss == pytest.approx(free.train_loss, rel=1e-6)
        assert other.validation_loss == pytest.approx(free.validation_loss, rel=1e-6)


def test_dropout_acts_on_the_training_loss_alone(make_engine):
    engine = make_engine()
    engine.join([trial(0, learning_rate=1e-12), trial(1, dropout=0.9, learning_rate=1e-12)])
    free, dropped = engine.train_epoch()
    assert dropped.train_loss != pytest.approx(free.train_loss, rel=0.01)
    assert dropped.validation_loss == pytest.approx(free.validation_loss, rel=1e-6)


def test_lanes_come_and_go_between_epochs(make_engine):
    engine = make_engine(max_lanes=3)
    assert engine.train_epoch() == []
    engine.join([trial(1), trial(2)])
    assert (engine.lanes, engine.free_slots) == ([1, 2], 1)
    engine.train_epoch()
    engine.join([trial(3)])
    assert [(e.key, e.epoch) for e in engine.train_epoch()] == [(1, 2), (2, 2), (3, 1)]
    engine.leave([1, 3])
    assert (engine.lanes, engine.free_slots) == ([2], 2)
    assert [(e.key, e.epoch) for e in engine.train_epoch()] == [(2, 3)]
    assert len(engine._tensors) == 1


def test_who_joins_takes_the_place_of_who_has_left(make_engine):
    """What was recorded, compiled and captured of lanes goes by where they lie."""
    engine = make_engine(optimizer="adam")
    engine.join([*OTHERS, trial(4)])
    train(engine, 2)

    def places() -> list[int]:
        return [part.data_ptr() for part in (*engine._tensors.named().values(), *strengths())]

    def strengths() -> list[torch.Tensor]:
        return list(engine._strengths.values())

    before, rates = places(), engine._strengths["decay"].tolist()
    engine.leave([OTHERS[0].key])
    engine.join([trial(0, **STRONG)])
    engine.train_epoch()
    assert places() == before
    assert engine._strengths["decay"].tolist() == [STRONG["weight_decay"], *rates[1:]]


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    monkeypatch.setattr(
        engine_module, "trials_computed", lambda trials, device: trials_computed(trials, cuda)
    )


def test_where_few_sizes_are_computed_lanes_that_are_idle_disturb_nobody(make_engine, monkeypatch):
    usual = make_engine(optimizer="adam", max_lanes=8)
    everybody = [trial(key, dropout=0.1 * key, weight_decay=0.01 * key) for key in range(8)]
    usual.join(everybody)
    expected = train(usual, 6)
    as_on_a_gpu(monkeypatch)
    engine = make_engine(optimizer="adam", max_lanes=8)
    engine.join(everybody)
    curves, sizes = {key: list[LaneEpoch]() for key in range(9)}, []
    for leaving in ([], [0, 3, 7], [], [1, 2], [], [4]):
        engine.leave(leaving)
        if leaving == [1, 2]:
            engine.join([trial(8, dropout=0.2, weight_decay=0.02)])
        for done in engine.train_epoch():
            curves[done.key].append(done)
        sizes.append((len(engine.lanes), len(engine._tensors)))
    assert sizes == [(8, 8), (5, 6), (5, 6), (4, 4), (4, 4), (3, 3)]
    assert engine.lanes == [8, 5, 6]
    for key, curve in curves.items():
        same = losses(expected[2 if key == 8 else key])[: len(curve)]
        torch.testing.assert_close(losses(curve), same, rtol=1e-8, atol=0)


def test_what_is_computed_in_a_gap_begins_each_epoch_anew(make_engine, monkeypatch):
    """A lane that has diverged would else be most of what two forms of a step are compared by."""
    as_on_a_gpu(monkeypatch)
    engine = make_engine(optimizer="adam")
    engine.join([trial(key) for key in range(6)])
    engine.train_epoch()
    for part in engine._tensors.named().values():
        part[2].fill_(1e9)
    engine.leave([2])
    engine.train_epoch()
    assert len(engine._tensors) == 6
    assert max(part.abs().max().item() for part in engine._tensors.named().values()) < 1e3


def test_no_more_idle_lanes_are_computed_than_there_is_memory_for(make_engine, monkeypatch):
    as_on_a_gpu(monkeypatch)
    engine = make_engine(max_lanes=12)
    engine.join([trial(key) for key in range(12)])
    engine.leave([*range(7, 12)])
    engine.max_lanes = 7  # as after a lack of memory
    engine.train_epoch()
    assert len(engine._tensors) == 7


def test_gaps_are_closed_at_once_where_their_memory_is_wanted(make_engine):
    engine = make_engine(max_lanes=4)
    engine.join([trial(1), trial(2), trial(3)])
    engine.leave([1, 2])
    assert len(engine._tensors) == 3
    engine.close_gaps()
    assert len(engine._tensors) == 1
    engine.leave([3])
    engine.close_gaps()
    assert (len(engine._tensors), engine.train_epoch(), engine.free_slots) == (0, [], 4)
    engine.join([trial(4)])
    assert [done.epoch for done in engine.train_epoch()] == [1]


def test_what_cannot_join_leave_or_go_on_is_refused(make_engine):
    engine = make_engine(max_lanes=2, max_epochs=1)
    engine.join([trial(1)])
    with pytest.raises(ValueError, match="room for 1"):
        engine.join([trial(2), trial(3)])
    with pytest.raises(ValueError, match="only once"):
        engine.join([trial(1)])
    with pytest.raises(KeyError):
        engine.leave([7])
    with pytest.raises(KeyError):
        engine.results([7])
    assert engine.train_epoch()[0].ended == "finished"
    with pytest.raises(ValueError, match="must leave"):
        engine.train_epoch()


def test_progress_is_called_for_every_step_and_may_abort(make_engine):
    engine = make_engine()
    engine.join([trial(1)])
    calls = []
    engine.train_epoch(lambda: calls.append(1))
    assert len(calls) == engine.steps_per_epoch + 1  # one batch of validation

    class LeaseLost(Exception):
        pass

    def abort() -> None:
        raise LeaseLost

    with pytest.raises(LeaseLost):
        engine.train_epoch(abort)


@pytest.mark.parametrize(
    ("rows", "batch_size", "sizes"),
    [
        (10, 5, [5, 5]),
        (11, 5, [4, 4, 3]),
        (3, 8, [3]),
        (3, 2, [3]),  # a batch of one row has no variance for batch norm
        (5, 2, [3, 2]),
        (3, 1, [1, 1, 1]),
        (1, 4, [1]),
    ],
)
def test_an_epoch_sees_every_row_in_batches_of_even_size(rows, batch_size, sizes):
    assert batch_sizes(rows, batch_size) == sizes


@pytest.mark.parametrize(
    "knob",
    [
        "label_smoothing",
        "input_noise",
        "weight_noise",
        "max_norm",
        "max_gradient_norm",
        "input_dropout",
        "mixup",
    ],
)
def test_a_trial_of_a_knob_is_the_same_alone_in_company_and_refilled(make_engine, knob):
    strong = trial(0, **{knob: 0.2})
    engine, by_itself, refilled, plain = (make_engine() for _ in range(4))
    engine.join([trial(1), strong])
    company = losses(train(engine, EPOCHS)[0])
    by_itself.join([strong])
    expected = losses(train(by_itself, EPOCHS)[0])
    torch.testing.assert_close(company, expected, rtol=1e-8, atol=0)
    refilled.join([trial(1)])
    train(refilled, 3)
    refilled.join([strong])
    torch.testing.assert_close(losses(train(refilled, EPOCHS)[0]), expected, rtol=1e-8, atol=0)
    plain.join([trial(0)])
    assert not torch.allclose(losses(train(plain, EPOCHS)[0]), expected)


def test_lanes_may_have_learning_rates_of_their_own(make_engine):
    engine, faster = make_engine(schedule="cosine"), make_engine(schedule="cosine")
    engine.join([trial(1, learning_rate=0.03), trial(0, **STRONG)])
    curves = train(engine, EPOCHS)
    by_itself = alone(make_engine, schedule="cosine")
    torch.testing.assert_close(losses(curves[0]), by_itself, rtol=1e-8, atol=0)
    faster.join([trial(1, learning_rate=0.03)])
    by_itself = losses(train(faster, EPOCHS)[1])
    torch.testing.assert_close(losses(curves[1]), by_itself, rtol=1e-8, atol=0)
    assert not torch.allclose(losses(curves[0]), losses(curves[1]))


def test_a_knob_that_no_trial_of_the_study_uses_changes_nothing_by_its_absence(make_engine):
    curves = []
    for knobs in (engine_module.KNOBS, frozenset({"dropout"})):
        engine = make_engine(knobs=knobs)
        engine.join([trial(0, dropout=0.3)])
        curves.append(losses(train(engine, EPOCHS)[0]))
    torch.testing.assert_close(*curves, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("penalized", "scale"), [("weights", 1.0), ("all", 0.0)])
def test_a_study_may_penalize_all_parameters(make_engine, penalized, scale):
    """η·λ₂ = 1 takes everything on which decay acts to nothing before every step."""
    engine = make_engine(penalized=penalized, batch_size=1000)
    engine.join([trial(0, weight_decay=100.0)])
    engine.train_epoch()
    every = engine.model.penalized + engine.model.spared
    batch_norm = of_lane(engine, every).max()  # everything else is near zero
    assert batch_norm == pytest.approx(scale, abs=0.02)


def test_an_exception_of_one_chunk_is_raised_after_the_others_have_ended(make_engine, monkeypatch):
    monkeypatch.setattr(cores, "CPU_CHUNK", 1)
    engine = make_engine(threads=2)
    engine.join([trial(0), trial(1)])
    calls = itertools.count(1)

    def raise_once() -> None:
        if next(calls) == 3:
            raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        engine.train_epoch(raise_once)
    assert next(calls) > engine.steps_per_epoch + 2


def test_an_epoch_that_raises_has_never_been(make_engine):
    """In the midst of its steps and of its validation; nothing of it is left in the numbers."""
    engine, undisturbed = make_engine(optimizer="adam"), make_engine(optimizer="adam")
    curve = []
    for bad_tick in (2, engine.steps_per_epoch + 1, 1):
        if not engine.lanes:
            engine.join([trial(0, **STRONG), trial(1)])
        ticks = itertools.count(1)

        def tick(ticks: Iterator[int] = ticks, bad_tick: int = bad_tick) -> None:
            if next(ticks) == bad_tick:
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            engine.train_epoch(tick)
        curve.append(engine.train_epoch()[0])
    undisturbed.join([trial(0, **STRONG), trial(1)])
    expected = [undisturbed.train_epoch()[0] for _ in range(3)]
    assert torch.equal(losses(curve), losses(expected))
    assert [epoch.epoch for epoch in curve] == [1, 2, 3]


@pytest.mark.parametrize("lacking", ["strengths_of", "keep_best_"])
def test_what_lacks_memory_between_epochs_has_changed_nothing(make_engine, monkeypatch, lacking):
    """Of who joins and who leaves, and of the close of an epoch."""
    engine, undisturbed = make_engine(optimizer="adam"), make_engine(optimizer="adam")
    for each in (engine, undisturbed):
        each.join([trial(0, **STRONG), trial(1)])
        each.train_epoch()

    def too_much(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        owner = engine_module if lacking == "strengths_of" else LaneTensors
        patch.setattr(owner, lacking, too_much)
        if lacking == "strengths_of":
            with pytest.raises(torch.OutOfMemoryError):
                engine.join([trial(2)])
            assert engine.lanes == [0, 1]
            for each in (engine, undisturbed):
                each.leave([1])
            with pytest.raises(torch.OutOfMemoryError):
                engine.close_gaps()
            with pytest.raises(torch.OutOfMemoryError):
                engine.join([trial(2)])
        else:
            with pytest.raises(torch.OutOfMemoryError):
                engine.train_epoch()
    assert engine.lanes == undisturbed.lanes
    for _ in range(2):
        curve, expected = engine.train_epoch(), undisturbed.train_epoch()
        assert torch.equal(losses(curve), losses(expected))
        assert [epoch.epoch for epoch in curve] == [epoch.epoch for epoch in expected]


def test_an_epoch_counts_whatever_becomes_of_what_is_recorded_after_it(make_engine, monkeypatch):
    engine = make_engine(threads=2, max_lanes=5)
    monkeypatch.setattr(engine._epochs.programs, "_compiles", True)
    monkeypatch.setattr(engine._epochs.programs, "_submit", lambda program: None)
    engine.expect(1000, 1.0)
    engine.join([trial(0)])

    def too_much(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engine._epochs._cores, "run_one", too_much)
    with capture_logs() as logs:
        assert [engine.train_epoch()[0].epoch for _ in range(2)] == [1, 2]
    assert [log["event"] for log in logs if log["log_level"] == "warning"] == ["not_recorded"]
