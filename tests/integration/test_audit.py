"""The audit finds what it is there to find: each kind of damage is done to a sound study once."""

import pytest
from sqlalchemy import Engine, text

from regtune import reporting, studies
from regtune.database import transaction
from tests import audit, builders

_OF = "WHERE trial_id = (SELECT trial_id FROM regtune.trials WHERE number = 1)"

DAMAGE = {
    "more trials than the budget": ["UPDATE regtune.studies SET appended = 2, budget_trials = 2"],
    "more epochs than the budget": ["UPDATE regtune.studies SET budget_trial_epochs = 5"],
    "epochs are not counted right": [f"UPDATE regtune.trials SET epochs = 1 {_OF}"],
    "numbers are not 0 … n - 1": [
        f"UPDATE {schema}.trials SET number = 3 WHERE number = 2"
        for schema in ("regtune", "public")
    ],
    "numbers do not follow ids": [
        f"UPDATE {schema}.trials SET number = {new} WHERE number = {old}"
        for schema in ("regtune", "public")
        for old, new in ((0, 9), (1, 0), (9, 1))
    ],
    "the public record differs from ours": [f"UPDATE public.trials SET state = 'RUNNING' {_OF}"],
    # As by a worker that has lost its lease, past what fences its writes.
    "the public value differs from ours": [f"UPDATE regtune.trials SET value = 0.1 {_OF}"],
    "an epoch by an attempt that never was": [
        f"UPDATE regtune.epochs SET attempt = 2 {_OF} AND epoch = 2"
    ],
    "a trial ended more than once": [
        "INSERT INTO regtune.events (study_id, number, kind, actor)"
        " SELECT study_id, 1, 'trial_pruned', 'zombie' FROM regtune.studies"
    ],
    "more leases given than attempts counted": [f"UPDATE regtune.trials SET attempt = 2 {_OF}"],
    "a complete trial has not recorded its best epoch": [
        f"UPDATE regtune.epochs SET validation_loss = 0.7 {_OF} AND epoch = 2"
    ],
    "epochs of the last attempt have gaps": [f"DELETE FROM regtune.epochs {_OF} AND epoch = 1"],
    "an epoch is on record twice": [
        "INSERT INTO regtune.epochs (trial_id, attempt, epoch, train_loss, validation_loss,"
        " validation_score, penalty, sparsity, seconds) SELECT trial_id, 0, epoch, train_loss,"
        f" validation_loss, validation_score, penalty, sparsity, seconds FROM regtune.epochs {_OF}"
    ],
    "Optuna's curve differs from ours": [
        f"DELETE FROM public.trial_intermediate_values {_OF} AND step = 1"
    ],
    "workers' time is not charged once": ["DELETE FROM regtune.charges"],
    "trials are not counted as they ended": ["UPDATE regtune.charges SET pruned = pruned + 1"],
    "a study is over but its trials are not": [
        f"UPDATE regtune.trials SET state = 'waiting', finished_at = NULL {_OF}"
    ],
}


def finish_study(engine: Engine) -> None:
    """A study of three trials, each with two epochs and its end on record."""
    study = builders.create(engine, budget={"trials": 3})
    builders.append(engine, study, 3)
    leases = builders.lease(engine, study, 3)
    with transaction(engine) as session:
        curves = {
            held.trial_id: [builders.epoch(1, 1.0), builders.epoch(2, 0.5)] for held in leases
        }
        reporting.flush(session, leases, curves, 30)
        ended = [(held, builders.completed(0.5, best_epoch=2)) for held in leases]
        reporting.finish(session, ended, "w")
        studies.end(session, study.study_id, "completed", "all 3 trials have ended", "test")


@pytest.mark.parametrize("finding", DAMAGE)
def test_damage_is_found(engine: Engine, finding: str) -> None:
    finish_study(engine)
    assert audit.audit(engine) == {}
    with engine.begin() as connection:
        for statement in DAMAGE[finding]:
            connection.execute(text(statement))
    assert audit.audit(engine)[finding]


def test_each_finding_is_provoked_once() -> None:
    assert set(DAMAGE) == set(audit._FINDINGS)
