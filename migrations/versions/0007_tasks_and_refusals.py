"""What tasks a worker has, and which studies it has refused."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "workers",
        sa.Column("tasks", JSONB(), nullable=False, server_default=sa.text("'[]'::jsonb")),
        schema="regtune",
    )
    op.create_index(
        "events_of_refusals",
        "events",
        ["study_id"],
        schema="regtune",
        postgresql_where=sa.text("kind = 'study_refused'"),
    )


def downgrade() -> None:
    op.drop_index("events_of_refusals", "events", schema="regtune")
    op.drop_column("workers", "tasks", schema="regtune")
