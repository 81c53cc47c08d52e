"""What ended leases cost their studies, kept apart until it is settled."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "charges",
        sa.Column("charge_id", sa.BigInteger, sa.Identity(always=True), primary_key=True),
        sa.Column("study_id", sa.Integer, nullable=False),
        sa.Column(
            "seconds", sa.Double, nullable=False, comment="of workers' time, not yet settled"
        ),
        schema="regtune",
    )
    op.create_index("charges_of_study", "charges", ["study_id"], schema="regtune")
    op.add_column(
        "shares",
        sa.Column(
            "ended_seconds",
            sa.Double,
            nullable=False,
            server_default="0",
            comment="of those, by leases that have ended",
        ),
        schema="regtune",
    )
    op.execute(
        """
        UPDATE regtune.shares sh SET ended_seconds = coalesce((
            SELECT sum(worker_seconds) FROM regtune.trials t WHERE t.study_id = sh.study_id), 0)
        """
    )


def downgrade() -> None:
    op.drop_column("shares", "ended_seconds", schema="regtune")
    op.drop_table("charges", schema="regtune")
