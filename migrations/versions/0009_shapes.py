"""Shapes: what of a trial changes its tensors or its program."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "trials",
        sa.Column(
            "shape",
            sa.Text(),
            nullable=False,
            server_default="{}",
            comment="what of params makes stacks of their own",
        ),
        schema="regtune",
    )
    op.create_index(
        "trials_waiting",
        "trials",
        ["study_id", "shape", "number"],
        schema="regtune",
        postgresql_where=sa.text("state = 'waiting'"),
    )
    op.create_table(
        "shapes",
        sa.Column("study_id", sa.Integer(), nullable=False),
        sa.Column("shape", sa.Text(), nullable=False),
        sa.Column(
            "model",
            JSONB(),
            nullable=False,
            comment="what the first worker that built it found out",
        ),
        sa.ForeignKeyConstraint(["study_id"], ["regtune.studies.study_id"]),
        sa.PrimaryKeyConstraint("study_id", "shape"),
        schema="regtune",
    )


def downgrade() -> None:
    op.drop_table("shapes", schema="regtune")
    op.drop_index("trials_waiting", "trials", schema="regtune")
    op.drop_column("trials", "shape", schema="regtune")
