"""What the API reads: how studies stand, their trials, their best ones. Nothing here writes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from optuna.distributions import json_to_distribution
from sqlalchemy import ColumnElement, Row, and_, or_, select, text
from sqlalchemy.orm import Session

from regtune import tables
from regtune.errors import NotFound
from regtune.reporting import Epoch
from regtune.space import plain_name
from regtune.spec import REFERENCE_TRIALS
from regtune.standing import Standing
from regtune.studies import Outline, Study

Params = Mapping[str, Any]


@dataclass(frozen=True)
class Result:
    """What a complete trial measured, all at its best weights."""

    number: int
    kind: str
    params: Params
    decay_timescale_epochs: float | None
    validation_loss: float
    validation_loss_spread: float | None
    validation_score: float
    test_loss: float
    test_score: float
    epoch: int


@dataclass(frozen=True)
class Notable:
    """The trials that a study is judged by; None where one is not complete yet."""

    best: Result | None = None
    """That of the lowest validation loss."""
    baseline: Result | None = None
    default: Result | None = None


@dataclass(frozen=True)
class Trial:
    """A trial as it stands."""

    number: int
    kind: str
    state: str
    reason: str | None
    params: Params
    decay_timescale_epochs: float | None
    validation_loss: float | None
    validation_loss_spread: float | None
    validation_score: float | None
    epoch: int | None
    attempts: int
    worker: str | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


@dataclass(frozen=True)
class Rest:
    """What is told of a trial only when it is asked for by itself."""

    trial_id: int
    lost_leases: int
    test_loss: float | None
    test_score: float | None
    error: str | None
    suggested: Params


@dataclass(frozen=True)
class After:
    """The last trial of a page; the next page begins after it."""

    number: int
    value: float | None


def progress(study: Outline, stands: Standing) -> float:
    """Return the share of a study's budget that is used up, by the limit that is nearest."""
    if study.state == "completed":
        return 1.0
    shares = [stands.ended / study.budget_trials]
    if study.budget_trial_epochs:
        shares.append(stands.trial_epochs / study.budget_trial_epochs)
    if study.live and study.budget_seconds and stands.seconds_spent:
        shares.append(stands.seconds_spent / study.budget_seconds)
    return min(1.0, max(shares))


def eta_seconds(session: Session, study: Study, stands: Standing) -> float | None:
    """Return the seconds until a study's budget is used up, at the pace of its latest trials.

    None while that cannot be known: before the first trial has ended, or when none may start.
    """
    if study.state != "active":
        return None
    left = []
    pace = session.execute(
        _PACE, {"study_id": study.study_id, "seconds_spent": stands.seconds_spent}
    ).scalar()
    if pace:
        left.append((study.budget_trials - stands.ended) / pace)
    if study.budget_seconds and stands.seconds_spent is not None:
        left.append(max(0.0, study.budget_seconds - stands.seconds_spent))
    if study.budget_trial_epochs and stands.trial_epochs and stands.seconds_spent:
        epochs_left = max(0, study.budget_trial_epochs - stands.trial_epochs)
        left.append(epochs_left * stands.seconds_spent / stands.trial_epochs)
    return min(left, default=None)


def notable(session: Session, study: Study) -> Notable:
    """Return the trials that a study is judged by, as far as they are complete."""
    rows = session.execute(
        _NOTABLE, {"study_id": study.study_id, "reference_trials": REFERENCE_TRIALS}
    ).mappings()
    return Notable(**{row["role"]: _result(study, row) for row in rows})


def trials_by_number(
    session: Session, study: Study, state: str | None, after: After | None, up: bool, limit: int
) -> Sequence[Trial]:
    """Return a page of a study's trials, ordered by number."""
    number = tables.trials.c.number
    query = _trials(study.study_id, state).order_by(number.asc() if up else number.desc())
    if after:
        query = query.where(number > after.number if up else number < after.number)
    return _read_page(session, study, query.limit(limit))


def trials_by_value(
    session: Session, study: Study, state: str | None, after: After | None, up: bool, limit: int
) -> Sequence[Trial]:
    """Return a page of a study's trials, ordered by validation loss; those without one come last.

    A page begins where the last one ended, not at an offset: a trial that ends meanwhile neither
    repeats nor hides another.
    """
    value, number = tables.trials.c.value, tables.trials.c.number
    query = _trials(study.study_id, state).order_by(
        (value.asc() if up else value.desc()).nulls_last(), number
    )
    if after:
        query = query.where(_comes_after(after, up))
    return _read_page(session, study, query.limit(limit))


def trial(session: Session, study: Study, number: int) -> tuple[Trial, Rest]:
    """Return one trial and all the rest of what is known of it; raise NotFound."""
    t = tables.trials.c
    row = session.execute(
        _trials(study.study_id, None)
        .where(t.number == number)
        .add_columns(t.trial_id, t.lost_leases, t.test_loss, t.test_score, t.error)
    ).one_or_none()
    if row is None:
        raise NotFound(f"study {study.name!r} has no trial {number}")
    known = dict(row._mapping)
    return (
        _trial(study, {name: known[name] for name in Trial.__dataclass_fields__ if name in known}),
        Rest(
            **{name: known[name] for name in Rest.__dataclass_fields__ if name in known},
            suggested=_suggested(session, row.trial_id),
        ),
    )


def epochs(session: Session, trial_id: int, attempt: int) -> Sequence[Epoch]:
    """Return the epochs of one attempt at a trial."""
    e = tables.epochs.c
    rows = session.execute(
        select(*(e[name] for name in Epoch.__dataclass_fields__))
        .where(e.trial_id == trial_id, e.attempt == attempt)
        .order_by(e.epoch)
    )
    return [Epoch(**row._mapping) for row in rows]


def _result(study: Study, row: Mapping[Any, Any]) -> Result:
    known = {name: row[name] for name in row if name != "role"}
    timescale = study.decay_timescale_epochs(known["params"])
    return Result(**known, decay_timescale_epochs=timescale)


def _read_page(session: Session, study: Study, query: Any) -> Sequence[Trial]:
    found = session.execute(query)
    names = list(found.keys())  # a row's own mapping takes four times as long
    return [_trial(study, dict(zip(names, row, strict=True))) for row in found.all()]


def _trial(study: Study, known: Mapping[str, Any]) -> Trial:
    timescale = study.decay_timescale_epochs(known["params"])
    return Trial(**known, decay_timescale_epochs=timescale)


def _trials(study_id: int, state: str | None) -> Any:
    t = tables.trials.c
    query = select(
        t.number,
        t.kind,
        t.state,
        t.reason,
        t.params,
        t.value.label("validation_loss"),
        t.value_spread.label("validation_loss_spread"),
        t.validation_score,
        t.best_epoch.label("epoch"),
        t.attempt.label("attempts"),
        t.worker,
        t.created_at,
        t.started_at,
        t.finished_at,
    ).where(t.study_id == study_id)
    return query.where(t.state == state) if state else query


def _comes_after(after: After, up: bool) -> ColumnElement[bool]:
    value, number = tables.trials.c.value, tables.trials.c.number
    if after.value is None:
        return and_(value.is_(None), number > after.number)
    return or_(
        value > after.value if up else value < after.value,
        and_(value == after.value, number > after.number),
        value.is_(None),
    )


def _suggested(session: Session, trial_id: int) -> Params:
    rows: Sequence[Row[Any]] = session.execute(
        text(
            "SELECT param_name, param_value, distribution_json FROM public.trial_params"
            " WHERE trial_id = :trial_id ORDER BY param_id"
        ),
        {"trial_id": trial_id},
    ).all()
    return {
        plain_name(row.param_name): json_to_distribution(row.distribution_json).to_external_repr(
            row.param_value
        )
        for row in rows
    }


# Over the latest 20, so that a study that was paused, or has got more workers, is soon told right.
# Measured up to now: when nothing ends any more, the pace falls.
_PACE = text("""
WITH latest AS (
    SELECT finished_at FROM regtune.trials
    WHERE study_id = :study_id AND finished_at IS NOT NULL
    ORDER BY finished_at DESC LIMIT 20
), since AS (
    SELECT coalesce(
        (SELECT max(finished_at) FROM regtune.trials
         WHERE study_id = :study_id AND finished_at < (SELECT min(finished_at) FROM latest)),
        now() - make_interval(secs => :seconds_spent)) AS at
)
SELECT (SELECT count(*) FROM latest) / nullif(extract(epoch FROM now() - at), 0)::float FROM since
""")

_RESULTS = """
       number, kind, params, value AS validation_loss, value_spread AS validation_loss_spread,
       validation_score, test_loss, test_score, best_epoch AS epoch
FROM regtune.trials
WHERE study_id = :study_id AND state = 'complete'"""

# Of equals the first is the best one.
_NOTABLE = text(f"""
(SELECT 'best' AS role, {_RESULTS} AND value < 'Infinity' ORDER BY value, number LIMIT 1)
UNION ALL
SELECT kind AS role, {_RESULTS}
      AND number < :reference_trials AND kind IN ('baseline', 'default')
""")
