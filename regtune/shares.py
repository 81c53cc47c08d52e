"""How studies share the workers: by weight, measured in the workers' time.

A trial holds a part of its worker, one slot of so many, from its lease to its end. What that makes
of the worker's time is charged to its study, divided by the study's priority: its virtual time, as
in fair queueing (Demers, Keshav & Shenker 1989). The next free lanes go to the study whose virtual
time is least, so in the long run studies that want lanes get them in proportion to their
priorities, however long their trials are.

A lease that ends leaves a charge, in the statement that ends it: what it took, and what became of
its trial. Charges are taken in when the shares are settled, which a scheduler does at every poll.
Running leases are counted up to the moment of the choice. A study that wanted nothing for a while
has saved nothing up: it joins where the others stand.
"""

from collections.abc import Collection
from datetime import datetime

from sqlalchemy import text
from sqlalchemy.orm import Session

from regtune import tables


def enter(session: Session, study_id: int) -> None:
    """Let a study that is new, or goes on after a pause, join where the others stand."""
    session.execute(_ENTER, {"study_id": study_id})


def settle(session: Session, *, now: datetime | None = None) -> None:
    """Charge studies for what they have had since the last time, each lease once.

    It reads what is running or has ended since, however many trials there were before.
    """
    # In a statement of its own: what another replica has settled meanwhile is seen by the next.
    locked = session.execute(_LOCK, {"live": list(tables.LIVE_STUDY_STATES)})
    session.execute(_SETTLE, {"study_ids": list(locked.scalars()), "now": now})


def choose(
    session: Session,
    worker: str,
    *,
    current: int | None = None,
    stay_seconds: float = 0.0,
    refused: Collection[int] = (),
    now: datetime | None = None,
) -> int | None:
    """Return the study that a worker's free lanes should go to; None if none has a trial for it.

    It stays with its ``current`` study until that has had ``stay_seconds`` of this worker more than
    its due, and goes where few others are: what the others hold is counted as if they kept it for
    ``stay_seconds`` more. ``refused`` are studies that it cannot train.
    """
    return session.execute(
        _CHOOSE,
        {
            "worker": worker,
            "current": current,
            "stay": stay_seconds,
            "refused": list(refused),
            "now": now,
        },
    ).scalar()


def longest_waiting(session: Session) -> int | None:
    """Return the trial that has waited longest for a worker, of any study; None if none waits.

    It asks far less than whose turn it is.
    """
    trial_id: int | None = session.execute(_LONGEST_WAITING).scalar()
    return trial_id


SUITS = """
CASE WHEN jsonb_exists(s.spec -> 'task', 'name')
     THEN jsonb_exists(w.tasks, s.spec -> 'task' ->> 'name')
     ELSE jsonb_exists(w.datasets, s.spec -> 'task' ->> 'dataset')
          AND jsonb_exists(w.models, s.spec -> 'task' ->> 'model') END
AND coalesce(s.spec -> 'requires' ->> 'device', w.device_kind) = w.device_kind
AND coalesce(cast(s.spec -> 'requires' ->> 'min_memory_gb' AS float), 0) * 1e9
    <= coalesce(w.memory_bytes, 0)
"""
"""Whether the worker ``w`` can train the study ``s``."""

ALIVE = """
w.stopped_at IS NULL AND w.heartbeat_at > now() - make_interval(secs => :alive_seconds)
"""
"""Whether the worker ``w`` has been heard of in the last ``alive_seconds``, and has not left."""

# Studies that run nothing have no part in where the others stand, unless none runs anything.
_ENTER = text("""
INSERT INTO regtune.shares (study_id, virtual_seconds)
SELECT :study_id, coalesce(min(sh.virtual_seconds) FILTER (WHERE EXISTS (
           SELECT FROM regtune.trials t
           WHERE t.study_id = sh.study_id AND t.state = 'running')),
       max(sh.virtual_seconds), 0)
FROM regtune.shares sh JOIN regtune.studies s USING (study_id)
WHERE s.state = 'active' AND s.study_id <> :study_id
ON CONFLICT (study_id) DO UPDATE
SET virtual_seconds = greatest(regtune.shares.virtual_seconds, excluded.virtual_seconds)
""")

_LOCK = text("""
SELECT sh.study_id FROM regtune.shares sh JOIN regtune.studies s USING (study_id)
WHERE s.state = ANY(:live) OR sh.study_id IN (SELECT study_id FROM regtune.charges)
ORDER BY sh.study_id FOR UPDATE OF sh
""")

_SETTLE = text("""
WITH clock AS (
    SELECT coalesce(cast(:now AS timestamptz), now()) AS now
), charge AS (
    DELETE FROM regtune.charges WHERE study_id = ANY(:study_ids) RETURNING *
), taken AS (
    SELECT study_id, sum(seconds) AS seconds, sum(complete) AS complete, sum(pruned) AS pruned,
           sum(failed) AS failed, sum(cancelled) AS cancelled, sum(epochs) AS epochs,
           min(started_at) AS started_at
    FROM charge GROUP BY study_id
), settled AS MATERIALIZED (
    SELECT sh.study_id, s.priority, sh.virtual_seconds, sh.worker_seconds,
           sh.ended_seconds + coalesce(taken.seconds, 0) AS ended,
           (SELECT sum(t.share * greatest(0, extract(epoch FROM clock.now - t.leased_at)::float))
            FROM regtune.trials t
            WHERE t.study_id = sh.study_id AND t.state = 'running') AS running,
           EXISTS (SELECT FROM regtune.trials t
                   WHERE t.study_id = sh.study_id AND t.state IN ('waiting', 'running')) AS is_open
    FROM regtune.shares sh JOIN regtune.studies s USING (study_id)
    LEFT JOIN taken USING (study_id) CROSS JOIN clock
    WHERE sh.study_id = ANY(:study_ids)
), charged AS (
    SELECT study_id, ended, ended + coalesce(running, 0) AS seconds, running IS NOT NULL AS runs,
           is_open, virtual_seconds
           + (ended + coalesce(running, 0) - worker_seconds) / priority AS virtual
    FROM settled
)
UPDATE regtune.shares sh
SET worker_seconds = charged.seconds, ended_seconds = charged.ended, settled_at = clock.now,
    virtual_seconds = CASE WHEN charged.is_open THEN charged.virtual ELSE greatest(
        charged.virtual, (SELECT min(virtual) FROM charged WHERE runs)) END,
    complete = sh.complete + coalesce(taken.complete, 0),
    pruned = sh.pruned + coalesce(taken.pruned, 0),
    failed = sh.failed + coalesce(taken.failed, 0),
    cancelled = sh.cancelled + coalesce(taken.cancelled, 0),
    ended_epochs = sh.ended_epochs + coalesce(taken.epochs, 0),
    started_at = least(sh.started_at, taken.started_at)
FROM charged LEFT JOIN taken USING (study_id) CROSS JOIN clock
WHERE sh.study_id = charged.study_id
""")

# Who is the only one need not be compared.
TURN = f"""
WITH clock AS (
    SELECT coalesce(cast(:now AS timestamptz), now()) AS now
), candidate AS (
    SELECT s.study_id, s.priority, sh.virtual_seconds, sh.settled_at
    FROM regtune.studies s JOIN regtune.shares sh USING (study_id)
    JOIN regtune.workers w ON w.name = :worker
    WHERE s.state = 'active' AND s.study_id <> ALL(cast(:refused AS int[])) AND {SUITS}
      AND EXISTS (SELECT FROM regtune.trials t
                  WHERE t.study_id = s.study_id AND t.state = 'waiting')
), counted AS (
    SELECT candidate.*, coalesce(held.elsewhere, 0) AS elsewhere, coalesce(held.unsettled, 0)
           AS unsettled
    FROM candidate, clock, LATERAL (
        SELECT sum(t.share) FILTER (WHERE t.worker <> :worker) AS elsewhere,
               sum(t.share * greatest(0, extract(
                   epoch FROM clock.now - greatest(t.leased_at, candidate.settled_at))::float))
               AS unsettled
        FROM regtune.trials t
        WHERE t.study_id = candidate.study_id AND t.state = 'running'
          AND (SELECT count(*) FROM candidate) > 1) held
), turn AS (
    SELECT study_id FROM counted
    ORDER BY virtual_seconds + (unsettled + :stay * (
        elsewhere - CASE study_id WHEN :current THEN 1 ELSE 0 END)) / priority, study_id
    LIMIT 1
)
"""
"""The study that a worker's free lanes should go to, for a statement to begin with."""

_CHOOSE = text(f"{TURN} SELECT study_id FROM turn")

_LONGEST_WAITING = text("""
SELECT min(first.trial_id)
FROM regtune.studies s, LATERAL (
    SELECT t.trial_id FROM regtune.trials t
    WHERE t.study_id = s.study_id AND t.state = 'waiting' ORDER BY t.number LIMIT 1) first
WHERE s.state = 'active'
""")
