"""How PostgreSQL goes about what is asked all the time, in a study of 100 000 trials."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, event, text
from sqlalchemy.orm import Session

from regtune import events, leasing, reporting, shapes, shares, standing, workers
from regtune.database import transaction
from regtune.leasing import Lease
from regtune.standing import Standing
from regtune.studies import Study
from service import records
from service.scheduler import conductor, glances
from tests import builders

TRIALS = 100_000
BIG = {
    "epochs",
    "events",
    "trials",
    "trial_intermediate_values",
    "trial_params",
    "trial_system_attributes",
    "trial_user_attributes",
    "trial_values",
}

STANDS = Standing(100, 100, TRIALS - 200, 0, 0, 0, TRIALS, 0, 0.1, 60.0)

Statement = tuple[str, Mapping[str, Any]]


@pytest.fixture
def study(engine: Engine) -> Study:
    """A study of complete trials, but for a hundred that run and the last hundred that wait."""
    study = builders.create(engine, budget={"trials": TRIALS})
    with engine.begin() as connection:
        for statement in _FILL:
            connection.execute(text(statement), {"study_id": study.study_id, "count": TRIALS})
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("ANALYZE"))
    builders.register(engine)
    return study


@contextmanager
def heard(engine: Engine) -> Iterator[list[Statement]]:
    """What is asked of the database meanwhile."""
    asked: list[Statement] = []

    def note(_: Connection, __: object, statement: str, parameters: Any, *___: object) -> None:
        asked.append((statement, parameters))

    event.listen(engine, "before_cursor_execute", note)
    yield asked
    event.remove(engine, "before_cursor_execute", note)


def whole_scans(engine: Engine, statement: Statement) -> list[str]:
    """The big tables that PostgreSQL would read from end to end for a statement."""
    return [
        node["Relation Name"]
        for node in plan(engine, statement)
        if node["Node Type"] == "Seq Scan" and node["Relation Name"] in BIG
    ]


def indexes(engine: Engine, statement: Statement) -> set[str]:
    """The indexes by which PostgreSQL would find what a statement asks for."""
    return {node["Index Name"] for node in plan(engine, statement) if "Index Name" in node}


def plan(engine: Engine, statement: Statement) -> Sequence[Mapping[str, Any]]:
    """All nodes of the plan of a statement."""
    sql, parameters = statement
    with engine.connect() as connection:
        found = connection.exec_driver_sql(f"EXPLAIN (FORMAT JSON) {sql}", parameters).scalar_one()
    return [*_nodes(found[0]["Plan"])]


def _nodes(plan: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield plan
    for part in plan.get("Plans", ()):
        yield from _nodes(part)


def test_what_is_asked_all_the_time_reads_no_big_table_from_end_to_end(
    engine: Engine, study: Study
) -> None:
    id_ = study.study_id
    leases: list[Lease] = []

    def lease(session: Session) -> None:
        leases.extend(leasing.lease(session, id_, "w", 8, 30))

    def flush(session: Session) -> None:
        epochs = {held.trial_id: [builders.epoch(n) for n in range(1, 21)] for held in leases}
        reporting.flush(session, leases, epochs, 30)

    def finish(session: Session) -> None:
        reporting.finish(session, [(held, builders.completed()) for held in leases[:4]], "w")

    single: Sequence[Callable[[Session], object]] = [
        lease,
        flush,
        finish,
        lambda session: shares.choose(session, "w", current=id_),
        shares.longest_waiting,
        lambda session: shapes.choose(session, id_, "w", current="{}", suspect_from=2),
        lambda session: leasing.take(
            session,
            id_,
            "w",
            8,
            30,
            shape="{}",
            slots=8,
            suspect_from=2,
            alone=True,
            stay_seconds=10,
        ),
        lambda session: workers.beat(session, "w", wanted_lanes=1, study_id=id_),
        lambda session: glances.of(session, id_, 30, 2),
        lambda session: session.execute(
            conductor._ENDED, {"study_id": id_, "open": list(range(100))}
        ),
        lambda session: session.execute(
            conductor._EPOCHS, {"study_id": id_, "seen": '[{"number": 7, "epoch": 1}]'}
        ),
        lambda session: events.newest(session, [id_]),
        lambda session: standing.of(session, id_),
        lambda session: records.notable(session, study),
        lambda session: records.eta_seconds(session, study, STANDS),
        lambda session: records.trials_by_number(session, study, None, None, True, 100),
        lambda session: records.trials_by_value(session, study, None, None, True, 100),
    ]
    several: Sequence[Callable[[Session], object]] = [
        shares.settle,
        lambda session: leasing.release(session, leases[4:6], "w"),
        lambda session: leasing.expire(session, id_, 3),
        lambda session: reporting.request_stop(session, {leases[6].trial_id: (1, "no")}),
        lambda session: leasing.append(session, id_, [builders.suggestion(study)], expected=TRIALS),
    ]
    for ask in (*single, *several):
        with heard(engine) as asked, transaction(engine) as session:
            ask(session)
        assert len(asked) == 1 or ask in several
        for statement in asked:
            assert whole_scans(engine, statement) == [], statement[0]


def test_a_lease_does_not_read_the_waiting_trials_of_other_shapes(
    engine: Engine, study: Study
) -> None:
    with engine.begin() as connection:
        values = {"study_id": study.study_id, "shape": '{"batch_size":64}'}
        connection.execute(text(_LET_HALF_WAIT_IN_ANOTHER_SHAPE), values)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("ANALYZE regtune.trials"))
    with heard(engine) as asked, transaction(engine) as session:
        leases = leasing.lease(session, study.study_id, "w", 8, 30)
    assert len(leases) == 8
    assert whole_scans(engine, asked[0]) == []
    assert "trials_waiting" in indexes(engine, asked[0])


def test_a_stream_reads_no_event_that_it_has_told(engine: Engine, study: Study) -> None:
    with heard(engine) as asked, transaction(engine) as session:
        last = events.newest(session, [study.study_id])[study.study_id]
        assert events.read(session, study.study_id, last) == []
        assert len(events.read(session, study.study_id, "497-0")) < 1000
    for statement in asked:
        assert indexes(engine, statement) == {"events_in_order"}
        assert [node for node in plan(engine, statement) if "Filter" in node] == []


def test_what_was_done_to_a_study_itself_is_read_alone(engine: Engine, study: Study) -> None:
    with heard(engine) as asked, transaction(engine) as session:
        told = events.history(session, study.name, trials=False, after=None, up=True, limit=100)
    assert [event.kind for event in told] == ["study_created"]
    (statement,) = asked
    assert "events_of_study_itself" in indexes(engine, statement)
    assert whole_scans(engine, statement) == []


_LET_HALF_WAIT_IN_ANOTHER_SHAPE = """
UPDATE regtune.trials SET state = 'waiting', shape = :shape, finished_at = NULL
WHERE study_id = :study_id AND state = 'complete' AND number < 50000
"""


_FILL = (
    """
    INSERT INTO public.trials (trial_id, number, study_id, state)
    SELECT n + 1, n, :study_id, 'COMPLETE' FROM generate_series(0, :count - 1) AS n""",
    """
    INSERT INTO public.trial_values (trial_id, objective, value, value_type)
    SELECT n + 1, 0, 1, 'FINITE' FROM generate_series(100, :count - 101) AS n""",
    """
    INSERT INTO public.trial_intermediate_values
           (trial_id, step, intermediate_value, intermediate_value_type)
    SELECT n + 1, 1, 1, 'FINITE' FROM generate_series(100, :count - 101) AS n""",
    """
    INSERT INTO regtune.trials (trial_id, study_id, number, kind, params, state, attempt, value,
                                token, worker, lease_expires_at, started_at, finished_at)
    SELECT n + 1, :study_id, n, 'suggested', '{"weight_decay": 0.1}', state,
           (state <> 'waiting')::int, CASE state WHEN 'complete' THEN 1.0 / (n + 1) END,
           CASE state WHEN 'running' THEN gen_random_uuid() END, 'w', now() + interval '1 hour',
           now(), CASE state WHEN 'complete' THEN now() + n * interval '1 millisecond' END
    FROM generate_series(0, :count - 1) AS n, LATERAL (SELECT CASE
        WHEN n >= :count - 100 THEN 'waiting' WHEN n < 100 THEN 'running'
        ELSE 'complete' END AS state) life""",
    """
    INSERT INTO regtune.epochs
    SELECT n + 1, 1, 1, 1, 1, 1, 1, 1, 1 FROM generate_series(0, :count - 1) AS n""",
    """
    INSERT INTO regtune.events (transaction_id, study_id, number, kind, actor)
    SELECT (n % 500 + 1)::text::xid8, :study_id, n, 'trial_complete', 'w'
    FROM generate_series(0, :count - 1) AS n""",
    "UPDATE regtune.studies SET appended = :count WHERE study_id = :study_id",
    "SELECT setval('public.trials_trial_id_seq', :count)",
)
