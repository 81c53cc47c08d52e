"""Shapes of a study: which one a worker trains next, and what is known of each one's model.

A worker trains one shape of one study at a time. Which is next goes by the trials that wait, lowest
number first; a worker stays with the shape it has built for a while, because building costs.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict

from sqlalchemy import text
from sqlalchemy.orm import Session

from regtune.studies import ModelFacts


def choose(
    session: Session, study_id: int, *, current: str | None = None, suspect_from: int
) -> str | None:
    """Return the shape that a worker's free lanes should go to; None if no trial waits.

    That of the waiting trial with the lowest number; the ``current`` one as long as any of its own
    waits. Trials that have lost ``suspect_from`` leases come last.
    """
    return session.execute(
        text(_CHOOSE), {"study_id": study_id, "current": current, "suspect_from": suspect_from}
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


_CHOOSE = """
SELECT shape FROM regtune.trials
WHERE study_id = :study_id AND state = 'waiting'
ORDER BY lost_leases >= :suspect_from, shape IS DISTINCT FROM :current, number
LIMIT 1
"""
