"""How studies share the workers, over hundreds of leases by a clock that the test owns."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from regtune import leasing, reporting, shares, studies
from regtune.database import transaction
from regtune.leasing import Lease
from regtune.spec import parse_change
from regtune.studies import Study, Verb
from service.scheduler import glances
from tests import builders
from tests.audit import audit
from tests.waiting import wait_until

START = datetime.now(UTC) + timedelta(hours=1)
"""After whatever the database itself notes as the time of a study's making."""

SETTLE_SECONDS = 2.0


@dataclass
class Machine:
    """A worker whose trials end after so many seconds, as their study says; it trains nothing."""

    name: str
    lanes: int
    current: int | None = None
    held: list[tuple[Lease, float]] = field(default_factory=list)

    def leave_ended(self, at: float) -> list[Lease]:
        ended = [lease for lease, until in self.held if until <= at]
        self.held = [(lease, until) for lease, until in self.held if until > at]
        return ended


class Fleet:
    """Machines that train studies of endless trials; seconds count from ``START``."""

    def __init__(self, engine: Engine, machines: Sequence[Machine], stay: float = 10) -> None:
        self.engine, self.machines, self.stay = engine, machines, stay
        self.seconds: dict[int, Callable[[int], float]] = {}
        self.had: dict[int, float] = {}
        """Lane-seconds, by study."""
        self.at = 0.0
        self.settled = -SETTLE_SECONDS

    def add(self, study: Study, seconds: Callable[[int], float]) -> None:
        """``seconds`` is how long the trial of a number takes."""
        self.seconds[study.study_id] = seconds
        self.had[study.study_id] = 0.0

    def run(self, until: float, step: float = 1.0) -> None:
        while self.at < until:
            self.at += step
            now = START + timedelta(seconds=self.at)
            with transaction(self.engine) as session:
                for study_id in self.seconds:
                    self._append(session, study_id)
                if self.at - self.settled >= SETTLE_SECONDS:
                    shares.settle(session, now=now)
                    self.settled = self.at
                for machine in self.machines:
                    self._meet(session, machine, now)
            for machine in self.machines:
                for lease, _ in machine.held:
                    self.had[lease.study_id] += step

    def _append(self, session: Session, study_id: int) -> None:
        """Keep as many trials waiting as there are lanes."""
        query = "SELECT count(*) FROM regtune.trials WHERE study_id = :id AND state = 'waiting'"
        waiting = session.execute(text(query), {"id": study_id}).scalar_one()
        study = studies.by_id(session, study_id)
        missing = sum(machine.lanes for machine in self.machines) - waiting
        if missing > 0 and study.state == "active":
            leasing.append(
                session,
                study_id,
                [builders.suggestion(study, study.appended + i) for i in range(missing)],
                expected=study.appended,
            )

    def _meet(self, session: Session, machine: Machine, now: datetime) -> None:
        ended = machine.leave_ended(self.at)
        outcomes = [(lease, reporting.Pruned("enough")) for lease in ended]
        reporting.finish(session, outcomes, machine.name, now=now)
        free = machine.lanes - len(machine.held)
        if not free:
            return
        chosen = shares.choose(
            session, machine.name, current=machine.current, stay_seconds=self.stay, now=now
        )
        if chosen is None:
            return
        machine.current = chosen
        for lease in leasing.lease(
            session, chosen, machine.name, free, 1e6, slots=machine.lanes, now=now
        ):
            machine.held.append((lease, self.at + self.seconds[chosen](lease.number)))


def fleet(engine: Engine, lanes: Sequence[int], **offers: Sequence[str]) -> Fleet:
    machines = [Machine(f"w{i}", count) for i, count in enumerate(lanes)]
    for machine in machines:
        datasets = offers.get(machine.name, ("digits",))
        builders.register(engine, machine.name, machine.lanes, datasets)
    return Fleet(engine, machines)


def create(engine: Engine, name: str, priority: int, dataset: str = "digits") -> Study:
    return builders.create(
        engine,
        name,
        priority=priority,
        budget={"trials": 100_000},
        task={"dataset": dataset, "model": "mlp"},
    )


def portions(had: Mapping[int, float]) -> list[float]:
    total = sum(had.values())
    return [had[study_id] / total for study_id in sorted(had)]


@pytest.mark.parametrize(
    ("lanes", "seconds"),
    [
        ([1], (5.0, 5.0)),  # one lane: turns alone
        ([8], (2.0, 20.0)),  # trials ten times as long
        # A worker for one, three for the other; half a worker and one and a half.
        pytest.param([3, 3, 3, 3], (5.0, 5.0), marks=pytest.mark.slow),
        pytest.param([2, 8], (8.0, 3.0), marks=pytest.mark.slow),
    ],
)
def test_two_studies_get_lane_time_by_their_weights(
    engine: Engine, lanes: Sequence[int], seconds: tuple[float, float]
) -> None:
    machines = fleet(engine, lanes)
    for name, priority, length in zip("ab", (1, 3), seconds, strict=True):
        study = create(engine, name, priority)
        machines.add(study, lambda number, length=length: length * (0.6 + number % 5 * 0.2))
    machines.run(500)
    if len(set(lanes)) == 1:
        assert portions(machines.had) == pytest.approx([0.25, 0.75], rel=0.1)
    # Workers' time, which is what is shared where workers differ in their numbers of lanes.
    assert portions(worker_seconds(engine)) == pytest.approx([0.25, 0.75], rel=0.1)
    assert audit(engine) == {}


@pytest.mark.slow
def test_a_study_of_little_weight_does_not_starve(engine: Engine) -> None:
    machines = fleet(engine, [2])
    for name, priority in (("small", 1), ("large", 40)):
        machines.add(create(engine, name, priority), lambda _: 3.0)
    machines.run(900)
    assert portions(machines.had) == pytest.approx([1 / 41, 40 / 41], rel=0.1)


def test_a_study_that_is_new_or_was_paused_has_saved_nothing_up(engine: Engine) -> None:
    """From then on it gets its share, neither more nor less."""
    machines = fleet(engine, [4])
    first, second, third = (create(engine, name, 1) for name in "abc")
    act(engine, "b", "pause")
    act(engine, "c", "pause")
    for study in (first, second, third):
        machines.add(study, lambda _: 4.0)
    machines.run(200)
    assert portions(machines.had) == [1, 0, 0]
    act(engine, "b", "resume")
    machines.run(500)
    since = {id_: had - (800 if id_ == first.study_id else 0) for id_, had in machines.had.items()}
    assert portions(since) == pytest.approx([0.5, 0.5, 0], rel=0.1)


def test_what_is_changed_of_the_weights_holds_from_then_on(engine: Engine) -> None:
    machines = fleet(engine, [4])
    for name in "ab":
        machines.add(create(engine, name, 1), lambda _: 4.0)
    machines.run(200)
    before = dict(machines.had)
    with transaction(engine) as session:
        studies.change(session, "b", parse_change({"priority": 4}), "test")
    machines.run(600)
    since = {study_id: machines.had[study_id] - before[study_id] for study_id in before}
    assert portions(before) == pytest.approx([0.5, 0.5], rel=0.1)
    assert portions(since) == pytest.approx([0.2, 0.8], rel=0.1)


def test_workers_that_cannot_train_a_study_leave_their_places_elsewhere_to_it(
    engine: Engine,
) -> None:
    """One worker of two has the second study's data set; so it trains that alone."""
    machines = fleet(engine, [4, 4], w1=("digits", "mnist"))
    common, rare = create(engine, "a", 1), create(engine, "b", 1, "mnist")
    machines.add(common, lambda _: 5.0)
    machines.add(rare, lambda _: 3.0)
    machines.run(200)
    assert portions(machines.had) == pytest.approx([0.5, 0.5], rel=0.1)
    query = "SELECT DISTINCT worker FROM regtune.trials WHERE study_id = :id AND worker > ''"
    with engine.connect() as connection:
        of_rare = connection.execute(text(query), {"id": rare.study_id}).scalars().all()
    assert of_rare == ["w1"]


def test_a_worker_stays_with_its_study_for_a_while(engine: Engine) -> None:
    """Each change means that another model is built."""
    machines = fleet(engine, [4])
    for name in "ab":
        machines.add(create(engine, name, 1), lambda number: 1.0 + number % 3)
    changes, was = 0, None
    for at in range(1, 301):
        machines.run(at, step=1)
        current = machines.machines[0].current
        changes, was = changes + (current != was), current
    assert 5 < changes <= 300 / machines.stay + 1


@pytest.mark.parametrize(
    ("requires", "can"),
    [
        ({}, ["cpu", "large", "small"]),
        ({"device": "cuda"}, ["large", "small"]),
        ({"device": "cuda", "min_memory_gb": 24}, ["large"]),
        ({"min_memory_gb": 24}, ["cpu", "large"]),
        ({"device": "xpu"}, []),
    ],
)
def test_only_workers_with_the_device_that_a_study_requires_train_it(
    engine: Engine, requires: dict[str, Any], can: list[str]
) -> None:
    study = builders.create(engine, requires=requires)
    devices = (("cpu", "cpu", 64), ("large", "cuda", 80), ("small", "cuda", 16))
    for name, kind, gigabytes in devices:
        builders.register(engine, name, device_kind=kind, memory_bytes=gigabytes * 10**9)
    with transaction(engine) as session:
        assert glances.of(session, study.study_id, 60, 2).wanted_lanes == len(can)
    builders.append(engine, study, 1)
    with transaction(engine) as session:
        chosen = [name for name, _, _ in devices if shares.choose(session, name)]
    assert chosen == can


def test_a_lease_is_charged_once_however_many_settle_at_once(engine: Engine) -> None:
    """The second one waits for the first, and finds the charge gone and the sum made."""
    study = builders.create(engine)
    builders.append(engine, study, 2)
    first, _ = builders.lease(engine, study, 2)
    later = START + timedelta(seconds=10)
    with transaction(engine) as session:
        reporting.finish(session, [(first, builders.completed())], "w", now=later)
    with ThreadPoolExecutor(1) as pool:
        with transaction(engine) as session:
            shares.settle(session, now=later)
            waiting = pool.submit(settle_by_itself, engine, later)
            wait_until(lambda: is_kept_waiting(engine))
        waiting.result(30)
    query = "SELECT sum(worker_seconds) FROM regtune.trials"
    with engine.connect() as connection:
        (row,) = connection.execute(text("SELECT * FROM regtune.shares"))
        ended = connection.execute(text(query)).scalar_one()
    assert row.ended_seconds == pytest.approx(ended)
    assert row.worker_seconds == pytest.approx(2 * ended, rel=1e-3)  # the second is running


def settle_by_itself(engine: Engine, now: datetime) -> None:
    with transaction(engine) as session:
        shares.settle(session, now=now)


def is_kept_waiting(engine: Engine) -> bool:
    query = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock')"
    with engine.connect() as connection:
        return bool(connection.execute(text(query)).scalar())


def act(engine: Engine, name: str, verb: Verb) -> None:
    with transaction(engine) as session:
        studies.act(session, name, verb, "test")


def worker_seconds(engine: Engine) -> dict[int, float]:
    query = "SELECT study_id, worker_seconds FROM regtune.shares"
    with engine.connect() as connection:
        return {row.study_id: row.worker_seconds for row in connection.execute(text(query))}


def test_of_all_studies_that_are_trained_the_trial_that_has_waited_longest_is_seen(
    engine: Engine,
) -> None:
    def seen() -> int | None:
        with transaction(engine) as session:
            return shares.longest_waiting(session)

    first, second = builders.create(engine, "first"), builders.create(engine, "second")
    assert seen() is None
    ids = [*builders.append(engine, first, 2), *builders.append(engine, second, 2)]
    assert seen() == ids[0]
    builders.lease(engine, first, 1)
    assert seen() == ids[1]
    with transaction(engine) as session:
        studies.act(session, "first", "pause", "test")
    assert seen() == ids[2]
