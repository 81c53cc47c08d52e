"""How studies stand: their trials by state, and what those have used up, exact at one moment.

A trial that ends leaves its outcome in a charge, in the statement that ends it; charges are taken
in when the shares are settled. So only the trials that are open are counted, and the charges not
yet taken in, however many trials have ended.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sqlalchemy import text
from sqlalchemy.orm import Session

from regtune.errors import NotFound


@dataclass(frozen=True)
class Standing:
    """How far a study is; all figures are of one moment."""

    waiting: int
    running: int
    complete: int
    pruned: int
    failed: int
    cancelled: int
    ended_epochs: int
    open_epochs: int
    """Trained by the trials that have not ended."""
    best_value: float | None
    seconds_spent: float | None
    """Since the first lease; None before it."""

    @property
    def ended(self) -> int:
        """How many trials will not change any more."""
        return self.complete + self.pruned + self.failed + self.cancelled

    @property
    def trial_epochs(self) -> int:
        """The epochs that all trials have trained."""
        return self.ended_epochs + self.open_epochs

    def promised_epochs(self, max_epochs: int) -> int:
        """Return the epochs that ended trials have trained, and open ones may come to."""
        return self.ended_epochs + (self.waiting + self.running) * max_epochs


def of_each(session: Session, study_ids: Iterable[int]) -> Mapping[int, Standing]:
    """Return how studies stand, by id; those that have been deleted are left out."""
    rows = session.execute(_STANDINGS, {"study_ids": list(study_ids)}).mappings()
    return {
        row["study_id"]: Standing(**{key: row[key] for key in row if key != "study_id"})
        for row in rows
    }


def of(session: Session, study_id: int) -> Standing:
    """Return how a study stands; raise NotFound if it has been deleted."""
    try:
        return of_each(session, [study_id])[study_id]
    except KeyError:
        raise NotFound("the study has been deleted") from None


_STANDINGS = text("""
SELECT sh.study_id, opened.waiting, opened.running,
       sh.complete + charged.complete AS complete, sh.pruned + charged.pruned AS pruned,
       sh.failed + charged.failed AS failed, sh.cancelled + charged.cancelled AS cancelled,
       sh.ended_epochs + charged.epochs AS ended_epochs, opened.epochs AS open_epochs,
       (SELECT value FROM regtune.trials t
        WHERE t.study_id = sh.study_id AND t.state = 'complete' AND t.value < 'Infinity'
        ORDER BY t.value LIMIT 1) AS best_value,
       extract(epoch FROM now() - least(sh.started_at, charged.started_at, opened.started_at)
       )::float AS seconds_spent
FROM regtune.shares sh CROSS JOIN LATERAL (
    SELECT count(*) FILTER (WHERE t.state = 'waiting') AS waiting,
           count(*) FILTER (WHERE t.state = 'running') AS running,
           coalesce(sum(t.epochs), 0) AS epochs, min(t.started_at) AS started_at
    FROM regtune.trials t
    WHERE t.study_id = sh.study_id AND t.state IN ('waiting', 'running')
) opened CROSS JOIN LATERAL (
    SELECT coalesce(sum(c.complete), 0) AS complete, coalesce(sum(c.pruned), 0) AS pruned,
           coalesce(sum(c.failed), 0) AS failed, coalesce(sum(c.cancelled), 0) AS cancelled,
           coalesce(sum(c.epochs), 0)::bigint AS epochs, min(c.started_at) AS started_at
    FROM regtune.charges c WHERE c.study_id = sh.study_id
) charged
WHERE sh.study_id = ANY(:study_ids)
""")
