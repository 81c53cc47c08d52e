"""Indexes for studies of many trials, and none on what every renewal changes."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.drop_index("trials_leased", "trials", schema="regtune")
    op.create_index("trials_by_value", "trials", ["study_id", "value", "number"], schema="regtune")
    op.create_index("trials_by_end", "trials", ["study_id", "finished_at"], schema="regtune")
    op.execute("ALTER TABLE regtune.trials SET (fillfactor = 80)")


def downgrade() -> None:
    op.execute("ALTER TABLE regtune.trials RESET (fillfactor)")
    op.drop_index("trials_by_end", "trials", schema="regtune")
    op.drop_index("trials_by_value", "trials", schema="regtune")
    op.create_index(
        "trials_leased",
        "trials",
        ["lease_expires_at"],
        unique=False,
        schema="regtune",
        postgresql_where=sa.text("state = 'running'"),
    )
