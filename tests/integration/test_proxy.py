"""With a proxy that pools transactions, the next transaction may meet another session."""

import os
import subprocess
import sys
from collections.abc import Iterator

import psycopg
import pytest
from sqlalchemy import Engine, event, text
from sqlalchemy.exc import DBAPIError

from regtune import database, leasing, reporting, workers
from regtune.database import transaction
from regtune.spec import NO_SHAPE
from tests import builders
from tests.audit import audit

TRIALS = 20


@pytest.fixture(params=[True, False])
def proxied(request: pytest.FixtureRequest, database_url: str) -> Iterator[tuple[Engine, bool]]:
    """An engine whose sessions forget everything between two transactions, and if it knows."""
    engine = database.connect(database_url, proxied=request.param)

    def forget(connection: psycopg.Connection[object], _: object) -> None:
        connection.autocommit = True
        connection.execute("DISCARD ALL", prepare=False)
        connection.autocommit = False

    event.listen(engine, "checkin", forget)
    yield engine, request.param
    engine.dispose()


def live_through(engine: Engine) -> None:
    """Everything that a worker asks, often enough for the driver to prepare it."""
    study = builders.create(engine, budget={"trials": TRIALS})
    builders.register(engine)
    for _ in range(TRIALS):
        builders.append(engine, study, 1)
        leases = builders.lease(engine, study)
        builders.complete(engine, leases)
        with transaction(engine) as session:
            workers.beat(session, "w", wanted_lanes=1, study_id=study.study_id)
            leasing.expire(session, study.study_id, 3)
            reporting.request_stop(session, {leases[0].trial_id: (1, "late")})
            leasing.take(
                session,
                study.study_id,
                "w",
                1,
                30,
                shape=NO_SHAPE,
                slots=1,
                suspect_from=2,
                alone=True,
                stay_seconds=10,
            )
    assert builders.states(engine, study) == ["complete"] * TRIALS


def test_what_workers_ask_needs_no_session_once_the_proxy_is_known(
    proxied: tuple[Engine, bool], engine: Engine
) -> None:
    through, known = proxied
    if known:
        live_through(through)
        assert audit(engine) == {}
    else:
        with pytest.raises(DBAPIError, match="prepared statement"):
            live_through(through)


def test_the_schema_is_brought_up_to_date_around_the_proxy(empty_database_url: str) -> None:
    environment = os.environ | {
        "REGTUNE_DATABASE_URL": "postgresql://nobody@127.0.0.1:1/nothing",
        "REGTUNE_DIRECT_DATABASE_URL": empty_database_url,
    }
    command = [sys.executable, "-m", "regtune.cli", "db", "upgrade"]
    subprocess.run(command, env=environment, check=True, timeout=120)
    engine = database.connect(empty_database_url)
    with engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM regtune.studies")).scalar() == 0
    engine.dispose()
