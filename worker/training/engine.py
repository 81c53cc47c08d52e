"""The engine: trains the trials of one study together, each in lanes of its own.

Lanes run in step within an epoch and come and go between epochs, so each may be at another epoch.
A trial's numbers depend on its own strengths and on the seed alone, never on its neighbours, its
place or when it joined.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from time import perf_counter
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from regtune.errors import InvalidData
from regtune.spec import STRENGTHS, AnyTask, NamedTask, Training, Validation
from regtune.task import (
    Data,
    Pair,
    Storage,
    Task,
    find_dataset,
    find_model,
    find_task,
    make_task,
)
from worker.errors import NoRoom, NoRoomForModel
from worker.tasks.preparation import Prepared, prepare
from worker.training.batches import Place
from worker.training.capacity import Footprint, free_bytes, readable
from worker.training.checkpoint import Checkpoint
from worker.training.compiling import Program, first_line, nothing_compiles
from worker.training.cores import chunk_for, synchronize, trials_computed
from worker.training.epoch import Epochs, Tick
from worker.training.lanes import (
    Ended,
    Lane,
    LaneEpoch,
    LaneResult,
    LaneTensors,
    LaneTrial,
    strengths_of,
)
from worker.training.layout import (
    arrange_weights,
    memory_format_of_rows,
    stacked,
)
from worker.training.memory import is_out_of_memory
from worker.training.model import LaneModel, UnsupportedModel
from worker.training.noise import initial_weights, member_seed
from worker.training.objective import (
    LossOfRows,
    Objective,
    RankScore,
    classification,
    mean_score,
    regression,
)
from worker.training.optimizers import find_optimizer
from worker.training.residence import OnDevice, choose

SAMPLE_ROWS = 4
"""Rows on which a model is tried out before it trains."""

WEIGHED_LANES = 2
"""Lanes that take a step to see how much memory that needs: the fewest that make a batch."""

KNOBS = frozenset(STRENGTHS) - {"learning_rate", "patience"}
"""The strengths that a study may leave out, so that no lane spends time on them."""


AnyLane = TypeVar("AnyLane", Lane, Lane | None)


class DeviceLost(Exception):
    """The device answers no more, as after an illegal access; only a new process can use it."""


def load_task(task: AnyTask, configured: Mapping[str, str]) -> Task:
    """Import what a study wants trained; raise NotFound, or InvalidSpec for wrong settings."""
    if isinstance(task, NamedTask):
        return make_task(find_task(task.name, configured), task.settings)
    return Pair(find_dataset(task.dataset), task.data, find_model(task.model), task.settings)


class Engine:
    """Trains lanes of one study, epoch by epoch.

    An epoch is trained whole or not at all: after an exception out of ``train_epoch`` (its ``tick``
    may raise to abort) the lanes stand where they stood before it, and may leave or go on.
    """

    def __init__(
        self,
        *,
        task: AnyTask,
        training: Training,
        validation: Validation,
        storage: Storage,
        device: torch.device,
        max_lanes: int,
        own_tasks: Mapping[str, str] | None = None,
        knobs: Collection[str] = KNOBS,
        dtype: torch.dtype = torch.float32,
        threads: int | None = None,
        compiles: bool = True,
        data_on_device: OnDevice = "auto",
    ) -> None:
        """Load the data, build the model and try it on a few rows; no lane trains yet.

        ``own_tasks`` are those that the worker's configuration names: ``package.module:Class``, by
        name. ``knobs`` are the strengths that any trial of the study may use. ``threads`` is how
        many CPU cores to use, by default torch's own number; ``compiles`` says whether a step that
        is used for long may be compiled; ``data_on_device`` whether rows are kept on the device, or
        streamed to it, ``auto`` being if they fit.

        Raises NotFound for an unknown task, data set or model, InvalidSpec for wrong settings of a
        task, UnsupportedModel for a model whose noise is its own, InvalidData for data that cannot
        be trained on as the study wants, NoRoom where there is no room for them, and whatever
        loading or building raises.
        """
        own = load_task(task, own_tasks or {})
        own_loss = getattr(own, "loss", None)
        with _no_room_for("the data set", torch.device("cpu")):
            data = own.data(storage)
            prepared = prepare(
                data, validation, training.seed, dtype, own_loss=own_loss is not None
            )
        most_rows = max(len(split.training) for split in prepared.splits)
        batch_rows = min(training.batch_size, most_rows)
        self.residence = choose(prepared, device, data_on_device, batch_rows)
        self.data_hash = data.content_hash()
        self._members = len(prepared.splits)
        self._training = training
        self._device = device
        self._dtype = dtype
        self._optimizer = find_optimizer(training)
        _set_precision(training, device)
        with nothing_compiles():  # else the weights might be drawn from another state
            models = _build_members(own, prepared, training.seed, dtype)
            for model in models:
                arrange_weights(model, prepared.rows.input_shape, device)
            sample = prepared.rows.first(SAMPLE_ROWS)
            self.model = LaneModel(
                models[0],
                sample.on(torch.device("cpu")),
                _objective(task, own, data, prepared, knobs),
                penalize=training.penalized,
                knobs=knobs,
                augment=_augmentations(training, prepared),
                autocast=torch.bfloat16 if training.precision == "bf16" else None,
            ).to(device)
            if device.type != "cpu":
                self.model.try_again(sample.on(device))
        self._initial = _stacked([self.model.parameters_of(m) for m in models], device)
        self._initial_buffers = _stacked([self.model.buffers_of(m) for m in models], device)
        self.chunk = chunk_for(sum(part_M[0].nbytes for part_M in self._initial.values()))
        memory_format = memory_format_of_rows(models[0], prepared.rows.input_shape, device)
        with _no_room_for("all rows at once", device):
            resident, keep_bytes = self.residence.resident, self.residence.keeps_bytes
            placed = (
                prepared.on(device, memory_format, keep_bytes=keep_bytes) if resident else prepared
            )
        self._epochs = Epochs(
            placed,
            self.model,
            self._optimizer,
            training,
            resident=resident,
            knobs=knobs,
            threads=threads or torch.get_num_threads(),
            chunk=self.chunk,
            compiles=compiles,
            memory_format=memory_format,
        )
        self.max_lanes = max_lanes
        with _no_room_for(f"a step of batch size {training.batch_size}", device, NoRoomForModel):
            self._footprint = self._weigh()
        _check_room(self.bytes_per_lane * self._members, device)
        self._stack: list[Lane | None] = []
        self._tensors = self._starting_tensors(0)
        self._epochs_start: dict[str, Tensor] | None = None
        self._strengths = strengths_of([], device, dtype)

    @property
    def lanes(self) -> list[int]:
        """The keys of the trials in the stack."""
        return [lane.key for lane in self._present]

    @property
    def members(self) -> int:
        """How many lanes a trial takes."""
        return self._members

    @property
    def slots(self) -> int:
        """How many trials it trains at once; at least one, however many lanes that takes."""
        return max(1, self.max_lanes // self._members)

    @property
    def free_slots(self) -> int:
        """How many more trials may join."""
        return self.slots - len(self._present)

    @property
    def steps_per_epoch(self) -> int:
        """How many optimizer steps an epoch takes."""
        return len(self._epochs.batches.sizes)

    @property
    def training_rows(self) -> int:
        """How many rows a lane sees in an epoch."""
        return self._epochs.batches.rows

    @property
    def parameters(self) -> int:
        """How many parameters a lane has."""
        return sum(part_M[0].numel() for part_M in self._initial.values())

    @property
    def score(self) -> str:
        """The name of the score beside the loss."""
        return self.model.objective.score.name

    @property
    def ended(self) -> dict[int, Ended]:
        """Why trials train no more that are still in the stack, by key."""
        return {lane.key: lane.ended for lane in self._present if lane.ended}

    def epochs_left(self) -> dict[int, int]:
        """Return the fewest epochs after which each trial may end of itself, by key."""
        return {
            lane.key: min(self._training.max_epochs - lane.epoch, lane.stopping.epochs_left)
            for lane in self._present
        }

    def join(
        self, trials: Sequence[LaneTrial], checkpoints: Mapping[int, Checkpoint] | None = None
    ) -> None:
        """Let trials start with the next epoch, at their own first one or where they were left.

        ``checkpoints`` are by key. Raises ValueError when there are more of them than free slots, a
        key is in use, or a checkpoint is of another model or training. Whatever it raises, nobody
        has joined.
        """
        if len(trials) > self.free_slots:
            raise ValueError(
                f"{len(trials)} trials want to join, there is room for {self.free_slots}"
            )
        keys = self.lanes + [trial.key for trial in trials]
        if len(set(keys)) < len(keys):
            raise ValueError(f"each key may stand in the stack only once: {keys}")
        if not trials:
            return
        gaps = [place for place, lane in enumerate(self._stack) if lane is None]
        more = max(0, len(trials) - len(gaps))
        places = [*gaps, *range(len(self._stack), len(self._stack) + more)]
        stack, tensors = [*self._stack, *([None] * more)], self._tensors
        if more:
            self._drop_copies()
            tensors = tensors.join(self._starting_tensors(more))
        for place, trial in zip(places, trials, strict=False):
            stack[place] = lane = Lane.starting(trial, self._training.min_delta)
            own = tensors.slice(self._span(place))
            if checkpoints and lane.key in checkpoints:
                checkpoints[lane.key].restore(lane, own)
                lane.end_if_over(self._training.max_epochs)
            elif place < len(self._stack):
                own.restart_(self._initial, self._initial_buffers)
        self._take_over(tensors, stack)

    def leave(self, keys: Sequence[int]) -> None:
        """Take trials out; raises KeyError for a key that is not in the stack.

        What is neither ended nor checkpointed is lost. It takes no memory, and frees none before
        the next epoch: the gaps are for those who join, so that what lanes hold stays where it is,
        and what was recorded and captured of it with it. Those that are left are closed then.
        """
        leaving = set(self._places(keys))
        self._stack = [None if place in leaving else lane for place, lane in enumerate(self._stack)]

    def close_gaps(self) -> None:
        """Let go of lanes that nobody is in, but for so few that their number is of use anyway.

        Every epoch begins with it. Memory may be short for the copies of those that stay; whatever
        it raises, all is as it was.
        """
        present = [place for place, lane in enumerate(self._stack) if lane]
        gaps = [place for place, lane in enumerate(self._stack) if lane is None]
        most = max(len(present), self.slots)
        idle = min(trials_computed(len(present), self._device), most) - len(present)
        if idle >= len(gaps):
            return
        self._drop_copies()
        kept = sorted([*present, *gaps[:idle]])
        tensors = self._tensors.select(self._lanes_at(kept))
        self._take_over(tensors, [self._stack[place] for place in kept])

    def checkpoint(self, keys: Sequence[int]) -> list[Checkpoint]:
        """Return all that these trials need to go on elsewhere as if nothing had happened.

        In the order of ``keys``. Raises KeyError for a key that is not in the stack.
        """
        places = self._places(keys)
        # A GPU is waited for once a tensor, not once a tensor of each lane.
        all_at_once = 2 * len(places) >= len(self._stack)
        tensors = self._tensors.on_host() if all_at_once else self._tensors
        return [
            Checkpoint.of(self._lane_at(place), tensors.slice(self._span(place)))
            for place in places
        ]

    def fits(self, checkpoint: Checkpoint) -> bool:
        """Say whether a checkpoint is of this model and this training; takes no memory."""
        return checkpoint.fits(self._starting_tensors(1, torch.device("meta")))

    def train_epoch(self, tick: Tick = lambda: None, *, trying: bool = True) -> list[LaneEpoch]:
        """Train every trial for one epoch of its own and validate it; in the order of ``lanes``.

        ``tick`` is called after every batch of the validation and every step, or after those that
        are taken at once, see ``repeating``; from any thread.
        ``trying`` says whether so many epochs are to come that it pays to find out if more threads
        for a chunk of lanes are faster, which costs some of them.
        Raises ValueError while a trial that has ended is still in the stack, DeviceLost when not
        even the lanes' former state can be had back from the device.
        """
        if self.ended:
            raise ValueError("lanes that have ended must leave before the next epoch")
        started = perf_counter()
        self.close_gaps()
        if not self._stack:
            return []
        self._restart_gaps()
        computed = self._computed(self._stack)
        with self._whole_or_not_at_all():
            measured_K5 = self._epochs.train(
                self._tensors,
                self._strengths,
                np.array([trial.learning_rate for trial in self._trial_of_each_lane(computed)]),
                [Place(m, lane.epoch + 1) for lane in computed for m in range(self._members)],
                tick,
                trying=trying,
            )
            measured_TM5 = measured_K5.cpu().double().view(len(computed), self._members, 5)
            seconds = perf_counter() - started
            epochs = self._close_epoch(measured_TM5, seconds)
        self._epochs.ended(seconds, max(self.epochs_left().values()))
        return epochs

    def results(self, keys: Sequence[int], tick: Tick = lambda: None) -> list[LaneResult]:
        """Return what these trials reached at their best weights, tested once; in this order.

        ``tick`` is called after every batch, from any thread. Raises KeyError for a key that is not
        in the stack, ValueError for a trial without an epoch of finite validation loss, DeviceLost
        when the device answers no more.
        """
        places = self._places(keys)
        members = list(range(self._members)) * len(places)
        try:
            parameters, buffers = self._tensors.best_of(self._lanes_at(places))
            tested_K2 = self._epochs.test(parameters, buffers, members, tick).cpu()
        except Exception as error:
            check_device(self._device, error)
            raise
        tested = tested_K2.view(len(places), self._members, 2).mean(1).tolist()
        return [
            _result(self._lane_at(place), loss, score)
            for place, (loss, score) in zip(places, tested, strict=True)
        ]

    def rehearse(self, lanes: int) -> float:
        """Return how many trial-epochs a second so many lanes would make; trains throwaway ones.

        ``lanes`` are rounded up to whole trials.
        """
        trials = -(-lanes // self._members)
        return self._epochs.rehearse(*self._throwaway(trials * self._members)) / self._members

    def expect(self, trial_epochs: int, trial_epochs_per_second: float) -> None:
        """Say what is to come at least: what pays is compiled from now on, not later.

        Without it, compiling begins after the first epoch that shows how long things take.
        """
        lanes = self.slots * self._members
        self._epochs.expect(lanes, trial_epochs / trial_epochs_per_second, self._throwaway)

    @property
    def programs(self) -> Sequence[Program]:
        """What has been called so far, and in which form it is called now."""
        return list(self._epochs.programs)

    @property
    def footprint(self) -> Footprint:
        """How many bytes a lane takes, and for what."""
        return self._footprint

    @property
    def bytes_per_lane(self) -> int:
        """The most bytes that one more lane may take on the device."""
        return self._footprint.most(self._device)

    def _weigh(self) -> Footprint:
        parameters, buffers = (
            {name: part_M[0] for name, part_M in parts.items()}
            for parts in (self._initial, self._initial_buffers)
        )
        weights = sum(part.nbytes for part in parameters.values())
        kept = sum(buffer.nbytes for buffer in buffers.values())
        changing = (1 + self._optimizer.moments) * weights + kept
        if self._training.averaging == "swa":
            changing += weights + kept
        step = self._epochs.settle_memory(*self._throwaway(WEIGHED_LANES)) // WEIGHED_LANES
        return Footprint(
            held=changing + weights + kept,
            epoch=changing + self._epochs.batches.bytes_of_epoch,
            step=step,
        )

    def _throwaway(
        self, lanes: int
    ) -> tuple[LaneTensors, dict[str, Tensor], NDArray[np.float64], list[Place]]:
        """Return lanes of typical trials before their first epoch, as an epoch wants them."""
        typical = LaneTrial(
            key=0,
            weight_decay=1e-3,
            dropout=0.2,
            l1_lambda=1e-4,
            patience=1,
            learning_rate=self._training.learning_rate,
            label_smoothing=0.1,
            input_noise=0.1,
            weight_noise=0.01,
            max_norm=3.0,
            max_gradient_norm=1.0,
            input_dropout=0.1,
            augment_strength=0.5,
            mixup=0.5,
        )
        tensors = self._starting_tensors(-(-lanes // self._members))
        return (
            tensors.slice(slice(0, lanes)),
            strengths_of([typical] * lanes, self._device, self._dtype),
            np.full(lanes, typical.learning_rate),
            # Each trial at an epoch of its own, as once some have been refilled: such lanes share
            # neither an order of the rows nor, where those are streamed, the rows.
            [
                Place(lane % self._members, 1 + lane // self._members % self._training.max_epochs)
                for lane in range(lanes)
            ],
        )

    def settle(self) -> None:
        """Wait until nothing is being compiled any more; the next epoch uses what has been."""
        self._epochs.settle()

    def close(self) -> None:
        """Give threads back; the engine must not be used any more."""
        self._epochs.close()

    @contextmanager
    def _whole_or_not_at_all(self) -> Iterator[None]:
        """Bring the lanes back to where they are now if the block raises.

        What steps change is copied first, which costs less than one step.
        """
        changing = self._tensors.changing()
        if self._epochs_start is None:
            self._epochs_start = {name: part.clone() for name, part in changing.items()}
        else:
            _copy_(self._epochs_start, changing)
        try:
            yield
        except BaseException as error:
            with _device_lost_by(error):
                _copy_(changing, self._epochs_start)
                synchronize(self._device)
            raise

    def _close_epoch(self, measured_TM5: Tensor, seconds: float) -> list[LaneEpoch]:
        """Decide for each trial whether it goes on; keep copies of the best weights."""
        epochs = []
        stack = [copy(lane) for lane in self._stack]
        for lane, members in zip(stack, measured_TM5, strict=True):
            if lane is None:
                continue
            train_loss, _, score, penalty, sparsity = members.mean(0).tolist()
            lane.observe(train_loss, members[:, 1].tolist(), score, self._training.max_epochs)
            epochs.append(
                LaneEpoch(
                    key=lane.key,
                    epoch=lane.epoch,
                    train_loss=train_loss,
                    validation_loss=lane.latest_loss,
                    validation_score=score,
                    penalty=penalty,
                    sparsity=sparsity,
                    seconds=seconds,
                    ended=lane.ended,
                )
            )
        improved = [bool(lane and lane.stopping.improved) for lane in self._each_lane(stack)]
        self._tensors.keep_best_(torch.tensor(improved, device=self._device))
        self._stack = stack
        return epochs

    def _drop_copies(self) -> None:
        """Free what is held beside the lanes of their present number: they are about to change."""
        self._epochs_start = None
        self._epochs.programs.forget_captures()

    def _take_over(self, tensors: LaneTensors, stack: list[Lane | None]) -> None:
        """Go on with these lanes and what the device holds for them, or raise and change nothing.

        Memory may be short for anything that is allocated here. Where the lanes lie where they lay,
        their strengths do so too.
        """
        trials = self._trial_of_each_lane(self._computed(stack))
        strengths = strengths_of(trials, self._device, self._dtype)
        if tensors is self._tensors:
            _copy_(self._strengths, strengths)
        else:
            self._tensors, self._strengths = tensors, strengths
        self._stack = stack

    def _restart_gaps(self) -> None:
        """Keep what is computed in gaps from growing without bounds: forms are compared by it."""
        for place, lane in enumerate(self._stack):
            if lane is None:
                own = self._tensors.slice(self._span(place))
                own.restart_(self._initial, self._initial_buffers)

    @property
    def _present(self) -> list[Lane]:
        return [lane for lane in self._stack if lane]

    def _lane_at(self, place: int) -> Lane:
        lane = self._stack[place]
        assert lane is not None
        return lane

    def _computed(self, stack: Sequence[Lane | None]) -> list[Lane]:
        """Return at whose epoch and rate each place is computed: a gap as any other, in vain."""
        present = [lane for lane in stack if lane]
        return [lane or present[0] for lane in stack]

    def _each_lane(self, trials: Sequence[AnyLane]) -> list[AnyLane]:
        """Return for each lane whose it is."""
        return [trial for trial in trials for _ in range(self._members)]

    def _trial_of_each_lane(self, lanes: Sequence[Lane]) -> list[LaneTrial]:
        return [lane.trial for lane in self._each_lane(lanes)]

    def _starting_tensors(self, trials: int, device: torch.device | None = None) -> LaneTensors:
        parameters_M, buffers_M = (
            {name: part.to(device or part.device) for name, part in parts_M.items()}
            for parts_M in (self._initial, self._initial_buffers)
        )
        return LaneTensors.starting(
            parameters_M,
            buffers_M,
            self._optimizer.moments,
            trials,
            averaging=self._training.averaging == "swa",
        )

    def _places(self, keys: Sequence[int]) -> list[int]:
        place_of = {lane.key: place for place, lane in enumerate(self._stack) if lane}
        return [place_of[key] for key in keys]

    def _lanes_at(self, places: Sequence[int]) -> list[int]:
        return [place * self._members + m for place in places for m in range(self._members)]

    def _span(self, place: int) -> slice:
        return slice(place * self._members, (place + 1) * self._members)


def _build_members(
    task: Task, prepared: Prepared, seed: int, dtype: torch.dtype
) -> list[nn.Module]:
    """Build each member's model, on the CPU, where weights are the same whatever trains them."""
    models = []
    for member in range(len(prepared.splits)):
        with initial_weights(member_seed(seed, member)):
            model: nn.Module = task.model(prepared.rows.input_shape, prepared.outputs)
        for name, part in (*model.named_parameters(), *model.named_buffers()):
            if part.is_complex():
                raise UnsupportedModel(
                    f"{name} holds complex numbers, which no optimizer here knows; keep real and "
                    "imaginary parts as two numbers"
                )
        models.append(model.to(dtype))
    return models


def check_device(device: torch.device, error: BaseException) -> None:
    """Raise DeviceLost, for this reason, if a device answers no more."""
    with _device_lost_by(error):
        synchronize(device)


@contextmanager
def _device_lost_by(error: BaseException) -> Iterator[None]:
    """Raise DeviceLost, for this reason, if the block cannot do what asks little of a device."""
    try:
        yield
    except Exception:  # noqa: BLE001 - whatever the driver raises
        raise DeviceLost(f"{type(error).__name__}: {error}") from error


def _copy_(targets: Mapping[str, Tensor], sources: Mapping[str, Tensor]) -> None:
    for name, target in targets.items():
        target.copy_(sources[name])


def _objective(
    spec: AnyTask, task: Task, data: Data, prepared: Prepared, knobs: Collection[str]
) -> Objective:
    """Return what the data's kind asks for, with the task's own loss and score where it has any."""
    own_loss, own_score = (getattr(task, name, None) for name in ("loss", "score"))
    weights_C = prepared.class_weights if spec.class_weights == "balanced" else None
    if data.classes is None:
        # What a loss of the task's own is trained on stays as it is.
        center = 0.0 if own_loss is None else prepared.rows.y.double().mean().item()
        objective = regression(spec.score, prepared.unit, center)
    else:
        objective = classification(data.classes, spec.score, weights_C)
    if own_loss is not None:
        objective = replace(objective, loss=LossOfRows(own_loss))
    if own_score is not None and spec.score is None:
        objective = replace(objective, score=mean_score("own", own_score))
    elif own_loss is not None and data.classes is None and spec.score is None:
        raise InvalidData("a task with a loss() of its own and no classes needs a score() as well")
    if isinstance(objective.score, RankScore):
        _check_both_classes(prepared)
    if isinstance(objective.loss, LossOfRows):
        what = "a loss of its own" if own_loss else "squared error as its loss"
        if spec.class_weights != "none":
            raise InvalidData(f"task.class_weights weigh the cross-entropy, but this has {what}")
        if "label_smoothing" in knobs:
            raise InvalidData(f"label_smoothing smooths the cross-entropy, but this has {what}")
    return objective


def _check_both_classes(prepared: Prepared) -> None:
    """Raise InvalidData if rows that are to be ranked are all of one class."""
    for what, rows, numbers in (
        *(("validation", prepared.rows, split.validation) for split in prepared.splits),
        *(("test", prepared.test, split.test) for split in prepared.splits),
    ):
        y = rows.y[torch.from_numpy(numbers)]
        if y.min() == y.max():
            raise InvalidData(
                f"task.score: auroc compares two classes, but the {what} rows have one"
            )


def _augmentations(training: Training, prepared: Prepared) -> Collection[str]:
    """Return the ways in which images are changed; raise InvalidData where rows are no images."""
    shape = prepared.rows.input_shape
    if training.augment and len(shape) != 3:
        raise InvalidData(
            "training.augment changes images (channels, height, width), but a row of this data set "
            f"has the shape {shape}"
        )
    return training.augment


@contextmanager
def _no_room_for(what: str, device: torch.device, kind: type[NoRoom] = NoRoom) -> Iterator[None]:
    """Raise NoRoom, of this kind, where the block runs out of memory."""
    free = free_bytes(device)
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise kind(
            f"{device} has no room for {what}: {readable(free)} were free ({first_line(error)})"
        ) from error


def _check_room(trial_bytes: int, device: torch.device) -> None:
    free = free_bytes(device)
    if trial_bytes > free:
        raise NoRoomForModel(
            f"a trial takes {readable(trial_bytes)} on {device}, which has {readable(free)} free; "
            "take a smaller training.batch_size, smaller rows or model, or fewer folds and repeats"
        )


def _stacked(parts: Sequence[Mapping[str, Tensor]], device: torch.device) -> dict[str, Tensor]:
    # One by one: the first member's may be on the device already, as the model that is trained.
    return {name: stacked([own[name].to(device) for own in parts]) for name in parts[0]}


def _set_precision(training: Training, device: torch.device) -> None:
    """Let CUDA round inputs of matrix products to TF32 only where the study asks for it."""
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = training.precision == "tf32"
        torch.backends.cudnn.allow_tf32 = training.precision == "tf32"


def _result(lane: Lane, test_loss: float, test_score: float) -> LaneResult:
    if not lane.stopping.best_epoch:
        raise ValueError(f"trial {lane.key} has no epoch with a finite validation loss")
    return LaneResult(
        key=lane.key,
        best_epoch=lane.stopping.best_epoch,
        validation_loss=lane.stopping.best_loss,
        validation_score=lane.best_score,
        test_loss=test_loss,
        test_score=test_score,
        validation_loss_spread=lane.best_spread,
    )
