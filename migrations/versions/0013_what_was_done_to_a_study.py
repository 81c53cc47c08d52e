"""What was done to a study itself is found without reading what happened to its trials.

Before, whoever asked for the history of a study of very many trials read all of their events.
"""

from alembic import op
from sqlalchemy import text

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

_NAME, _TABLE = "events_of_study_itself", "events"


def upgrade() -> None:
    op.create_index(
        _NAME,
        _TABLE,
        ["study_id", "event_id"],
        schema="regtune",
        postgresql_where=text("number IS NULL"),
    )


def downgrade() -> None:
    op.drop_index(_NAME, _TABLE, schema="regtune")
