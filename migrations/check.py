"""``python -m migrations.check``: do the migrations lead to the tables in the code?"""

import sys
import tempfile
from pathlib import Path
from typing import Any

from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy.dialects.postgresql.base import ischema_names

from regtune import database
from regtune.embedded import EmbeddedServer
from regtune.tables import SCHEMA, TransactionId, metadata


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="regtune-") as folder:
        server = EmbeddedServer(Path(folder))
        try:
            url = server.start()
            database.upgrade(url)
            found = differences(url)
        finally:
            server.stop()
    for difference in found:
        sys.stderr.write(f"{difference}\n")
    return 1 if found else 0


def differences(url: str) -> list[Any]:
    """Return the differences between the migrations' outcome and the tables in the code."""
    ischema_names["xid8"] = TransactionId  # the one type of ours that SQLAlchemy does not know
    engine = database.connect(url)
    with engine.connect() as connection:
        context = MigrationContext.configure(
            connection,
            opts={
                "version_table_schema": SCHEMA,
                "include_schemas": True,
                "include_object": _only_ours,
                "compare_type": True,
                "compare_server_default": True,
            },
        )
        found = list(compare_metadata(context, metadata))
    engine.dispose()
    return found


def _only_ours(item: Any, name: str | None, kind: str, reflected: bool, other: Any) -> bool:
    return kind != "table" or item.schema == SCHEMA


if __name__ == "__main__":
    sys.exit(main())
