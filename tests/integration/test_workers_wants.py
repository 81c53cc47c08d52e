"""What workers want, that they wake nobody by saying so, and how long they are known."""

from collections.abc import Callable, Iterator

import pytest
from sqlalchemy import Engine, text

from regtune import database, workers
from regtune.database import transaction
from service.scheduler import glances
from tests import builders
from tests.hearing import heard_on


@pytest.fixture
def heard(engine: Engine, database_url: str) -> Iterator[Callable[[], set[int]]]:
    """Says of which studies a scheduler has heard since it was last asked."""
    with heard_on(engine, database_url, database.NEWS) as so_far:
        yield so_far


def test_no_worker_wakes_the_scheduler(engine: Engine, heard: Callable[[], set[int]]) -> None:
    study = builders.create(engine)
    assert heard() == {study.study_id}
    builders.register(engine, lanes=2)
    builders.append(engine, study, 1)
    builders.complete(engine, builders.lease(engine, study))
    with transaction(engine) as session:
        workers.beat(session, "w", wanted_lanes=1, study_id=None)
    assert heard() == set()


def test_lanes_are_wanted_by_the_living_who_have_the_task(engine: Engine) -> None:
    study = builders.create(engine)
    builders.register(engine, "w", lanes=2)
    builders.register(engine, "other", lanes=4, datasets=("mnist",))
    with transaction(engine) as session:
        assert glances.of(session, study.study_id, 30, 2).wanted_lanes == 2
    with transaction(engine) as session:
        assert glances.of(session, study.study_id, 0, 2).wanted_lanes == 0


def test_workers_that_nobody_has_heard_of_for_long_are_forgotten(engine: Engine) -> None:
    for name, days in (("gone", workers.FORGOTTEN_DAYS + 1), ("away", workers.FORGOTTEN_DAYS - 1)):
        builders.register(engine, name)
        with engine.begin() as connection:
            connection.execute(
                text(
                    "UPDATE regtune.workers SET heartbeat_at = now() - make_interval(days => :days)"
                    " WHERE name = :name"
                ),
                {"days": days, "name": name},
            )
    builders.register(engine, "new")
    with transaction(engine) as session:
        assert {worker.name for worker in workers.everyone(session, 30)} == {"away", "new"}
