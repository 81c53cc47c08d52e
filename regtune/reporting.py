"""What a worker reports: epochs, and how a trial ended; every write is fenced by its lease.

One statement renews all leases of a worker, records their new epochs and returns which trials to
stop. One more ends any number of trials. A lease that is gone touches no row. Nobody is notified:
with every notification PostgreSQL wakes all who listen in the database, and a fleet reports all the
time.
"""

import json
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Self

from sqlalchemy import text
from sqlalchemy.orm import Session

from regtune.errors import storable
from regtune.leasing import Lease


@dataclass(frozen=True)
class Epoch:
    """What one epoch of a trial measured; ``epoch`` counts from 1. Losses may be NaN or infinite.

    ``train_loss`` and ``validation_loss`` hold no penalty. ``sparsity`` is the share of exact
    zeros among the penalized weights.
    """

    epoch: int
    train_loss: float
    validation_loss: float
    validation_score: float
    penalty: float
    sparsity: float
    seconds: float


@dataclass(frozen=True)
class Completed:
    """The trial ran to its end or stopped early; all figures are at the best weights.

    Where a trial has several members, each figure is their mean, and ``validation_loss_spread`` the
    standard deviation of their validation losses (n - 1 in the denominator).
    """

    validation_loss: float
    validation_score: float
    best_epoch: int
    test_loss: float
    test_score: float
    reason: str
    validation_loss_spread: float | None = None


@dataclass(frozen=True)
class Pruned:
    """The trial was stopped because it looked bad, or because its loss was not finite."""

    reason: str


@dataclass(frozen=True)
class Failed:
    """The user's code raised; ``error`` is its traceback."""

    reason: str
    error: str

    @classmethod
    def by(cls, error: Exception) -> Self:
        """Return the outcome of a trial whose task raised ``error``."""
        return cls(
            reason=storable(f"{type(error).__name__}: {error}"),
            error=storable("".join(traceback.format_exception(error))),
        )


Outcome = Completed | Pruned | Failed


@dataclass(frozen=True)
class Verdicts:
    """What a flush came back with.

    ``held`` are the trials whose leases still stand; ``stop`` says which of them to stop, and why.
    """

    held: frozenset[int]
    stop: Mapping[int, str]


def flush(
    session: Session,
    leases: Sequence[Lease],
    epochs: Mapping[int, Sequence[Epoch]],
    seconds: float,
    *,
    now: datetime | None = None,
) -> Verdicts:
    """Renew leases for ``seconds`` and record new epochs, by trial id; return the verdicts.

    An epoch that this attempt has recorded before is left as it is.
    """
    if not leases:
        return Verdicts(frozenset(), {})
    rows = session.execute(
        _FLUSH,
        {
            "leases": _as_json(_token(lease) for lease in leases),
            "epochs": _as_json(
                {"trial_id": trial_id, **vars(epoch)}
                for trial_id, reported in epochs.items()
                for epoch in reported
            ),
            "seconds": seconds,
            "now": now,
        },
    ).all()
    return Verdicts(
        held=frozenset(row.trial_id for row in rows),
        stop={row.trial_id: row.stop_request for row in rows if row.stop_request},
    )


def finish(
    session: Session,
    outcomes: Sequence[tuple[Lease, Outcome]],
    worker: str,
    *,
    now: datetime | None = None,
) -> frozenset[int]:
    """End trials as their outcomes say; return the ids of those whose leases still stood.

    What Optuna shows of a completed or pruned trial is its last attempt, whatever earlier ones
    trained.
    """
    if not outcomes:
        return frozenset()
    ended = session.execute(
        _FINISH,
        {
            "outcomes": _as_json(_ending(lease, outcome) for lease, outcome in outcomes),
            "worker": worker,
            "now": now,
        },
    ).scalars()
    return frozenset(ended)


def resume(session: Session, resumed: Sequence[tuple[Lease, Sequence[Epoch]]]) -> frozenset[int]:
    """Let attempts begin where checkpoints of earlier ones ended; return the ids still leased.

    The epochs are the curve up to the checkpoint, empty for a trial that starts anew. They become
    the attempt's own: what is on record under an earlier attempt moves, what is not, because the
    database was away, is added. What earlier attempts trained beyond stays on record as theirs, but
    Optuna's curve ends with the checkpoint.
    """
    if not resumed:
        return frozenset()
    rows = session.execute(
        _RESUME,
        {
            "leases": _as_json(_token(lease) for lease, _ in resumed),
            "epochs": _as_json(
                {"trial_id": lease.trial_id, **vars(epoch)}
                for lease, curve in resumed
                for epoch in curve
            ),
        },
    )
    return frozenset(rows.scalars())


def request_stop(session: Session, verdicts: Mapping[int, tuple[int, str]]) -> None:
    """Ask the workers to stop trials: ``verdicts`` maps a trial's id to its attempt and why.

    The attempt is the one that was judged; if the trial has changed hands since, it goes on. The
    workers find it at their next flush; nobody is woken for it.
    """
    session.execute(
        _REQUEST_STOP,
        {
            "verdicts": _as_json(
                {"trial_id": trial_id, "attempt": attempt, "reason": reason}
                for trial_id, (attempt, reason) in verdicts.items()
            )
        },
    )


def _token(lease: Lease) -> dict[str, Any]:
    return {"trial_id": lease.trial_id, "token": str(lease.token)}


def _ending(lease: Lease, outcome: Outcome) -> dict[str, Any]:
    match outcome:
        case Completed():
            return {
                **_token(lease),
                **vars(outcome),
                "value": outcome.validation_loss,
                "state": "complete",
                "optuna_state": "COMPLETE",
            }
        case Pruned():
            return {
                **_token(lease),
                **vars(outcome),
                "state": "pruned",
                "optuna_state": "PRUNED",
            }
        case Failed():
            return {**_token(lease), **vars(outcome), "state": "failed", "optuna_state": "FAIL"}


def _as_json(rows: Iterable[Mapping[str, Any]]) -> str:
    """Write rows for ``json_to_recordset``; PostgreSQL reads NaN and Infinity from strings."""
    return json.dumps([{key: _plain(value) for key, value in row.items()} for row in rows])


def _plain(value: Any) -> Any:
    return repr(value) if isinstance(value, float) else value


_REPORTED = """
    SELECT * FROM json_to_recordset(cast(:epochs AS json)) AS e(
        trial_id int, epoch int, train_loss double precision, validation_loss double precision,
        validation_score double precision, penalty double precision, sparsity double precision,
        seconds double precision)
"""

_SHOW = """
    INSERT INTO public.trial_intermediate_values
           (trial_id, step, intermediate_value, intermediate_value_type)
    SELECT trial_id, epoch,
           CASE WHEN abs(validation_loss) < 'Infinity' THEN validation_loss END,
           CASE WHEN validation_loss = 'NaN' THEN 'NAN'
                WHEN validation_loss = 'Infinity' THEN 'INF_POS'
                WHEN validation_loss = '-Infinity' THEN 'INF_NEG'
                ELSE 'FINITE' END::public.trialintermediatevaluetype
    FROM {epochs} ORDER BY trial_id, epoch
    ON CONFLICT (trial_id, step) DO UPDATE
    SET intermediate_value = excluded.intermediate_value,
        intermediate_value_type = excluded.intermediate_value_type
"""

# Rows are locked in the order of their ids, as everywhere.
_FLUSH = text(f"""
WITH lease AS (
    SELECT * FROM json_to_recordset(cast(:leases AS json)) AS r(trial_id int, token uuid)
), reported AS ({_REPORTED}), locked AS (
    SELECT t.trial_id FROM regtune.trials t
    JOIN lease ON lease.trial_id = t.trial_id AND lease.token = t.token
    ORDER BY t.trial_id FOR UPDATE OF t
), held AS (
    UPDATE regtune.trials t
    SET lease_expires_at = coalesce(cast(:now AS timestamptz), now())
                           + make_interval(secs => :seconds),
        epochs = greatest(t.epochs, (
            SELECT max(e.epoch) FROM reported e WHERE e.trial_id = t.trial_id))
    FROM locked WHERE t.trial_id = locked.trial_id
    RETURNING t.trial_id, t.attempt, t.stop_request
), recorded AS (
    INSERT INTO regtune.epochs (trial_id, attempt, epoch, train_loss, validation_loss,
                                validation_score, penalty, sparsity, seconds)
    SELECT held.trial_id, held.attempt, e.epoch, e.train_loss, e.validation_loss,
           e.validation_score, e.penalty, e.sparsity, e.seconds
    FROM reported e JOIN held USING (trial_id)
    ORDER BY held.trial_id, e.epoch
    ON CONFLICT DO NOTHING
    RETURNING trial_id, epoch, validation_loss
), public_values AS ({_SHOW.format(epochs="recorded")})
SELECT trial_id, stop_request FROM held
""")

# An epoch is the same one if it took as long to the last digit.
_RESUME = text(f"""
WITH lease AS (
    SELECT * FROM json_to_recordset(cast(:leases AS json)) AS r(trial_id int, token uuid)
), held AS (
    SELECT t.trial_id, t.study_id, t.number, t.attempt, t.worker FROM regtune.trials t
    JOIN lease ON lease.trial_id = t.trial_id AND lease.token = t.token
    ORDER BY t.trial_id FOR UPDATE OF t
), curve AS (
    SELECT held.attempt, e.* FROM ({_REPORTED}) e JOIN held USING (trial_id)
), former AS (
    SELECT DISTINCT ON (e.trial_id, e.epoch) e.trial_id, e.epoch, e.attempt, curve.attempt AS now
    FROM curve JOIN regtune.epochs e USING (trial_id, epoch)
    WHERE e.attempt < curve.attempt AND e.seconds = curve.seconds
      AND e.validation_loss = curve.validation_loss
    ORDER BY e.trial_id, e.epoch, e.attempt DESC
), moved AS (
    UPDATE regtune.epochs e SET attempt = former.now FROM former
    WHERE e.trial_id = former.trial_id AND e.epoch = former.epoch AND e.attempt = former.attempt
    RETURNING e.trial_id, e.epoch
), added AS (
    INSERT INTO regtune.epochs (trial_id, attempt, epoch, train_loss, validation_loss,
                                validation_score, penalty, sparsity, seconds)
    SELECT trial_id, attempt, epoch, train_loss, validation_loss, validation_score, penalty,
           sparsity, seconds
    FROM curve WHERE NOT EXISTS (
        SELECT FROM moved WHERE moved.trial_id = curve.trial_id AND moved.epoch = curve.epoch)
    ON CONFLICT DO NOTHING RETURNING trial_id
), counted AS (
    UPDATE regtune.trials t SET epochs = greatest(t.epochs, reached.epochs)
    FROM (SELECT trial_id, max(epoch) AS epochs FROM curve GROUP BY trial_id) reached
    WHERE t.trial_id = reached.trial_id
), beyond AS (
    DELETE FROM public.trial_intermediate_values v USING held
    WHERE v.trial_id = held.trial_id AND NOT EXISTS (
        SELECT FROM curve WHERE curve.trial_id = v.trial_id AND curve.epoch = v.step)
), public_values AS ({_SHOW.format(epochs="curve")}), told AS (
    INSERT INTO regtune.events (study_id, number, kind, actor, detail)
    SELECT study_id, number, 'trial_resumed', worker,
           json_build_object('attempt', attempt, 'epoch', curve.epochs)
    FROM held JOIN (SELECT trial_id, max(epoch) AS epochs FROM curve GROUP BY trial_id) curve
         USING (trial_id)
    WHERE trial_id IN (SELECT trial_id FROM moved UNION SELECT trial_id FROM added)
    ORDER BY number
)
SELECT trial_id FROM held
""")

# Optuna gives a pruned trial its last intermediate value, unless that is not a number.
_FINISH = text("""
WITH outcome AS (
    SELECT * FROM json_to_recordset(cast(:outcomes AS json)) AS r(
        trial_id int, token uuid, state text, optuna_state text, reason text, error text,
        value double precision, validation_score double precision, best_epoch int,
        test_loss double precision, test_score double precision,
        validation_loss_spread double precision)
), held AS (
    SELECT t.trial_id FROM regtune.trials t
    JOIN outcome ON outcome.trial_id = t.trial_id AND outcome.token = t.token
    ORDER BY t.trial_id FOR UPDATE OF t
), ended AS (
    UPDATE regtune.trials t
    SET state = o.state, reason = o.reason, error = o.error, value = o.value,
        value_spread = o.validation_loss_spread,
        validation_score = o.validation_score, best_epoch = o.best_epoch,
        test_loss = o.test_loss, test_score = o.test_score,
        token = NULL, lease_expires_at = NULL, stop_request = NULL,
        worker_seconds = t.worker_seconds + t.share * greatest(0, extract(
            epoch FROM coalesce(cast(:now AS timestamptz), now()) - t.leased_at)::float),
        finished_at = coalesce(cast(:now AS timestamptz), now())
    FROM held JOIN outcome o USING (trial_id)
    WHERE t.trial_id = held.trial_id
    RETURNING t.*, o.optuna_state
), charged AS (
    INSERT INTO regtune.charges (study_id, seconds, complete, pruned, failed, cancelled, epochs,
                                 started_at)
    SELECT study_id, coalesce(sum(share * greatest(0, extract(
               epoch FROM finished_at - leased_at)::float)), 0),
           count(*) FILTER (WHERE state = 'complete'), count(*) FILTER (WHERE state = 'pruned'),
           count(*) FILTER (WHERE state = 'failed'), 0, sum(epochs), min(started_at)
    FROM ended GROUP BY study_id
), of_others AS (
    DELETE FROM public.trial_intermediate_values v USING ended
    WHERE ended.attempt > 1 AND ended.state <> 'failed' AND v.trial_id = ended.trial_id
      AND NOT EXISTS (SELECT FROM regtune.epochs e WHERE e.trial_id = ended.trial_id
                      AND e.attempt = ended.attempt AND e.epoch = v.step)
), public_trials AS (
    UPDATE public.trials p
    SET state = ended.optuna_state::public.trialstate,
        datetime_complete = ended.finished_at AT TIME ZONE 'utc'
    FROM ended WHERE p.trial_id = ended.trial_id
), public_values AS (
    INSERT INTO public.trial_values (trial_id, objective, value, value_type)
    SELECT trial_id, 0, CASE WHEN abs(final.value) < 'Infinity' THEN final.value END,
           CASE WHEN final.value = 'Infinity' THEN 'INF_POS'
                WHEN final.value = '-Infinity' THEN 'INF_NEG'
                ELSE 'FINITE' END::public.trialvaluetype
    FROM ended, LATERAL (
        SELECT CASE ended.state WHEN 'complete' THEN ended.value WHEN 'pruned' THEN (
            SELECT e.validation_loss FROM regtune.epochs e
            WHERE e.trial_id = ended.trial_id AND e.attempt = ended.attempt
            ORDER BY e.epoch DESC LIMIT 1) END AS value) final
    WHERE final.value <> 'NaN'
), public_attributes AS (
    INSERT INTO public.trial_user_attributes (trial_id, key, value_json)
    SELECT trial_id, a.key, a.value FROM ended, LATERAL (VALUES
        ('reason', to_json(reason)::text), ('worker', to_json(cast(:worker AS text))::text),
        ('best_epoch', best_epoch::text), ('validation_score', validation_score::text),
        ('validation_loss_spread', value_spread::text),
        ('test_score', test_score::text), ('error', to_json(error)::text)) AS a(key, value)
    WHERE a.value IS NOT NULL
), told AS (
    INSERT INTO regtune.events (study_id, number, kind, actor, detail)
    SELECT study_id, number, 'trial_' || state, :worker, json_strip_nulls(json_build_object(
        'value', CASE WHEN abs(value) < 'Infinity' THEN value END, 'reason', reason))
    FROM ended ORDER BY number
)
SELECT trial_id FROM ended
""")

_REQUEST_STOP = text("""
WITH judged AS (
    SELECT t.trial_id, v.reason
    FROM regtune.trials t
    JOIN json_to_recordset(cast(:verdicts AS json)) AS v(trial_id int, attempt int, reason text)
      ON t.trial_id = v.trial_id AND t.attempt = v.attempt AND t.state = 'running'
    ORDER BY t.trial_id FOR UPDATE OF t
)
UPDATE regtune.trials t SET stop_request = judged.reason
FROM judged WHERE t.trial_id = judged.trial_id
""")
