"""No study names settings of its pruner that do nothing.

They are refused in what is posted now, and what is stored has to be readable by the same rules.
"""

from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # A pruner whose first epoch never comes is none.
    op.execute(
        "UPDATE regtune.studies SET spec = jsonb_set(spec, '{pruner}', '{\"name\": \"none\"}')"
        " WHERE (spec #>> '{pruner,first_epoch}')::numeric"
        " >= (spec #>> '{training,max_epochs}')::numeric"
    )
    for setting, pruners in (
        ("first_epoch", "'extrapolation', 'median', 'asha', 'hyperband'"),
        ("startup_trials", "'median'"),
        ("reduction_factor", "'asha', 'hyperband'"),
    ):
        op.execute(
            f"UPDATE regtune.studies SET spec = spec #- '{{pruner,{setting}}}'"
            f" WHERE spec #>> '{{pruner,name}}' NOT IN ({pruners})"
        )


def downgrade() -> None:
    """Leave the studies as they are: what is not named has its default."""
