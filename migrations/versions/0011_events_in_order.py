"""A study's events are found in the order in which they are told.

Before, whoever watched a long study read all of its events for each new one.
"""

from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

_COLUMNS = ["study_id", "transaction_id", "event_id"]


def upgrade() -> None:
    op.create_index("events_in_order", "events", _COLUMNS, schema="regtune")


def downgrade() -> None:
    op.drop_index("events_in_order", "events", schema="regtune")
