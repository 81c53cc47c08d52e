"""Whom a worker wakes when it says what it wants."""

from collections.abc import Callable, Iterator

import pytest
from sqlalchemy import Engine, text

from regtune import database, workers
from regtune.database import transaction
from tests import builders

MARK = 77


@pytest.fixture
def heard(engine: Engine, database_url: str) -> Iterator[Callable[[], set[int]]]:
    """Says of which studies a scheduler has heard since it was last asked."""
    with database.Listener(database_url, database.NEWS) as listener:
        listener.wait(0)

        def so_far() -> set[int]:
            with engine.begin() as connection:
                connection.execute(text(f"NOTIFY {database.NEWS}, '{MARK}'"))
            known: set[int] = set()
            while MARK not in known:
                known |= listener.wait(30)
            return known - {MARK}

        yield so_far


def beat(engine: Engine, wanted_lanes: int) -> None:
    with transaction(engine) as session:
        workers.beat(session, "w", wanted_lanes=wanted_lanes, study_id=None)


def test_a_worker_wakes_the_scheduler_only_when_it_wants_something_else(
    engine: Engine, heard: Callable[[], set[int]]
) -> None:
    builders.register(engine, lanes=2)
    assert heard() == {workers.ANY_STUDY}
    beat(engine, 2)
    assert heard() == set()
    beat(engine, 1)
    assert heard() == {workers.ANY_STUDY}
    beat(engine, 0)
    assert heard() == set()


def test_lanes_are_wanted_by_the_living_who_have_the_task(engine: Engine) -> None:
    study = builders.create(engine)
    builders.register(engine, "w", lanes=2)
    builders.register(engine, "other", lanes=4, datasets=("mnist",))
    with transaction(engine) as session:
        assert workers.wanted_lanes(session, study.study_id, 30) == 2
    with transaction(engine) as session:
        assert workers.wanted_lanes(session, study.study_id, 0) == 0
