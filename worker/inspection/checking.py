"""A trial run: two lanes for two epochs, and what a person should know of it.

Of a study that searches what makes shapes, the reference points' shape is checked in full. Each of
the others that differ from it in one option is built and trained, no more: so every option is seen,
and not every combination.
"""

import math
import traceback
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from pydantic import BaseModel, Field

from regtune.settings import Settings
from regtune.task import Storage
from worker.devices import describe
from worker.inspection.subject import Subject
from worker.stack import knobs_of
from worker.training.compiling import Program
from worker.training.engine import Engine
from worker.training.lanes import LaneEpoch, LaneTrial

LANES, EPOCHS = 2, 2
NEVER = 1000
TOLERANCE = 1e-4
"""Largest difference of a loss, relative to it, that rounding explains."""

BUILDING = "while data and model were built"

Curves = dict[int, list[LaneEpoch]]
"""The epochs of each trial, by key."""


class Form(BaseModel):
    """In which form a step runs after a while: recorded, compiled, or as it is written."""

    recorded: bool
    speedup: float | None = Field(description="Of the compiled form; null if there is none.")
    obstacle: str | None = Field(description="What has kept it from being recorded or compiled.")


class Verdict(BaseModel):
    """What a check has found; nothing is wrong where ``problems`` is empty.

    ``remarks`` are what a person may want to change. What was not found out is null. ``options``
    are what was found of the study's other shapes, each by its name.
    """

    name: str
    device: str
    problems: list[str] = []
    remarks: list[str] = []
    traceback: str | None = None
    parameters: int | None = None
    dropout_sites: list[str] | None = None
    training_rows: int | None = None
    steps_per_epoch: int | None = None
    score: str | None = None
    vectorized: bool | None = None
    not_vectorized_because: str | None = None
    train_loss: list[float] | None = None
    validation_loss: list[float] | None = None
    validation_score: list[float] | None = None
    test_loss: float | None = None
    test_score: float | None = None
    reproducible: bool | None = None
    trial_epochs_per_second: float | None = None
    bytes_per_lane: int | None = None
    step: Form | None = None
    options: list["Verdict"] = []

    @property
    def wrong(self) -> bool:
        """Whether anything is, in any of the shapes."""
        return bool(self.problems) or any(option.wrong for option in self.options)


def check(subject: Subject, settings: Settings, device: torch.device) -> Verdict:
    """Train a subject's task and return what was found; what its own code raises is a finding."""
    reference, *others = subject.spec.shapes_with_every_option()
    first = replace(subject, spec=subject.spec.at(reference))
    verdict = Verdict(name=subject.name, device=describe(device))
    with (
        _findings_in(verdict, BUILDING),
        closing(_engine(first, settings, device)) as engine,
    ):
        curves = _try_out(engine, first, verdict)
        if curves is not None:
            with _findings_in(verdict, "in training"):
                _judge_repetition(first, settings, device, engine.data_hash, curves, verdict)
                _judge_speed(engine, verdict)
    for shape in others:
        option = replace(subject, name=shape, spec=subject.spec.at(shape))
        verdict.options.append(_check_option(option, settings, device, verdict.remarks))
    return verdict


def _check_option(
    option: Subject, settings: Settings, device: torch.device, known: Sequence[str]
) -> Verdict:
    """Build and train another shape; remarks that are known of the first one are not repeated."""
    verdict = Verdict(name=option.name, device=describe(device))
    with (
        _findings_in(verdict, BUILDING),
        closing(_engine(option, settings, device)) as engine,
    ):
        _try_out(engine, option, verdict)
    verdict.remarks = [remark for remark in verdict.remarks if remark not in known]
    return verdict


def _try_out(engine: Engine, subject: Subject, verdict: Verdict) -> Curves | None:
    """Train two trials; return their epochs, unless something is wrong."""
    _look(engine, verdict)
    with _findings_in(verdict, "in training"):
        engine.join([_typical(subject, 0), _typical(subject, 1)])
        curves = _train(engine)
        _judge_curves(curves, verdict)
        if verdict.problems:
            return None
        (result,) = engine.results([0])
        verdict.test_loss, verdict.test_score = result.test_loss, result.test_score
        engine.leave([0, 1])
        return curves
    return None


def _engine(subject: Subject, settings: Settings, device: torch.device) -> Engine:
    spec = subject.spec
    return Engine(
        task=spec.task,
        training=spec.training,
        validation=spec.validation,
        storage=Storage(settings.data_dir, settings.data_roots),
        device=device,
        max_lanes=LANES * spec.validation.members,
        own_tasks=settings.tasks,
        knobs=knobs_of(spec),
        data_on_device=settings.data_on_device,
    )


def _typical(subject: Subject, key: int, dropout: float = 0.2) -> LaneTrial:
    return LaneTrial(
        key=key,
        weight_decay=1e-3,
        dropout=dropout,
        l1_lambda=1e-4,
        patience=NEVER,
        learning_rate=subject.spec.training.learning_rate,
    )


def _train(engine: Engine, epochs: int = EPOCHS) -> Curves:
    """Train for some epochs, and return those of each trial, by key."""
    curves: Curves = {}
    for _ in range(epochs):
        over = [key for key, left in engine.epochs_left().items() if left <= 0]
        if len(over) == len(engine.lanes):
            break
        engine.leave(over)
        for epoch in engine.train_epoch():
            curves.setdefault(epoch.key, []).append(epoch)
        if any(epochs[-1].ended == "diverged" for epochs in curves.values()):
            break
    return curves


def _look(engine: Engine, verdict: Verdict) -> None:
    """Note what can be seen before anything is trained."""
    verdict.parameters = engine.parameters
    verdict.dropout_sites = list(engine.model.sites)
    verdict.training_rows = engine.training_rows
    verdict.steps_per_epoch = engine.steps_per_epoch
    verdict.score = engine.score
    verdict.vectorized = engine.model.vectorized
    verdict.not_vectorized_because = engine.model.refusal
    verdict.bytes_per_lane = engine.bytes_per_lane
    if not engine.model.sites:
        verdict.remarks.append(
            "there is no dropout site, so that search.dropout does nothing: nn.Dropout and its kin "
            "make one, at any rate"
        )
    if not engine.model.penalized:
        verdict.remarks.append(
            "weight decay and L1 have nothing to act on: no parameter outside normalizations has "
            "two dimensions or more"
        )
    if not engine.model.vectorized:
        verdict.remarks.append(
            "the lanes run one after the other, which gains nothing from being many: see why vmap "
            "refuses the model"
        )


def _judge_curves(curves: Curves, verdict: Verdict) -> None:
    one, other = curves[0], curves[1]
    verdict.train_loss = [epoch.train_loss for epoch in one]
    verdict.validation_loss = [epoch.validation_loss for epoch in one]
    verdict.validation_score = [epoch.validation_score for epoch in one]
    losses = [*verdict.train_loss, *verdict.validation_loss]
    if not all(math.isfinite(loss) for loss in losses):
        verdict.problems.append(
            "the loss is not finite, with the study's learning rate and hardly any regularization"
        )
    elif len(one) > 1 and verdict.train_loss[-1] >= verdict.train_loss[0]:
        verdict.remarks.append("the training loss did not fall from the first epoch to the second")
    if not _alike(one, other):
        verdict.problems.append(
            "two trials alike, side by side, gave different numbers: the model draws noise of its "
            "own, or keeps something from one call to the next"
        )


def _judge_repetition(
    subject: Subject,
    settings: Settings,
    device: torch.device,
    data_hash: str,
    curves: Curves,
    verdict: Verdict,
) -> None:
    """Train one of the trials again from nothing, beside another one that is an epoch ahead."""
    again = _engine(subject, settings, device)
    try:
        if again.data_hash != data_hash:
            verdict.problems.append(
                "data() returned other rows at its second call: workers would refuse each other's "
                "trials; seed what is random in it"
            )
        again.join([_typical(subject, 1, dropout=0.0)])
        _train(again, epochs=1)
        again.join([_typical(subject, 0)])
        same = _alike(curves[0], _train(again)[0])
    finally:
        again.close()
    if not same and not verdict.problems:
        verdict.problems.append(
            "the same trial, trained again beside another one, gave different numbers: the model "
            "draws noise of its own, or one lane's rows reach the other"
        )
    verdict.reproducible = not verdict.problems


def _judge_speed(engine: Engine, verdict: Verdict) -> None:
    """Let the step be recorded and compiled as in a long study, and see how fast it gets."""
    speed = engine.rehearse(LANES * engine.members)
    engine.expect(10**9, speed)
    engine.settle()
    verdict.trial_epochs_per_second = max(speed, engine.rehearse(LANES * engine.members))
    steps = [program for program in engine.programs if program.name == "step"]
    verdict.step = _form(max(steps, key=lambda program: program.calls))
    if verdict.step.obstacle and not verdict.step.recorded:
        verdict.remarks.append("a step cannot be recorded, and costs some milliseconds more")


def _form(program: Program) -> Form:
    return Form(
        recorded=program.recording is not None,
        speedup=program.speedup,
        obstacle=program.obstacle,
    )


def _alike(one: Sequence[LaneEpoch], other: Sequence[LaneEpoch]) -> bool:
    pairs = [
        (getattr(a, loss), getattr(b, loss))
        for a, b in zip(one, other, strict=True)
        for loss in ("train_loss", "validation_loss")
    ]
    return all(math.isclose(a, b, rel_tol=TOLERANCE) or a != a != b for a, b in pairs)


@contextmanager
def _findings_in(verdict: Verdict, when: str) -> Iterator[None]:
    """Let an exception of the task's own code be a finding."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - a user's crash is data
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(where.filename).name}, line {where.lineno}"
        verdict.problems.append(f"{when}: {type(error).__name__}: {error} ({place})")
        verdict.traceback = traceback.format_exc()
