"""The first tables: studies, trials, epochs, workers, events."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

from regtune.tables import TransactionId

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "events",
        sa.Column("event_id", sa.BigInteger(), nullable=False),
        sa.Column(
            "transaction_id",
            TransactionId(),
            server_default=sa.text("pg_current_xact_id()"),
            nullable=False,
            comment="readers wait until all older transactions have ended, so that none is missed",
        ),
        sa.Column(
            "at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False
        ),
        sa.Column("study_id", sa.Integer(), nullable=False),
        sa.Column(
            "number", sa.Integer(), nullable=True, comment="of the trial, if it is about one"
        ),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("detail", JSONB(), server_default=sa.text("'{}'::jsonb"), nullable=False),
        sa.PrimaryKeyConstraint("event_id"),
        schema="regtune",
    )
    op.create_index(
        "events_of_study", "events", ["study_id", "event_id"], unique=False, schema="regtune"
    )
    op.create_table(
        "workers",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column(
            "lanes", sa.Integer(), nullable=False, comment="how many trials it trains at once"
        ),
        sa.Column(
            "wanted_lanes",
            sa.Integer(),
            nullable=False,
            comment="lanes that would take a trial now",
        ),
        sa.Column("datasets", JSONB(), nullable=False),
        sa.Column("models", JSONB(), nullable=False),
        sa.Column("study_id", sa.Integer(), nullable=True, comment="the study that it trains now"),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("heartbeat_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("stopped_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("name"),
        schema="regtune",
    )
    op.create_table(
        "studies",
        sa.Column("study_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("spec", JSONB(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True, comment="why the study ended"),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("budget_trials", sa.Integer(), nullable=False),
        sa.Column("budget_seconds", sa.Double(), nullable=True),
        sa.Column(
            "appended",
            sa.Integer(),
            server_default="0",
            nullable=False,
            comment="next trial's number",
        ),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint(
            "state IN ('active', 'paused', 'stopping', 'completed', 'stopped', 'cancelled',"
            " 'failed')",
            name="studies_state_known",
        ),
        sa.CheckConstraint("appended BETWEEN 0 AND budget_trials", name="studies_within_budget"),
        sa.ForeignKeyConstraint(
            ["study_id"],
            ["studies.study_id"],
        ),
        sa.PrimaryKeyConstraint("study_id"),
        sa.UniqueConstraint("name"),
        schema="regtune",
    )
    op.create_index(
        "studies_live",
        "studies",
        ["study_id"],
        unique=False,
        schema="regtune",
        postgresql_where=sa.text("state IN ('active', 'paused', 'stopping')"),
    )
    op.create_table(
        "trials",
        sa.Column("trial_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("study_id", sa.Integer(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False, comment="a reference point, or suggested"),
        sa.Column(
            "params", JSONB(), nullable=False, comment="every value that is trained, fixed ones too"
        ),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column(
            "attempt", sa.Integer(), server_default="0", nullable=False, comment="leases so far"
        ),
        sa.Column("lost_leases", sa.Integer(), server_default="0", nullable=False),
        sa.Column("token", sa.Uuid(), nullable=True, comment="of the lease that may write"),
        sa.Column("worker", sa.Text(), nullable=True),
        sa.Column("lease_expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column(
            "stop_request",
            sa.Text(),
            nullable=True,
            comment="the scheduler's verdict for the worker",
        ),
        sa.Column(
            "value", sa.Double(), nullable=True, comment="validation loss at the best weights"
        ),
        sa.Column("validation_score", sa.Double(), nullable=True),
        sa.Column("best_epoch", sa.Integer(), nullable=True),
        sa.Column("test_loss", sa.Double(), nullable=True),
        sa.Column("test_score", sa.Double(), nullable=True),
        sa.Column("reason", sa.Text(), nullable=True, comment="why it ended as it did"),
        sa.Column("error", sa.Text(), nullable=True, comment="traceback of the user's code"),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True, comment="first lease"),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint(
            "(state = 'running') = (token IS NOT NULL)", name="trials_running_means_leased"
        ),
        sa.CheckConstraint(
            "kind IN ('baseline', 'default', 'suggested')", name="trials_kind_known"
        ),
        sa.CheckConstraint(
            "state IN ('waiting', 'running', 'complete', 'pruned', 'failed', 'cancelled')",
            name="trials_state_known",
        ),
        sa.CheckConstraint("number >= 0", name="trials_number_natural"),
        sa.ForeignKeyConstraint(
            ["study_id"],
            ["regtune.studies.study_id"],
        ),
        sa.ForeignKeyConstraint(
            ["trial_id"],
            ["trials.trial_id"],
        ),
        sa.PrimaryKeyConstraint("trial_id"),
        sa.UniqueConstraint("study_id", "number", name="trials_numbered"),
        schema="regtune",
    )
    op.create_index(
        "trials_by_state", "trials", ["study_id", "state", "number"], unique=False, schema="regtune"
    )
    op.create_index(
        "trials_leased",
        "trials",
        ["lease_expires_at"],
        unique=False,
        schema="regtune",
        postgresql_where=sa.text("state = 'running'"),
    )
    op.create_table(
        "epochs",
        sa.Column("trial_id", sa.Integer(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("epoch", sa.Integer(), nullable=False, comment="from 1"),
        sa.Column("train_loss", sa.Double(), nullable=False),
        sa.Column("validation_loss", sa.Double(), nullable=False),
        sa.Column("validation_score", sa.Double(), nullable=False),
        sa.Column("penalty", sa.Double(), nullable=False),
        sa.Column(
            "sparsity",
            sa.Double(),
            nullable=False,
            comment="share of exact zeros among the weights",
        ),
        sa.Column("seconds", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["trial_id"],
            ["regtune.trials.trial_id"],
        ),
        sa.PrimaryKeyConstraint("trial_id", "attempt", "epoch"),
        schema="regtune",
    )


def downgrade() -> None:
    for table in ("epochs", "trials", "studies", "workers", "events"):
        op.drop_table(table, schema="regtune")
