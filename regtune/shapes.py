"""Shapes of a study: which one a worker trains next, and what is known of each one's model.

A worker trains one shape of one study at a time. It goes where few others are, then by the lowest
number that waits; and it stays with the shape it has built for a while, because building costs. No
shape starves: one that others train is taken on by them, or is soon trained by nobody.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict

from sqlalchemy import text
from sqlalchemy.orm import Session

from regtune.studies import ModelFacts


def choose(
    session: Session, study_id: int, worker: str, *, current: str | None = None, suspect_from: int
) -> str | None:
    """Return the shape that a worker's free lanes should go to; None if no trial waits.

    The ``current`` one as long as a trial of it waits; else the one of which other workers train
    the fewest trials, of equals that of the lowest number. Trials that have lost ``suspect_from``
    leases come last.
    """
    return session.execute(
        _CHOOSE,
        {
            "study_id": study_id,
            "worker": worker,
            "current": current,
            "suspect_from": suspect_from,
        },
    ).scalar()


def describe(session: Session, study_id: int, shape: str, facts: ModelFacts) -> None:
    """Write down what a worker found out about a shape's model; the first one's word stands."""
    session.execute(
        text(
            "INSERT INTO regtune.shapes (study_id, shape, model)"
            " VALUES (:study_id, :shape, cast(:facts AS jsonb)) ON CONFLICT DO NOTHING"
        ),
        {"study_id": study_id, "shape": shape, "facts": json.dumps(asdict(facts))},
    )


def known(session: Session, study_id: int) -> Mapping[str, ModelFacts]:
    """Return what is known of the models of a study's shapes, in the order of their texts."""
    rows = session.execute(
        text("SELECT shape, model FROM regtune.shapes WHERE study_id = :study_id ORDER BY shape"),
        {"study_id": study_id},
    )
    return {row.shape: ModelFacts(**row.model) for row in rows}


def has_been_trained(session: Session, study_id: int, shape: str) -> bool:
    """Say whether any worker has reported an epoch of a trial of this shape."""
    query = text(
        "SELECT EXISTS (SELECT FROM regtune.trials"
        " WHERE study_id = :study_id AND shape = :shape AND epochs > 0)"
    )
    return bool(session.execute(query, {"study_id": study_id, "shape": shape}).scalar_one())


_CHOOSE = text("""
WITH waiting AS (
    SELECT shape, bool_and(lost_leases >= :suspect_from) AS suspect, min(number) AS number
    FROM regtune.trials WHERE study_id = :study_id AND state = 'waiting' GROUP BY shape
), elsewhere AS (
    SELECT shape, count(*) AS running FROM regtune.trials
    WHERE study_id = :study_id AND state = 'running' AND worker <> :worker GROUP BY shape
)
SELECT shape FROM waiting LEFT JOIN elsewhere USING (shape)
ORDER BY suspect, shape IS DISTINCT FROM :current, coalesce(running, 0), number
LIMIT 1
""")
