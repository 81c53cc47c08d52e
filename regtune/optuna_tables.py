"""Optuna's own tables, in the schema ``public``: the public record of every trial.

regtune writes them in sets, as Optuna 5 would have written them one by one; a contract test
compares the two field by field. Only the version that was compared is written to.
"""

import optuna
from sqlalchemy import Connection, inspect, text

from regtune.errors import UnknownSchema

SCHEMA_VERSION = 12
"""Optuna's ``version_info.schema_version`` that the contract test compares against."""

ALEMBIC_VERSION = "v3.2.0.a"
"""Head of Optuna's own migrations at that schema version."""


def create(url: str) -> None:
    """Let Optuna make its tables where there are none; raise UnknownSchema if they are others."""
    try:
        storage = optuna.storages.RDBStorage(url)
    except RuntimeError as error:
        raise UnknownSchema(f"Optuna's tables: {str(error).splitlines()[0]}") from None
    storage.remove_session()
    storage.engine.dispose()


def check_version(connection: Connection) -> None:
    """Raise UnknownSchema unless Optuna's tables are of the version that regtune writes."""
    if not inspect(connection).has_table("version_info", schema="public"):
        raise UnknownSchema("Optuna's tables are not there; run `regtune db upgrade`")
    found = connection.execute(
        text(
            "SELECT (SELECT schema_version FROM public.version_info),"
            " (SELECT version_num FROM public.alembic_version)"
        )
    ).one()
    if tuple(found) != (SCHEMA_VERSION, ALEMBIC_VERSION):
        raise UnknownSchema(
            f"Optuna's tables are of version {found[0]} ({found[1]}), and regtune writes version "
            f"{SCHEMA_VERSION} ({ALEMBIC_VERSION}) alone"
        )
