"""Runs the migrations on the connection that ``regtune.database.upgrade`` hands over."""

from alembic import context

from regtune.tables import SCHEMA, metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table_schema=SCHEMA,
)
with context.begin_transaction():
    context.run_migrations()
