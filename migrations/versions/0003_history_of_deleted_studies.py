"""Studies that were deleted are found again in the history by their names."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index(
        "events_of_deletions",
        "events",
        ["study_id"],
        schema="regtune",
        postgresql_where=sa.text("kind = 'study_deleted'"),
    )


def downgrade() -> None:
    op.drop_index("events_of_deletions", "events", schema="regtune")
