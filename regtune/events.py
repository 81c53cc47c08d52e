"""The audit trail: who did what, when; and the notifications that wake others up.

Events are written in the transaction of the change they tell of. Their ids are given out before
commit, so a reader that only remembered the last id would miss an event that commits late.
Readers therefore go by (transaction, id), and only as far as no older transaction is still open.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import insert, text
from sqlalchemy.orm import Session

from regtune import tables


@dataclass(frozen=True)
class Event:
    """One thing that happened to a study, or to the trial ``number`` of it."""

    cursor: str
    at: datetime
    study_id: int
    number: int | None
    kind: str
    actor: str
    detail: Mapping[str, Any]


_READABLE = "transaction_id < pg_snapshot_xmin(pg_current_snapshot())"
"""Whether an event may be told: nothing that is still open can come before it."""

START = "0-0"
"""The cursor before the first event."""


def record(
    session: Session,
    study_id: int,
    kind: str,
    actor: str,
    *,
    number: int | None = None,
    detail: Mapping[str, Any] | None = None,
) -> None:
    """Write one event."""
    session.execute(
        insert(tables.events).values(
            study_id=study_id, kind=kind, actor=actor, number=number, detail=dict(detail or {})
        )
    )


def record_deletion(session: Session, study_id: int, name: str, actor: str) -> None:
    """Write that a study was deleted, so that its history can still be found by its name."""
    record(session, study_id, _DELETED, actor, detail={"name": name})


def was_deleted(session: Session, name: str) -> bool:
    """Say whether there was a study of this name once, and has been deleted."""
    query = text(f"SELECT EXISTS ({_DELETED_STUDIES})")
    return bool(session.execute(query, {"name": name}).scalar())


def newest(session: Session, study_ids: Iterable[int]) -> Mapping[int, str]:
    """Return the cursor of the last event that can be read of each study, by the study's id."""
    rows = session.execute(_NEWEST, {"study_ids": list(study_ids)})
    return {row.study_id: row.cursor for row in rows}


def notify(session: Session, channel: str, study_id: int) -> None:
    """Wake those who listen on a channel, once this transaction commits."""
    session.execute(_NOTIFY, {"channel": channel, "study_id": study_id})


def history(
    session: Session, name: str, *, trials: bool, after: int | None, up: bool, limit: int
) -> Sequence[Event]:
    """Return what was done to the study of a name, and to those that bore it and were deleted.

    Ordered by event id, oldest first if ``up``, from ``after`` on. ``trials`` says whether what
    happened to single trials belongs to it; of a deleted study, that is gone.
    """
    order, beyond = ("ASC", ">") if up else ("DESC", "<")
    rows = session.execute(
        text(
            f"""
            SELECT transaction_id || '-' || event_id AS cursor,
                   at, study_id, number, kind, actor, detail
            FROM regtune.events
            WHERE study_id IN (
                SELECT study_id FROM regtune.studies WHERE name = :name
                UNION {_DELETED_STUDIES})
              {"" if trials else "AND number IS NULL"}
              AND (cast(:after AS bigint) IS NULL OR event_id {beyond} :after)
            ORDER BY event_id {order}
            LIMIT :limit
            """
        ),
        {"name": name, "after": after, "limit": limit},
    )
    return [Event(**row._mapping) for row in rows]


def read(session: Session, study_id: int, after: str, limit: int = 1000) -> Sequence[Event]:
    """Return a study's events after a cursor, oldest first; none is ever skipped."""
    transaction_id, event_id = parse_cursor(after)
    rows = session.execute(
        text(
            f"""
            SELECT transaction_id || '-' || event_id AS cursor,
                   at, study_id, number, kind, actor, detail
            FROM regtune.events
            WHERE study_id = :study_id
              AND (transaction_id, event_id) > (cast(:transaction_id AS xid8), :event_id)
              AND {_READABLE}
            ORDER BY transaction_id, event_id
            LIMIT :limit
            """
        ),
        {
            "study_id": study_id,
            "transaction_id": str(transaction_id),
            "event_id": event_id,
            "limit": limit,
        },
    )
    return [Event(**row._mapping) for row in rows]


_NEWEST = text(f"""
SELECT asked.study_id, last.cursor
FROM unnest(cast(:study_ids AS int[])) AS asked(study_id), LATERAL (
    SELECT transaction_id || '-' || event_id AS cursor FROM regtune.events e
    WHERE e.study_id = asked.study_id
      AND {_READABLE}
    ORDER BY transaction_id DESC, event_id DESC LIMIT 1) last
""")

_NOTIFY = text("SELECT pg_notify(:channel, cast(:study_id AS text))")

_DELETED = "study_deleted"

_DELETED_STUDIES = f"""
SELECT study_id FROM regtune.events WHERE kind = '{_DELETED}' AND detail ->> 'name' = :name
"""


def parse_cursor(cursor: str) -> tuple[int, int]:
    """Split a cursor into transaction and event; raise ValueError if it is none."""
    transaction_id, _, event_id = cursor.partition("-")
    numbers = int(transaction_id), int(event_id)
    if min(numbers) < 0 or max(numbers) >= 2**63:
        raise ValueError(f"not a cursor: {cursor!r}")
    return numbers
