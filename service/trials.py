"""Trials over REST: a study's trials, one of them with its epochs, and the best."""

from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query
from pydantic import BaseModel, ConfigDict, Field

from regtune import standing, studies
from regtune.errors import NoBestYet, NotFound
from regtune.standing import Standing
from regtune.studies import Study
from service import cursors, records
from service.documents import (
    PARAMS_EXAMPLE,
    SPREAD,
    TIMESCALE,
    Document,
    Measure,
    Params,
    TrialKind,
    TrialResult,
    TrialState,
)
from service.edge import InTransaction, StudyName
from service.records import After, Rest, Trial

router = APIRouter(prefix="/v1/studies/{name}", tags=["trials"])


class TrialSummary(Document):
    """A trial in a list; where it has several members (folds × repeats), figures are their mean."""

    number: int = Field(description="Its number in the study, from 0.", examples=[17])
    kind: TrialKind = Field(
        description="baseline: everything off; default: common strengths; suggested: by the "
        "sampler.",
        examples=["suggested"],
    )
    state: TrialState = Field(description="Where it is in its life.", examples=["complete"])
    reason: str | None = Field(
        description="Why it ended as it did.", examples=["no improvement for 12 epochs"]
    )
    params: Params = Field(
        description="The values that are trained with, zeros and fixed ones included.",
        examples=[PARAMS_EXAMPLE],
    )
    decay_timescale_epochs: Measure = Field(description=TIMESCALE, examples=[89.6])
    validation_loss: Measure = Field(
        description="Loss on the validation rows at the best weights; the mean over the trial's "
        "members where it has several. Null unless it is complete, and where it is not a finite "
        "number.",
        examples=[0.0731],
    )
    validation_loss_spread: Measure = Field(description=SPREAD, examples=[0.0042])
    validation_score: Measure = Field(
        description="Score on the validation rows at the best weights; `model.score` of the "
        "study says which.",
        examples=[0.981],
    )
    epoch: int | None = Field(description="Epoch of the best weights, from 1.", examples=[31])
    attempts: int = Field(description="How often a worker has leased it.", examples=[1])
    worker: str | None = Field(description="Who leased it last.", examples=["gpu-7-3141"])
    created_at: datetime = Field(
        description="When it was suggested.", examples=["2026-03-01T12:00:00.000000Z"]
    )
    started_at: datetime | None = Field(
        description="When it was first leased.", examples=["2026-03-01T12:00:01.500000Z"]
    )
    finished_at: datetime | None = Field(
        description="When it ended.", examples=["2026-03-01T12:00:09.125000Z"]
    )


class TrialPage(Document):
    """Some trials of a study."""

    items: list[TrialSummary] = Field(description="The trials.")
    next: str | None = Field(
        description="The `cursor` of the next page; null on the last one.",
        examples=["dmFsdWUKYXNjCjE3"],
    )


class EpochDetail(Document):
    """What one epoch measured, the mean over the trial's members where it has several.

    A figure that is not finite, as in a diverged epoch, is null.
    """

    epoch: int = Field(description="From 1.", examples=[1])
    train_loss: Measure = Field(
        description="Mean loss over the epoch, no penalty in it; null if it diverged.",
        examples=[0.412],
    )
    validation_loss: Measure = Field(
        description="Loss on the validation rows after it, no penalty in it; the mean over the "
        "trial's members where it has several. Null if it diverged.",
        examples=[0.231],
    )
    validation_score: Measure = Field(
        description="Score on the validation rows after it.", examples=[0.934]
    )
    penalty: Measure = Field(
        description="The penalties on the weights after it; null if they diverged.",
        examples=[0.018],
    )
    sparsity: Measure = Field(
        description="Share of exact zeros among the penalized weights.", examples=[0.27]
    )
    seconds: Measure = Field(description="How long it took.", examples=[0.021])


class TrialDetail(TrialSummary):
    """A trial with all that is known of it."""

    suggested: Params = Field(
        description="What the sampler said, as Optuna stores it; a value below the range's `low` "
        "stands for zero, and of a limit a value above its `high` for none.",
        examples=[{"weight_decay": 0.31, "dropout": 0.22, "l1_lambda": 4.2e-05, "patience": 12}],
    )
    lost_leases: int = Field(
        description="How often its worker was lost; each time it was leased again.", examples=[0]
    )
    test_loss: Measure = Field(
        description="Loss on the test rows at the best weights, computed once and never used for "
        "choosing; null unless it is complete.",
        examples=[0.0912],
    )
    test_score: Measure = Field(
        description="Score on the test rows at the best weights, computed once and never used "
        "for choosing; null unless it is complete.",
        examples=[0.9787],
    )
    error: str | None = Field(
        description="Traceback of the model's or the data set's code, if that failed.",
        examples=["Traceback (most recent call last):\n  …\nValueError: no such file"],
    )
    attempt: int = Field(description="The attempt that the epochs are of.", examples=[1])
    epochs: list[EpochDetail] = Field(
        description="The epochs of one attempt, the last one unless another is asked for."
    )


class Best(TrialResult):
    """The best trial of a study, and the reference points beside it."""

    study: str = Field(description="The study's name.", examples=["digits"])
    searched: list[str] = Field(
        description="The parameters that the study searches; the others are fixed.",
        examples=[["weight_decay", "dropout", "l1_lambda", "patience"]],
    )
    score: str = Field(description="What validation and test score are.", examples=["accuracy"])
    baseline: TrialResult | None = Field(
        description="The trial with everything off; null until it is complete."
    )
    default: TrialResult | None = Field(
        description="The trial with common strengths; null until it is complete."
    )


class TrialsQuery(BaseModel):
    """Which trials to list, and in which order."""

    model_config = ConfigDict(extra="forbid")

    state: TrialState | None = Field(
        None, description="Only trials in this state.", examples=["complete"]
    )
    order_by: Literal["number", "value"] = Field(
        "number",
        description="By number, or by validation loss; trials without one come last.",
        examples=["value"],
    )
    direction: Literal["asc", "desc"] = Field(
        "asc", description="Smallest first, or largest first.", examples=["asc"]
    )
    limit: int = Field(100, ge=1, le=1000, description="Most trials on a page.", examples=[100])
    cursor: str | None = Field(
        None, description="The `next` of the page before.", examples=["dmFsdWUKYXNjCjE3"]
    )


class TrialQuery(BaseModel):
    """Which of a trial's attempts to look at."""

    model_config = ConfigDict(extra="forbid")

    attempt: int | None = Field(
        None, ge=1, lt=2**31, description="Default: the last one.", examples=[1]
    )


@router.get("/trials")
def list_trials(
    name: StudyName, query: Annotated[TrialsQuery, Query()], session: InTransaction
) -> TrialPage:
    """List a study's trials."""
    study = studies.find(session, name)
    after = _read_cursor(query) if query.cursor is not None else None
    read = records.trials_by_number if query.order_by == "number" else records.trials_by_value
    found = read(session, study, query.state, after, query.direction == "asc", query.limit + 1)
    page = found[: query.limit]
    following = _write_cursor(query, page[-1]) if len(found) > len(page) else None
    return TrialPage.model_validate({"items": page, "next": following})


@router.get("/trials/{number}")
def get_trial(
    name: StudyName,
    number: Annotated[int, Path(ge=0, lt=2**31, description="From 0.", examples=[17])],
    query: Annotated[TrialQuery, Query()],
    session: InTransaction,
) -> TrialDetail:
    """Look at one trial, with the epochs of its last attempt or of another one."""
    trial, rest = records.trial(session, studies.find(session, name), number)
    attempt = query.attempt or trial.attempts
    if attempt > trial.attempts:
        raise NotFound(f"trial {number} has had {trial.attempts} attempts, so no attempt {attempt}")
    return TrialDetail(
        **_fields(trial, rest),
        attempt=attempt,
        epochs=[
            EpochDetail.model_validate(epoch)
            for epoch in records.epochs(session, rest.trial_id, attempt)
        ],
    )


@router.get("/best")
def get_best(name: StudyName, session: InTransaction) -> Best:
    """Look at the trial with the lowest validation loss; 404 until one is complete."""
    study = studies.find(session, name)
    notable = records.notable(session, study)
    if notable.best is None:
        raise _none_yet(study, standing.of(session, study.study_id))
    return Best(
        study=name,
        **TrialResult.of(notable.best).model_dump(),
        searched=list(study.spec.search.searched()),
        score=study.model.score if study.model else "accuracy",
        baseline=TrialResult.maybe(notable.baseline),
        default=TrialResult.maybe(notable.default),
    )


def _none_yet(study: Study, stands: Standing) -> NoBestYet:
    return NoBestYet(
        f"no trial of study {study.name!r} has completed yet: {stands.running} running, "
        f"{stands.waiting} waiting, {stands.ended} ended otherwise; the study is {study.state}"
    )


def _fields(trial: Trial, rest: Rest) -> dict[str, Any]:
    return {**vars(trial), **{key: vars(rest)[key] for key in vars(rest) if key != "trial_id"}}


def _write_cursor(query: TrialsQuery, last: Trial) -> str:
    value = "" if last.validation_loss is None else repr(last.validation_loss)
    return cursors.write(query.order_by, query.direction, value, str(last.number))


def _read_cursor(query: TrialsQuery) -> After:
    cursor = query.cursor or ""
    order_by, direction, value, number = cursors.read(cursor, 4)
    if (order_by, direction) != (query.order_by, query.direction):
        raise cursors.invalid(cursor)
    try:
        loss = float(value) if value else None
    except ValueError:
        raise cursors.invalid(cursor) from None
    return After(number=cursors.whole(cursor, number, 2**31), value=loss)
