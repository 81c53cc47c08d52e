"""Studies, trials and leases, made as scheduler and worker would make them."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Engine, text

from regtune import leasing, reporting, studies, workers
from regtune.database import transaction
from regtune.leasing import Lease, Suggestion
from regtune.reporting import Completed, Epoch
from regtune.space import Options
from regtune.spec import StudySpec, parse_spec
from regtune.studies import Study
from regtune.task import Offer
from service.scheduler.suggestion import (
    as_suggestion,
    distributions,
    kind_of,
    predetermined,
)

BASE = {"task": {"dataset": "digits", "model": "mlp"}, "budget": {"trials": 5}}


def spec(name: str = "study", **changes: Any) -> StudySpec:
    """A valid spec, with some fields changed."""
    return parse_spec({"name": name, **BASE, **changes})


def create(engine: Engine, name: str = "study", **changes: Any) -> Study:
    """A study in the database."""
    with transaction(engine) as session:
        return studies.create(session, spec(name, **changes), "test")[0]


def find(engine: Engine, name: str) -> Study:
    """A study by its name."""
    with transaction(engine) as session:
        return studies.find(session, name)


def suggestion(study: Study, number: int = 2) -> Suggestion:
    """A suggestion in the middle of every range, of the study's own shape."""
    point = predetermined(study.spec, 0)
    assert point is not None
    for dimension in study.spec.search.dimensions():
        if dimension.label in point and not isinstance(dimension.parameter, Options):
            middle = dimension.parameter.nearest(sum(dimension.parameter.numbers()) / 2)
            point[dimension.label] = int(middle) if dimension.name == "patience" else middle
    made = as_suggestion(study.spec, number, point, {})
    assert set(point) <= set(distributions(study.spec))
    assert made.kind == kind_of(number)
    return made


def append(engine: Engine, study: Study, count: int, turns: int = 1) -> Sequence[int]:
    """Waiting trials, as many as the budget allows of ``count``; return their ids."""
    with transaction(engine) as session:
        appended = studies.by_id(session, study.study_id).appended
        return leasing.append(
            session,
            study.study_id,
            [suggestion(study, appended + i) for i in range(count)],
            expected=appended,
            alive_seconds=30,
            turns=turns,
        )


def lease(engine: Engine, study: Study, count: int = 1, worker: str = "w") -> Sequence[Lease]:
    """Leases of half a minute."""
    with transaction(engine) as session:
        return leasing.lease(session, study.study_id, worker, count, 30)


def expire(engine: Engine, study: Study, max_attempts: int = 3) -> Sequence[int]:
    """Leases that have run out, as a day later; return the ids of their trials."""
    with transaction(engine) as session:
        later = datetime.now(UTC) + timedelta(days=1)
        return leasing.expire(session, study.study_id, max_attempts, now=later)


def register(
    engine: Engine,
    name: str = "w",
    lanes: int = 1,
    datasets: Sequence[str] = ("digits",),
    **device: Any,
) -> None:
    """A worker in the database that has just said that it lives."""
    with transaction(engine) as session:
        workers.register(
            session,
            name=name,
            host="here",
            pid=1,
            device="none",
            lanes=lanes,
            offer=Offer(frozenset(datasets), frozenset({"mlp"})),
            **device,
        )


def epoch(number: int, loss: float = 1.0) -> Epoch:
    """An epoch with a given validation loss."""
    return Epoch(number, 2 * loss, loss, 0.5, 0.1, 0.0, 0.01)


def complete(engine: Engine, leases: Sequence[Lease], loss: float = 0.5) -> frozenset[int]:
    """Record one epoch of each trial and complete it; return the ids that were still leased."""
    with transaction(engine) as session:
        reporting.flush(session, leases, {held.trial_id: [epoch(1, loss)] for held in leases}, 30)
        return reporting.finish(session, [(held, completed(loss)) for held in leases], "w")


def completed(loss: float = 0.5, best_epoch: int = 1) -> Completed:
    """The outcome of a trial that ran to its end."""
    return Completed(loss, 0.9, best_epoch, 0.6, 0.8, "finished")


def column(engine: Engine, query: str) -> list[Any]:
    """What a query returns, of its first column."""
    with engine.connect() as connection:
        return list(connection.execute(text(query)).scalars())


def states(engine: Engine, study: Study) -> list[str]:
    """The states of a study's trials, by number."""
    with engine.connect() as connection:
        rows = connection.execute(
            text("SELECT state FROM regtune.trials WHERE study_id = :id ORDER BY number"),
            {"id": study.study_id},
        )
        return list(rows.scalars())


def study_state(engine: Engine, study: Study) -> str:
    """The state of a study."""
    with transaction(engine) as session:
        return studies.by_id(session, study.study_id).state
