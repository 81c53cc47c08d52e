"""Who may train what, until when: append, lease, release, expire; a report renews.

A lease is a fresh token on a trial's row. Every later write carries it and touches no row once the
lease is gone. Expiry goes by the database's clock; ``now`` is a parameter so that tests own it.

Locks are always waited for in one order, study before trials and trials by id, so that no two
transactions can wait for each other in a ring. Who holds trials already, as a worker does that has
just recorded their epochs, does not wait for the study; it asks again in another transaction.
"""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from optuna.distributions import BaseDistribution, distribution_to_json
from sqlalchemy import Row, text
from sqlalchemy.orm import Session

from regtune import events, shares, studies
from regtune.database import WORK, WORK_FOR
from regtune.errors import StaleView
from regtune.space import plain_name
from regtune.spec import NO_SHAPE


@dataclass(frozen=True)
class Suggestion:
    """A trial to be: what the sampler said, and what will be trained for it.

    ``suggested`` is what Optuna stores; ``params`` are the values used, zeros and fixed ones
    included; ``system_attrs`` is the sampler's own note on the trial, ``shape`` what of ``params``
    changes tensors or programs.
    """

    kind: str
    suggested: Mapping[str, Any]
    distributions: Mapping[str, BaseDistribution]
    params: Mapping[str, Any]
    system_attrs: Mapping[str, Any]
    shape: str = NO_SHAPE


@dataclass(frozen=True)
class Lease:
    """The right to train one trial, for as long as its token stands on the trial's row."""

    trial_id: int
    study_id: int
    number: int
    attempt: int
    token: UUID
    params: Mapping[str, Any]
    lost_leases: int = 0


@dataclass(frozen=True)
class Taken:
    """What a worker gets that asks for trials.

    ``turn`` is the study that its free lanes should go to, None if none has a trial for it.
    ``more_to_come`` says whether its own study has trials that no worker has begun, or may still
    get some. ``busy`` says that the study was locked, and should be asked again.
    """

    turn: int | None
    leases: Sequence[Lease]
    more_to_come: bool
    busy: bool = False


def append(
    session: Session,
    study_id: int,
    suggestions: Sequence[Suggestion],
    *,
    expected: int,
    alive_seconds: float | None = None,
    turns: int = 1,
    actor: str = "scheduler",
) -> Sequence[int]:
    """Append waiting trials to an active study within its budget; return their trial ids.

    Workers that can train them are woken, those that have been silent for ``alive_seconds`` aside;
    as many as it takes if each of their lanes gets through so many ``turns``.
    ``expected`` is the number that the first one will get. Raise StaleView if it is taken, that
    is, if another scheduler has appended in the meantime. Return nothing if the study is not
    active any more. Numbers are contiguous: the study's row is locked while they are given out.
    """
    study = studies.lock(session, study_id)
    if study.appended != expected:
        raise StaleView(f"trial {expected} of study {study.name!r} exists already")
    room = studies.room(session, study)
    if study.state != "active" or not suggestions[:room]:
        return []
    rows = [_row(expected + i, suggestion) for i, suggestion in enumerate(suggestions[:room])]
    trial_ids = session.execute(
        _APPEND,
        {
            "study_id": study_id,
            "rows": json.dumps(rows),
            "actor": actor,
            "alive_seconds": alive_seconds,
            "turns": turns,
            "work": WORK,
            "work_for": WORK_FOR,
        },
    ).scalars()
    return sorted(trial_ids)


def call_everybody(session: Session, study_id: int, alive_seconds: float) -> None:
    """Wake all workers for a study's waiting trials, if one that can train them has an empty lane.

    Workers that have been silent for ``alive_seconds`` have none.
    """
    session.execute(
        _CALL_EVERYBODY, {"study_id": study_id, "alive_seconds": alive_seconds, "work": WORK}
    )


def _row(number: int, suggestion: Suggestion) -> dict[str, Any]:
    """Put a suggestion into the form in which Optuna keeps it."""
    return {
        "number": number,
        "kind": suggestion.kind,
        "params": dict(suggestion.params),
        "shape": suggestion.shape,
        "suggested": [
            {
                "name": name,
                "value": suggestion.distributions[name].to_internal_repr(value),
                "distribution": distribution_to_json(suggestion.distributions[name]),
            }
            for name, value in suggestion.suggested.items()
        ],
        "user_attrs": [
            {"key": key, "value": json.dumps(value)}
            for key, value in _user_attrs(suggestion).items()
        ],
        "system_attrs": [
            {"key": key, "value": json.dumps(value)}
            for key, value in suggestion.system_attrs.items()
        ],
    }


def _user_attrs(suggestion: Suggestion) -> dict[str, Any]:
    """Return what the dashboard shows beside a trial: its kind, and the values that are used.

    Not those that are the same in all trials of the study: the dashboard goes through all of them
    at each of its polls. Where the optimizer is searched, a value that is not may go by it.
    """
    searched = {plain_name(label) for label in suggestion.distributions}
    by_optimizer = "optimizer" in searched
    used = {
        f"used_{name}": value
        for name, value in suggestion.params.items()
        if by_optimizer or name in searched
    }
    return {"kind": suggestion.kind, **used}


def lease(
    session: Session,
    study_id: int,
    worker: str,
    count: int,
    seconds: float,
    *,
    shape: str = NO_SHAPE,
    slots: int = 1,
    suspect_from: int | None = None,
    alone: bool = False,
    now: datetime | None = None,
) -> Sequence[Lease]:
    """Lease up to ``count`` waiting trials of a shape for a worker, lowest number first.

    None unless the study is active.

    ``slots`` is how many trials of this study the worker could train at once.
    Trials that have lost ``suspect_from`` leases are suspected of killing their workers; they are
    passed over, but for one where no other waits and the worker is ``alone`` with it.
    """
    rows = session.execute(
        _LEASE,
        {
            "study_id": study_id,
            "worker": worker,
            "shape": shape,
            "count": count,
            "seconds": seconds,
            "share": 1 / slots,
            "suspect_from": suspect_from,
            "alone": alone,
            "now": now,
        },
    )
    return _leases(rows)


def take(
    session: Session,
    study_id: int,
    worker: str,
    count: int,
    seconds: float,
    *,
    shape: str,
    slots: int,
    suspect_from: int,
    alone: bool,
    stay_seconds: float,
    refused: Collection[int] = (),
    waits: bool = True,
    now: datetime | None = None,
) -> Taken:
    """Ask whose turn it is, as ``shares.choose`` does, and if it is this study's, lease trials.

    Otherwise as ``lease``, and in one statement as that. ``waits`` says whether to wait while
    somebody else has locked the study, which nobody may who has locked any of its trials.
    """
    rows = session.execute(
        _TAKE if waits else _TAKE_WITHOUT_WAITING,
        {
            "study_id": study_id,
            "worker": worker,
            "shape": shape,
            "count": count,
            "seconds": seconds,
            "share": 1 / slots,
            "suspect_from": suspect_from,
            "alone": alone,
            "current": study_id,
            "stay": stay_seconds,
            "refused": list(refused),
            "now": now,
        },
    ).all()
    leases = _leases(row for row in rows if row.trial_id is not None)
    return Taken(rows[0].turn, leases, bool(rows[0].more_to_come), rows[0].busy)


def _leases(rows: Iterable[Row[Any]]) -> Sequence[Lease]:
    leases = (Lease(*(getattr(row, name) for name in Lease.__dataclass_fields__)) for row in rows)
    return sorted(leases, key=lambda lease: lease.number)


def release(
    session: Session, leases: Iterable[Lease], worker: str, *, now: datetime | None = None
) -> Sequence[int]:
    """Give trials back that their worker was told to leave; return the ids that were still its.

    They wait again, without having lost a lease; in a study that is stopping they are cancelled.
    """
    by_study: dict[int, list[Lease]] = {}
    for lease in leases:
        by_study.setdefault(lease.study_id, []).append(lease)
    given_up: list[int] = []
    for study_id, held in sorted(by_study.items()):
        share_study(session, study_id)
        reason = f"released by {worker}"
        given_up += _give_up(session, _tokens(held), reason, worker, 0, None, now)
    return given_up


def expire(
    session: Session, study_id: int, max_attempts: int, *, now: datetime | None = None
) -> Sequence[int]:
    """Take back the leases of a study that have run out; return the trial ids.

    The trials wait again under the same numbers; one that has lost ``max_attempts`` leases fails.
    """
    share_study(session, study_id)
    rows = session.execute(_EXPIRED, {"study_id": study_id, "now": now}).all()
    if not rows:
        return []
    tokens = json.dumps([{"trial_id": row.trial_id, "token": str(row.token)} for row in rows])
    return _give_up(session, tokens, "its lease ran out", "scheduler", 1, max_attempts, now)


def share_study(session: Session, study_id: int) -> None:
    """Hold off whoever wants to stop the study until this transaction has given its trials back.

    Else a trial could go back to waiting just after the waiting ones were withdrawn. Who is to give
    trials back and to record epochs of others does this first, for the order of locks.
    """
    session.execute(
        text("SELECT FROM regtune.studies WHERE study_id = :study_id FOR SHARE"),
        {"study_id": study_id},
    )


def _give_up(
    session: Session,
    tokens: str,
    reason: str,
    actor: str,
    lost: int,
    max_attempts: int | None,
    now: datetime | None,
) -> Sequence[int]:
    rows = session.execute(
        _GIVE_UP,
        {
            "tokens": tokens,
            "reason": reason,
            "actor": actor,
            "lost": lost,
            "max_attempts": max_attempts,
            "now": now,
        },
    ).all()
    for study_id in {row.study_id for row in rows}:
        events.notify(session, WORK, study_id)
    return [row.trial_id for row in rows]


def _tokens(leases: Iterable[Lease]) -> str:
    return json.dumps([{"trial_id": lease.trial_id, "token": str(lease.token)} for lease in leases])


# Of the live studies alone: trials that have ended may be a hundred thousand.
_HELD = """
    SELECT t.worker AS name, count(*) AS trials
    FROM regtune.studies s JOIN regtune.trials t USING (study_id)
    WHERE s.state IN ('active', 'paused', 'stopping') AND t.state = 'running' GROUP BY t.worker
"""

_CALL_EVERYBODY = text(f"""
WITH held AS ({_HELD})
SELECT pg_notify(:work, cast(:study_id AS text))
WHERE EXISTS (
    SELECT FROM regtune.workers w JOIN regtune.studies s ON s.study_id = :study_id
    LEFT JOIN held ON held.name = w.name
    WHERE w.wanted_lanes > 0 AND coalesce(trials, 0) < w.lanes
      AND {shares.ALIVE} AND {shares.SUITS})
""")

_APPEND = text(f"""
WITH row AS (
    SELECT * FROM json_to_recordset(cast(:rows AS json)) AS r(
        number int, kind text, params jsonb, shape text, suggested json, user_attrs json,
        system_attrs json)
), trial AS (
    INSERT INTO public.trials (number, study_id, state)
    SELECT number, :study_id, 'WAITING' FROM row ORDER BY number
    RETURNING trial_id, number
), params AS (
    INSERT INTO public.trial_params (trial_id, param_name, param_value, distribution_json)
    SELECT trial_id, p.name, p.value, p.distribution
    FROM row JOIN trial USING (number), json_to_recordset(row.suggested)
         AS p(name text, value double precision, distribution text)
), user_attrs AS (
    INSERT INTO public.trial_user_attributes (trial_id, key, value_json)
    SELECT trial_id, a.key, a.value
    FROM row JOIN trial USING (number), json_to_recordset(row.user_attrs) AS a(key text, value text)
), system_attrs AS (
    INSERT INTO public.trial_system_attributes (trial_id, key, value_json)
    SELECT trial_id, a.key, a.value
    FROM row JOIN trial USING (number),
         json_to_recordset(row.system_attrs) AS a(key text, value text)
), ours AS (
    INSERT INTO regtune.trials (trial_id, study_id, number, kind, params, shape, state)
    SELECT trial_id, :study_id, number, kind, params, shape, 'waiting'
    FROM row JOIN trial USING (number)
), counted AS (
    UPDATE regtune.studies SET appended = appended + (SELECT count(*) FROM row)
    WHERE study_id = :study_id
), told AS (
    INSERT INTO regtune.events (study_id, number, kind, actor)
    SELECT :study_id, number, 'trial_appended', :actor FROM row ORDER BY number
), held AS ({_HELD}), called AS (
    -- As many as it takes, not a whole fleet for a few trials: those with room first, and of them
    -- those that have built the study and were heard of lately, then those that may get some before
    -- this commits, who would find nothing and then hear of it too late.
    -- A killed worker still wants lanes, and once its leases have run out it has room.
    SELECT name
    FROM (SELECT name, sum(lanes) OVER (ORDER BY free DESC, here DESC, heartbeat_at DESC, name)
                       - lanes AS before
          FROM (SELECT w.name, w.heartbeat_at, coalesce(trials, 0) < w.lanes AS free,
                       coalesce(w.study_id = s.study_id AND w.heartbeat_at > now()
                           - make_interval(secs => cast(:alive_seconds AS float) / 2), false)
                           AS here,
                       CASE WHEN coalesce(trials, 0) < w.lanes THEN w.lanes - coalesce(trials, 0)
                       ELSE least(w.lanes, w.wanted_lanes) END AS lanes
                FROM regtune.workers w JOIN regtune.studies s ON s.study_id = :study_id
                LEFT JOIN held ON held.name = w.name
                WHERE w.wanted_lanes > 0 AND w.stopped_at IS NULL AND {shares.SUITS}
                  AND coalesce(w.heartbeat_at > now() - make_interval(
                      secs => cast(:alive_seconds AS float)), true)) wanting) counted
    WHERE :turns * before < 2 + (SELECT count(*) FROM row)
), woken AS (
    SELECT pg_notify(:work_for || md5(name), cast(:study_id AS text)) FROM called
    UNION ALL
    SELECT pg_notify(:work, cast(:study_id AS text)) WHERE NOT EXISTS (SELECT FROM called)
)
SELECT trial_id, (SELECT count(*) FROM woken) FROM trial
""")

# The study's row is locked first and shared, so that whoever pauses or cancels it waits for this
# statement, or this one for them and then finds nothing. A trial whose state has changed since the
# snapshot is looked at again when its lock is had, and left alone.
_LEASING = """
study AS MATERIALIZED (
    SELECT study_id FROM regtune.studies
    WHERE study_id = :study_id AND state = 'active' {and_more} FOR SHARE {or_what}
), harmless AS (
    SELECT t.trial_id FROM regtune.trials t
    WHERE t.study_id = (SELECT study_id FROM study) AND t.shape = :shape AND t.state = 'waiting'
      AND coalesce(t.lost_leases < cast(:suspect_from AS int), true)
    ORDER BY t.number LIMIT :count FOR UPDATE OF t SKIP LOCKED
), suspect AS (
    SELECT t.trial_id FROM regtune.trials t
    WHERE :alone AND NOT EXISTS (SELECT FROM harmless)
      AND t.study_id = (SELECT study_id FROM study) AND t.shape = :shape AND t.state = 'waiting'
      AND t.lost_leases >= cast(:suspect_from AS int)
    ORDER BY t.number LIMIT least(1, cast(:count AS int)) FOR UPDATE OF t SKIP LOCKED
), picked AS (
    SELECT trial_id FROM harmless UNION ALL SELECT trial_id FROM suspect
), leased AS (
    UPDATE regtune.trials t
    SET state = 'running', attempt = t.attempt + 1, token = gen_random_uuid(), worker = :worker,
        stop_request = NULL,
        lease_expires_at = coalesce(cast(:now AS timestamptz), now())
                           + make_interval(secs => :seconds),
        leased_at = coalesce(cast(:now AS timestamptz), now()), share = :share,
        started_at = coalesce(t.started_at, cast(:now AS timestamptz), now())
    FROM picked WHERE t.trial_id = picked.trial_id
    RETURNING t.trial_id, t.study_id, t.number, t.attempt, t.token, t.params, t.lost_leases,
              t.started_at
), public_trials AS (
    UPDATE public.trials o
    SET state = 'RUNNING', datetime_start = leased.started_at AT TIME ZONE 'utc'
    FROM leased WHERE o.trial_id = leased.trial_id
), told AS (
    INSERT INTO regtune.events (study_id, number, kind, actor, detail)
    SELECT study_id, number, 'trial_started', :worker, json_build_object('attempt', attempt)
    FROM leased ORDER BY number
)
"""

_LEASE = text(f"""
WITH {_LEASING.format(and_more="", or_what="")}
SELECT trial_id, study_id, number, attempt, token, params, lost_leases FROM leased
""")

_TAKING = f"""
{shares.TURN}, {_LEASING}, more AS (
    SELECT s.state = 'active' AND (s.appended < s.budget_trials OR EXISTS (
        SELECT FROM regtune.trials t WHERE t.study_id = s.study_id AND t.state = 'waiting'
           AND t.trial_id NOT IN (SELECT trial_id FROM picked))) AS more_to_come
    FROM regtune.studies s WHERE s.study_id = :study_id
)
SELECT turn.study_id AS turn, more.more_to_come,
       cast(:count AS int) > 0 AND coalesce(turn.study_id = :study_id, false)
       AND NOT EXISTS (SELECT FROM study) AS busy,
       leased.trial_id, leased.study_id, number, attempt, token, params, lost_leases
FROM (VALUES (1)) one LEFT JOIN turn ON true LEFT JOIN more ON true LEFT JOIN leased ON true
"""
_IF_ITS_TURN = "AND study_id = (SELECT study_id FROM turn)"
_TAKE = text(_TAKING.format(and_more=_IF_ITS_TURN, or_what=""))
_TAKE_WITHOUT_WAITING = text(_TAKING.format(and_more=_IF_ITS_TURN, or_what="SKIP LOCKED"))

# A worker that is renewing right now holds the lock, and its lease is alive after all.
_EXPIRED = text("""
SELECT trial_id, token FROM regtune.trials
WHERE study_id = :study_id AND state = 'running'
  AND lease_expires_at < coalesce(cast(:now AS timestamptz), now())
ORDER BY trial_id FOR UPDATE SKIP LOCKED
""")

_GIVE_UP = text("""
WITH token AS (
    SELECT * FROM json_to_recordset(cast(:tokens AS json)) AS r(trial_id int, token uuid)
), held AS (
    SELECT t.trial_id, s.state AS study_state FROM regtune.trials t
    JOIN token ON token.trial_id = t.trial_id AND token.token = t.token
    JOIN regtune.studies s ON s.study_id = t.study_id
    ORDER BY t.trial_id FOR UPDATE OF t
), given_up AS (
    UPDATE regtune.trials t
    SET token = NULL, lease_expires_at = NULL, stop_request = NULL,
        lost_leases = t.lost_leases + :lost,
        worker_seconds = t.worker_seconds + t.share * greatest(0, extract(
            epoch FROM coalesce(cast(:now AS timestamptz), now()) - t.leased_at)::float),
        state = outcome.state,
        reason = CASE outcome.state WHEN 'cancelled' THEN 'the study was stopped'
                 WHEN 'failed' THEN 'lost ' || t.lost_leases + :lost || ' leases; the last one: '
                                    || :reason END,
        finished_at = CASE WHEN outcome.state <> 'waiting'
                      THEN coalesce(cast(:now AS timestamptz), now()) END
    FROM held, LATERAL (SELECT CASE
        WHEN held.study_state NOT IN ('active', 'paused') THEN 'cancelled'
        WHEN (SELECT lost_leases FROM regtune.trials l WHERE l.trial_id = held.trial_id) + :lost
             >= cast(:max_attempts AS int) THEN 'failed'
        ELSE 'waiting' END AS state) outcome
    WHERE t.trial_id = held.trial_id
    RETURNING t.trial_id, t.study_id, t.number, t.state, t.reason, t.finished_at, t.share,
              t.leased_at, t.epochs, t.started_at
), charged AS (
    INSERT INTO regtune.charges (study_id, seconds, complete, pruned, failed, cancelled, epochs,
                                 started_at)
    SELECT study_id, coalesce(sum(share * greatest(0, extract(
               epoch FROM coalesce(cast(:now AS timestamptz), now()) - leased_at)::float)), 0),
           0, 0, count(*) FILTER (WHERE state = 'failed'),
           count(*) FILTER (WHERE state = 'cancelled'),
           coalesce(sum(epochs) FILTER (WHERE state <> 'waiting'), 0),
           min(started_at) FILTER (WHERE state <> 'waiting')
    FROM given_up GROUP BY study_id
), public_trials AS (
    UPDATE public.trials o
    SET state = CASE WHEN given_up.state = 'waiting' THEN 'WAITING'
                ELSE 'FAIL' END::public.trialstate,
        datetime_complete = given_up.finished_at AT TIME ZONE 'utc'
    FROM given_up WHERE o.trial_id = given_up.trial_id
), attributes AS (
    INSERT INTO public.trial_user_attributes (trial_id, key, value_json)
    SELECT trial_id, 'reason', to_json(reason) FROM given_up WHERE reason IS NOT NULL
), told AS (
    INSERT INTO regtune.events (study_id, number, kind, actor, detail)
    SELECT study_id, number, 'trial_' || CASE state WHEN 'waiting' THEN 'given_back' ELSE state END,
           :actor, json_build_object('reason', coalesce(reason, cast(:reason AS text)))
    FROM given_up ORDER BY number
)
SELECT trial_id, study_id FROM given_up
""")
