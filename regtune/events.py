"""The audit trail: who did what, when; and the notifications that wake others up.

Events are written in the transaction of the change they tell of. Their ids are given out before
commit, so a reader that only remembered the last id would miss an event that commits late.
Readers therefore go by (transaction, id), and only as far as no older transaction is still open.
"""

from collections.abc import Mapping, Sequence
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


def notify(session: Session, channel: str, study_id: int) -> None:
    """Wake those who listen on a channel, once this transaction commits."""
    session.execute(
        text("SELECT pg_notify(:channel, cast(:study_id AS text))"),
        {"channel": channel, "study_id": study_id},
    )


def read(session: Session, study_id: int, after: str, limit: int = 1000) -> Sequence[Event]:
    """Return a study's events after a cursor, oldest first; none is ever skipped."""
    transaction_id, event_id = parse_cursor(after)
    rows = session.execute(
        text(
            """
            SELECT transaction_id || '-' || event_id AS cursor,
                   at, study_id, number, kind, actor, detail
            FROM regtune.events
            WHERE study_id = :study_id
              AND (transaction_id, event_id) > (cast(:transaction_id AS xid8), :event_id)
              AND transaction_id < pg_snapshot_xmin(pg_current_snapshot())
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


def parse_cursor(cursor: str) -> tuple[int, int]:
    """Split a cursor into transaction and event; raise ValueError if it is none."""
    transaction_id, _, event_id = cursor.partition("-")
    numbers = int(transaction_id), int(event_id)
    if min(numbers) < 0 or max(numbers) >= 2**63:
        raise ValueError(f"not a cursor: {cursor!r}")
    return numbers
