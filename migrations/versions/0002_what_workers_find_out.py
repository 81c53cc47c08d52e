"""What workers find out: the model of a study, the spread of a trial, how full a worker is."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "studies",
        sa.Column(
            "model",
            JSONB(),
            nullable=True,
            comment="what the first worker that built the model found out",
        ),
        schema="regtune",
    )
    op.add_column(
        "trials",
        sa.Column(
            "value_spread",
            sa.Double(),
            nullable=True,
            comment="standard deviation of the value over the members",
        ),
        schema="regtune",
    )
    op.add_column(
        "workers",
        sa.Column(
            "occupancy",
            sa.Double(),
            nullable=True,
            comment="share of its lanes that trained while trials were waiting",
        ),
        schema="regtune",
    )
    op.add_column(
        "workers",
        sa.Column("capacity", JSONB(), nullable=True, comment="how the number of lanes was found"),
        schema="regtune",
    )


def downgrade() -> None:
    for table, column in (
        ("workers", "capacity"),
        ("workers", "occupancy"),
        ("trials", "value_spread"),
        ("studies", "model"),
    ):
        op.drop_column(table, column, schema="regtune")
