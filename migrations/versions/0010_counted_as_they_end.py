"""How trials ended is counted as they end, beside what they cost.

A charge must say the counts, so that a worker of an older version cannot end trials uncounted.
"""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

_STATES = ("complete", "pruned", "failed", "cancelled")
_FIRST_LEASE = "first lease of any of those"


def upgrade() -> None:
    for table, epochs, comment in (
        ("shares", "ended_epochs", "trials, settled"),
        ("charges", "epochs", "trials that ended so"),
    ):
        for column in (
            *(_count(state, sa.Integer(), comment) for state in _STATES),
            _count(epochs, sa.BigInteger(), "that those trained"),
            sa.Column("started_at", sa.DateTime(timezone=True), comment=_FIRST_LEASE),
        ):
            op.add_column(table, column, schema="regtune")
    for name in (*_STATES, "epochs"):
        op.alter_column("charges", name, server_default=None, schema="regtune")
    op.execute(
        """
        UPDATE regtune.shares sh
        SET complete = t.complete, pruned = t.pruned, failed = t.failed, cancelled = t.cancelled,
            ended_epochs = t.epochs, started_at = t.started_at
        FROM (SELECT study_id, count(*) FILTER (WHERE state = 'complete') AS complete,
                     count(*) FILTER (WHERE state = 'pruned') AS pruned,
                     count(*) FILTER (WHERE state = 'failed') AS failed,
                     count(*) FILTER (WHERE state = 'cancelled') AS cancelled,
                     sum(epochs) AS epochs, min(started_at) AS started_at
              FROM regtune.trials WHERE state NOT IN ('waiting', 'running') GROUP BY study_id) t
        WHERE t.study_id = sh.study_id
        """
    )


def downgrade() -> None:
    for table, epochs in (("charges", "epochs"), ("shares", "ended_epochs")):
        for name in ("started_at", epochs, *_STATES):
            op.drop_column(table, name, schema="regtune")


def _count(name: str, kind: sa.types.TypeEngine[int], comment: str) -> sa.Column[int]:
    return sa.Column(name, kind, nullable=False, server_default="0", comment=comment)
