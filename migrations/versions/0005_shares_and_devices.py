"""How studies share the workers, and what devices those have."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for column in (
        sa.Column("leased_at", sa.DateTime(timezone=True), comment="last lease"),
        sa.Column(
            "share",
            sa.Double(),
            comment="of its worker, that its last lease holds: one of its slots",
        ),
        sa.Column(
            "worker_seconds",
            sa.Double(),
            nullable=False,
            server_default="0",
            comment="of workers' time, by leases that have ended",
        ),
    ):
        op.add_column("trials", column, schema="regtune")
    op.execute("UPDATE regtune.trials SET leased_at = now(), share = 1 WHERE state = 'running'")
    op.create_table(
        "shares",
        sa.Column("study_id", sa.Integer(), nullable=False),
        sa.Column(
            "virtual_seconds",
            sa.Double(),
            nullable=False,
            comment="workers' time by priority; the study with the least is next",
        ),
        sa.Column(
            "worker_seconds",
            sa.Double(),
            nullable=False,
            server_default="0",
            comment="of workers' time, up to settled_at",
        ),
        sa.Column(
            "settled_at",
            sa.DateTime(timezone=True),
            nullable=False,
            server_default=sa.text("now()"),
        ),
        sa.ForeignKeyConstraint(["study_id"], ["regtune.studies.study_id"]),
        sa.PrimaryKeyConstraint("study_id"),
        schema="regtune",
    )
    op.execute(
        "INSERT INTO regtune.shares (study_id, virtual_seconds)"
        " SELECT study_id, 0 FROM regtune.studies"
    )
    op.add_column(
        "workers",
        sa.Column("device_kind", sa.Text(), nullable=False, server_default="cpu"),
        schema="regtune",
    )
    op.add_column(
        "workers",
        sa.Column(
            "memory_bytes",
            sa.BigInteger(),
            comment="of the device; of the machine for a CPU",
        ),
        schema="regtune",
    )


def downgrade() -> None:
    op.drop_column("workers", "memory_bytes", schema="regtune")
    op.drop_column("workers", "device_kind", schema="regtune")
    op.drop_table("shares", schema="regtune")
    for column in ("worker_seconds", "share", "leased_at"):
        op.drop_column("trials", column, schema="regtune")
