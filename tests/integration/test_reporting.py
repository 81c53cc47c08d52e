import math
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import optuna
import pytest
from sqlalchemy import Engine, text

from regtune import leasing, reporting, studies
from regtune.database import transaction
from regtune.leasing import Lease
from regtune.reporting import Epoch, Failed, Pruned
from tests import builders
from tests.audit import audit
from tests.builders import epoch

LATER = datetime.now(UTC) + timedelta(hours=1)


@pytest.fixture
def leases(engine: Engine) -> Sequence[Lease]:
    study = builders.create(engine)
    builders.append(engine, study, 3)
    return builders.lease(engine, study, 3)


def flush(
    engine: Engine, leases: Sequence[Lease], epochs: dict[int, list[Epoch]]
) -> reporting.Verdicts:
    with transaction(engine) as session:
        return reporting.flush(session, leases, epochs, 30)


def count(engine: Engine, table: str) -> int:
    with engine.connect() as connection:
        return connection.execute(text(f"SELECT count(*) FROM {table}")).scalar_one()


def lose(engine: Engine, lease: Lease) -> None:
    with transaction(engine) as session:
        leasing.expire(session, lease.study_id, 9, now=LATER)


def test_one_flush_records_epochs_of_many_trials_once(
    engine: Engine, leases: Sequence[Lease]
) -> None:
    first, second, _ = leases
    epochs = {first.trial_id: [epoch(1), epoch(2)], second.trial_id: [epoch(1)]}
    assert flush(engine, leases, epochs).held == {lease.trial_id for lease in leases}
    flush(engine, leases, epochs)
    assert count(engine, "regtune.epochs") == 3
    assert count(engine, "public.trial_intermediate_values") == 3


def test_a_flush_renews_the_leases(engine: Engine, leases: Sequence[Lease]) -> None:
    with transaction(engine) as session:
        reporting.flush(session, leases[:2], {}, 7200)
        assert leasing.expire(session, leases[0].study_id, 9, now=LATER) == [leases[2].trial_id]


def test_losses_that_are_not_finite_are_kept_as_they_are(
    engine: Engine, leases: Sequence[Lease]
) -> None:
    losses = [math.nan, math.inf, -math.inf, 0.1]
    epochs = [epoch(i + 1, loss) for i, loss in enumerate(losses)]
    flush(engine, leases, {leases[0].trial_id: epochs})
    study = optuna.load_study(study_name="study", storage=_url(engine))
    shown = study.get_trials()[0].intermediate_values
    assert repr(list(shown.values())) == repr(losses)
    with engine.connect() as connection:
        ours = connection.execute(
            text("SELECT validation_loss FROM regtune.epochs ORDER BY epoch")
        ).scalars()
        assert repr(list(ours)) == repr(losses)


def test_a_worker_that_lost_a_lease_can_write_nothing_for_that_trial(
    engine: Engine, leases: Sequence[Lease]
) -> None:
    lose(engine, leases[0])
    verdicts = flush(engine, leases, {leases[0].trial_id: [epoch(1)]})
    assert verdicts.held == frozenset()
    with transaction(engine) as session:
        assert reporting.finish(session, [(leases[0], builders.completed())], "w") == frozenset()
        assert leasing.release(session, leases, "w") == []
    assert count(engine, "regtune.epochs") == 0
    assert count(engine, "public.trial_values") == 0


def test_a_zombie_cannot_write_into_its_trials_next_attempt(
    engine: Engine, leases: Sequence[Lease]
) -> None:
    zombie = leases[0]
    flush(engine, leases, {zombie.trial_id: [epoch(1, 9.0)]})
    lose(engine, zombie)
    with transaction(engine) as session:
        study = studies.by_id(session, zombie.study_id)
    (heir, *_) = builders.lease(engine, study, 3, "heir")
    assert heir.trial_id == zombie.trial_id
    flush(engine, [heir], {heir.trial_id: [epoch(1, 0.5)]})
    assert flush(engine, [zombie], {zombie.trial_id: [epoch(2, 9.0)]}).held == frozenset()
    builders.complete(engine, [heir])
    with engine.connect() as connection:
        rows = connection.execute(
            text("SELECT attempt, epoch, validation_loss FROM regtune.epochs ORDER BY 1, 2")
        )
        assert [tuple(row) for row in rows] == [(1, 1, 9.0), (2, 1, 0.5)]
    assert audit(engine) == {}


def test_one_lost_lane_leaves_the_others_alone(engine: Engine, leases: Sequence[Lease]) -> None:
    with transaction(engine) as session:
        leasing.release(session, leases[:1], "w")
    verdicts = flush(engine, leases, {lease.trial_id: [epoch(1)] for lease in leases})
    assert verdicts.held == {leases[1].trial_id, leases[2].trial_id}
    assert count(engine, "regtune.epochs") == 2


def test_a_verdict_reaches_the_worker_with_its_next_flush(
    engine: Engine, leases: Sequence[Lease]
) -> None:
    judged = {leases[0].trial_id: (1, "pruned by median at epoch 9")}
    other_attempt = {leases[1].trial_id: (2, "meant for another attempt")}
    with transaction(engine) as session:
        reporting.request_stop(session, judged | other_attempt)
    verdicts = flush(engine, leases, {})
    assert verdicts.stop == {leases[0].trial_id: "pruned by median at epoch 9"}


def test_each_outcome_is_kept_with_its_reason(engine: Engine, leases: Sequence[Lease]) -> None:
    outcomes = [
        builders.completed(0.25),
        Pruned("diverged"),
        Failed("ValueError: no", "Traceback …\nValueError: no"),
    ]
    flush(engine, leases, {lease.trial_id: [epoch(1, 0.25)] for lease in leases})
    with transaction(engine) as session:
        pairs = list(zip(leases, outcomes, strict=True))
        assert len(reporting.finish(session, pairs, "w")) == 3
        assert reporting.finish(session, pairs, "w") == frozenset()
    with engine.connect() as connection:
        rows = connection.execute(
            text("SELECT state, reason, value, error FROM regtune.trials ORDER BY number")
        )
        assert [tuple(row) for row in rows] == [
            ("complete", "finished", 0.25, None),
            ("pruned", "diverged", None, None),
            ("failed", "ValueError: no", None, "Traceback …\nValueError: no"),
        ]
    assert audit(engine) == {}


def test_the_spread_over_members_is_kept_and_told_to_optuna(
    engine: Engine, leases: Sequence[Lease]
) -> None:
    several = replace(builders.completed(0.25), validation_loss_spread=0.125)
    pairs = [(leases[0], several), (leases[1], builders.completed(0.25))]
    flush(engine, leases, {lease.trial_id: [epoch(1, 0.25)] for lease, _ in pairs})
    with transaction(engine) as session:
        assert len(reporting.finish(session, pairs, "w")) == 2
    with engine.connect() as connection:
        spreads = connection.execute(
            text("SELECT value_spread FROM regtune.trials ORDER BY number")
        )
        assert list(spreads.scalars()) == [0.125, None, None]
    shown = optuna.load_study(study_name="study", storage=_url(engine)).get_trials()
    assert shown[0].user_attrs["validation_loss_spread"] == 0.125
    assert "validation_loss_spread" not in shown[1].user_attrs
    assert audit(engine) == {}


def _url(engine: Engine) -> str:
    return engine.url.render_as_string(hide_password=False)


def retried(engine: Engine, lost: Lease) -> Lease:
    """Lose a trial's lease and get the next one."""
    lose(engine, lost)
    with transaction(engine) as session:
        (again,) = leasing.lease(session, lost.study_id, "w", 1, 30)
    assert again.trial_id == lost.trial_id
    return again


def resume(engine: Engine, lease: Lease, curve: Sequence[Epoch]) -> frozenset[int]:
    with transaction(engine) as session:
        return reporting.resume(session, [(lease, curve)])


def record(engine: Engine, lease: Lease) -> list[tuple[int, int]]:
    """Attempt and epoch of all that is on record of a trial."""
    query = text("SELECT attempt, epoch FROM regtune.epochs WHERE trial_id = :id ORDER BY 1, 2")
    with engine.connect() as connection:
        return [tuple(row) for row in connection.execute(query, {"id": lease.trial_id})]


def optuna_curve(engine: Engine, lease: Lease) -> dict[int, float]:
    url = engine.url.render_as_string(hide_password=False)
    study = optuna.load_study(study_name="study", storage=url)
    return dict(study.trials[lease.number].intermediate_values)


def test_a_resumed_attempt_takes_over_the_curve_up_to_its_checkpoint(engine, leases):
    """Epochs 1 to 5 are recorded, the checkpoint is of epoch 3; its worker trained 4 and 5."""
    curve = [builders.epoch(number, 1 / number) for number in range(1, 6)]
    first = leases[0]
    flush(engine, leases, {first.trial_id: curve})
    second = retried(engine, first)
    assert resume(engine, second, curve[:3]) == {first.trial_id}
    assert record(engine, first) == [(1, 4), (1, 5), (2, 1), (2, 2), (2, 3)]
    assert sorted(optuna_curve(engine, first)) == [1, 2, 3]
    flush(engine, [second], {first.trial_id: [builders.epoch(4, 0.2)]})
    assert audit(engine) == {}
    third = retried(engine, second)
    resume(engine, third, curve[:2])  # of a checkpoint that the second attempt did not write
    resume(engine, third, curve[:2])  # the connection was lost in its commit
    told = "SELECT detail -> 'attempt' FROM regtune.events WHERE kind = 'trial_resumed' ORDER BY 1"
    assert builders.column(engine, told) == [2, 3]
    assert record(engine, first) == [(1, 4), (1, 5), (2, 3), (2, 4), (3, 1), (3, 2)]
    assert optuna_curve(engine, first) == {1: 1, 2: 1 / 2}
    assert audit(engine) == {}


def test_what_a_checkpoint_knows_and_the_record_does_not_is_added(engine, leases):
    """The database was away while epochs 2 and 3 were trained."""
    curve = [builders.epoch(number, 1 / number) for number in range(1, 4)]
    flush(engine, leases, {leases[0].trial_id: curve[:1]})
    second = retried(engine, leases[0])
    resume(engine, second, curve)
    assert builders.column(engine, "SELECT max(epochs) FROM regtune.trials") == [3]
    assert record(engine, second) == [(2, 1), (2, 2), (2, 3)]
    assert optuna_curve(engine, second) == {1: 1, 2: 1 / 2, 3: 1 / 3}


def test_a_retried_trial_without_a_checkpoint_leaves_no_curve_of_an_earlier_attempt(engine, leases):
    flush(engine, leases, {leases[0].trial_id: [builders.epoch(1), builders.epoch(2)]})
    second = retried(engine, leases[0])
    resume(engine, second, [])
    assert record(engine, second) == [(1, 1), (1, 2)]
    assert optuna_curve(engine, second) == {}


def test_a_trial_that_is_pruned_before_it_is_resumed_leaves_no_curve_of_an_earlier_attempt(
    engine, leases
):
    curve = [builders.epoch(1), builders.epoch(2)]
    flush(engine, leases, {lease.trial_id: curve for lease in leases[:2]})
    second = retried(engine, leases[0])
    with transaction(engine) as session:
        assert reporting.finish(session, [(second, Pruned("looks bad"))], "a")
    assert optuna_curve(engine, second) == {}
    assert sorted(optuna_curve(engine, leases[1])) == [1, 2]
    assert audit(engine) == {}


def test_nobody_resumes_a_trial_without_its_lease(engine, leases):
    flush(engine, leases, {leases[0].trial_id: [builders.epoch(1), builders.epoch(2)]})
    second = retried(engine, leases[0])
    retried(engine, second)
    assert resume(engine, second, [builders.epoch(1)]) == frozenset()
    assert record(engine, second) == [(1, 1), (1, 2)]
    assert sorted(optuna_curve(engine, second)) == [1, 2]
