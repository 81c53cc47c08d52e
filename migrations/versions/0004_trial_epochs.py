"""A budget of trial-epochs, and how many each trial has trained."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "studies",
        sa.Column("budget_trial_epochs", sa.BigInteger(), nullable=True),
        schema="regtune",
    )
    op.add_column(
        "trials",
        sa.Column(
            "epochs",
            sa.Integer(),
            nullable=False,
            server_default="0",
            comment="of its furthest attempt",
        ),
        schema="regtune",
    )
    op.execute(
        "UPDATE regtune.trials t SET epochs = e.last FROM"
        " (SELECT trial_id, max(epoch) AS last FROM regtune.epochs GROUP BY trial_id) e"
        " WHERE e.trial_id = t.trial_id"
    )


def downgrade() -> None:
    op.drop_column("trials", "epochs", schema="regtune")
    op.drop_column("studies", "budget_trial_epochs", schema="regtune")
