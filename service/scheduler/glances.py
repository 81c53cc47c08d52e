"""A glance at the studies that a scheduler leads: is there anything for it to do?

Trials end, and lanes are wanted, all the time, so nobody is notified of it: with each notification
PostgreSQL wakes every session that listens in the database. One statement for all studies is asked
instead, a few times a second.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import text
from sqlalchemy.orm import Session

from regtune.errors import NotFound
from regtune.shares import ALIVE, SUITS


@dataclass(frozen=True)
class Glance:
    """How a study's open trials stand, and what workers want of it, at one moment."""

    waiting: int
    waiting_suspects: int
    """Of those that wait, the ones that train alone, when nothing else is left to train."""
    suspects: Sequence[int]
    """The numbers of such trials, those that train already included."""
    first_waiting: int | None
    """The lowest number of those that wait."""
    running: int
    overdue: int
    """Running trials whose leases have run out."""
    epochs: int
    """Trained by the open trials."""
    wanted_lanes: int
    """How many lanes the living workers that can train the study want filled."""

    @property
    def open(self) -> int:
        """Trials that have not ended."""
        return self.waiting + self.running


def of(session: Session, study_id: int, alive_seconds: float, suspect_from: int) -> Glance:
    """Return a glance at one study; raise NotFound if it has been deleted."""
    try:
        return of_each(session, [study_id], alive_seconds, suspect_from)[study_id]
    except KeyError:
        raise NotFound("the study has been deleted") from None


def of_each(
    session: Session, study_ids: Iterable[int], alive_seconds: float, suspect_from: int
) -> Mapping[int, Glance]:
    """Return a glance at each study, by id; those that have been deleted are left out.

    Workers that have been silent for ``alive_seconds`` want nothing. Trials that have lost
    ``suspect_from`` leases are suspects.
    """
    rows = session.execute(
        _GLANCES,
        {
            "study_ids": list(study_ids),
            "alive_seconds": alive_seconds,
            "suspect_from": suspect_from,
        },
    ).mappings()
    return {
        row["study_id"]: Glance(**{key: row[key] for key in row if key != "study_id"})
        for row in rows
    }


# Of the open trials alone: those that have ended may be a hundred thousand.
_GLANCES = text(f"""
SELECT s.study_id, counted.*, wanted.*
FROM regtune.studies s, LATERAL (
    SELECT count(*) FILTER (WHERE t.state = 'waiting') AS waiting,
           count(*) FILTER (WHERE t.state = 'waiting' AND t.lost_leases >= :suspect_from)
               AS waiting_suspects,
           coalesce(array_agg(t.number) FILTER (WHERE t.lost_leases >= :suspect_from), '{{}}')
               AS suspects,
           min(t.number) FILTER (WHERE t.state = 'waiting') AS first_waiting,
           count(*) FILTER (WHERE t.state = 'running') AS running,
           count(*) FILTER (WHERE t.state = 'running' AND t.lease_expires_at < now()) AS overdue,
           coalesce(sum(t.epochs), 0) AS epochs
    FROM regtune.trials t
    WHERE t.study_id = s.study_id AND t.state IN ('waiting', 'running')) counted, LATERAL (
    SELECT coalesce(sum(w.wanted_lanes), 0)::int AS wanted_lanes
    FROM regtune.workers w
    WHERE w.wanted_lanes > 0 AND {ALIVE} AND {SUITS}) wanted
WHERE s.study_id = ANY(:study_ids)
""")
