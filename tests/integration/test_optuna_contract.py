"""What we write and what Optuna itself writes for the same trials, row by row, field by field."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
import pytest
from optuna.distributions import BaseDistribution
from optuna.trial import TrialState
from sqlalchemy import Engine, create_engine, text

from regtune import database, leasing, optuna_tables, reporting
from regtune.database import transaction
from regtune.errors import UnknownSchema
from regtune.leasing import Suggestion
from regtune.reporting import Completed, Failed, Pruned
from regtune.studies import Study
from service.scheduler.suggestion import distributions as distributions_of
from tests import builders
from tests.builders import epoch

POINTS: list[dict[str, float]] = [
    {"weight_decay": 1e-5, "dropout": 0.1, "l1_lambda": 0.01, "patience": 3},
    {"weight_decay": 3.0, "dropout": 0.5, "l1_lambda": 0.0, "patience": 5},
    {"weight_decay": 0.02, "dropout": 0.3, "l1_lambda": 0.01, "patience": 4},
    {"weight_decay": 0.5, "dropout": 0.3, "l1_lambda": 0.0, "patience": 3},
    {"weight_decay": 0.7, "dropout": 0.1, "l1_lambda": 0.0, "patience": 5},
]
"""The last one stays waiting, the one before running."""

LOSSES = [[0.75, 0.5], [1.0, math.nan], [math.inf], [0.25]]
"""Of the trials that complete, diverge to NaN, are pruned at infinity, and run."""

SEARCH = {
    "weight_decay": {"low": 1e-4, "high": 3.0, "log": True, "or_zero": True},
    "dropout": [0.1, 0.3, 0.5],
    "l1_lambda": {"low": 0.0, "high": 0.02},
    "patience": {"low": 2, "high": 6},
}


SHAPING_SEARCH = {
    "optimizer": ["adamw", "sgd"],
    "batch_size": [64, 256],
    "model": {"hidden": [[64], [256, 32]]},
    "weight_decay": {
        "adamw": {"low": 1e-4, "high": 3.0, "log": True, "or_zero": True},
        "sgd": [0.0, 1e-4],
    },
    "dropout": {"low": 0.0, "high": 0.5},
    "l1_lambda": 0.0,
    "patience": 3,
}

_COMMON = {"batch_size": 256, "model.hidden": "[256,32]", "dropout": 0.25}

SHAPING_POINTS: list[dict[str, Any]] = [
    {"optimizer": "adamw", "weight_decay[adamw]": 1e-5, **_COMMON},
    {"optimizer": "sgd", "weight_decay[sgd]": 1e-4, **_COMMON},
    {"optimizer": "sgd", "weight_decay[sgd]": 0.0, **_COMMON, "batch_size": 64},
    {"optimizer": "adamw", "weight_decay[adamw]": 1.0, **_COMMON, "model.hidden": "[64]"},
    {"optimizer": "sgd", "weight_decay[sgd]": 0.0, **_COMMON},
]


@pytest.mark.parametrize(("search", "points"), [(SEARCH, POINTS), (SHAPING_SEARCH, SHAPING_POINTS)])
def test_every_row_is_as_optuna_would_have_written_it(
    engine: Engine,
    empty_database_url: str,
    search: Mapping[str, Any],
    points: Sequence[Mapping[str, Any]],
) -> None:
    study = builders.create(engine, search=search, budget={"trials": 9})
    distributions = distributions_of(study.spec)
    _through_ours(engine, study, points, distributions)
    _through_optuna(empty_database_url, points, distributions, _study_attrs(engine))
    theirs = create_engine(empty_database_url)
    for table, columns in _TABLES.items():
        ours = _rows(engine, table, columns)
        assert ours == _rows(theirs, table, columns), table
        assert ours, f"nothing to compare in {table}"
    theirs.dispose()


def test_no_table_of_optunas_is_left_out_of_the_comparison(engine: Engine) -> None:
    left_out = {"alembic_version", "version_info", "study_system_attributes", "trial_heartbeats"}
    with engine.connect() as connection:
        tables = connection.execute(
            text("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
        ).scalars()
        assert set(tables) == set(_TABLES) | left_out


def test_times_are_utc_and_in_order(engine: Engine) -> None:
    study = builders.create(engine)
    builders.append(engine, study, 1)
    builders.complete(engine, builders.lease(engine, study))
    with engine.connect() as connection:
        assert connection.execute(
            text(
                "SELECT datetime_start <= datetime_complete AND "
                "datetime_complete - now() AT TIME ZONE 'utc' < interval '1 minute' "
                "FROM public.trials"
            )
        ).scalar()


def test_optuna_reads_the_best_trial(engine: Engine) -> None:
    study = builders.create(engine)
    builders.append(engine, study, 3)
    for lease, loss in zip(builders.lease(engine, study, 3), [0.5, 0.2, 0.9], strict=True):
        builders.complete(engine, [lease], loss)
    read = optuna.load_study(study_name="study", storage=_url(engine))
    assert read.best_trial.number == 1
    assert read.best_value == 0.2
    assert read.best_trial.duration is not None
    assert read.best_trial.duration.total_seconds() < 60
    assert [trial.state.name for trial in read.get_trials()] == ["COMPLETE"] * 3


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE public.version_info SET schema_version = 13",
        "UPDATE public.alembic_version SET version_num = 'v6.0.0.a'",
        "DROP TABLE public.version_info",
    ],
)
def test_an_unknown_version_of_optunas_tables_is_refused(engine: Engine, change: str) -> None:
    with engine.begin() as connection:
        connection.execute(text(change))
    with pytest.raises(UnknownSchema, match="Optuna's tables"):
        database.check(engine)


def test_the_version_we_know_is_that_of_the_pinned_optuna(engine: Engine) -> None:
    with engine.connect() as connection:
        optuna_tables.check_version(connection)


def _through_ours(
    engine: Engine,
    study: Study,
    points: Sequence[Mapping[str, Any]],
    distributions: Mapping[str, BaseDistribution],
) -> None:
    suggestions = [
        Suggestion("suggested", point, distributions, _used(), {"note": [1, {"a": 0.5}]})
        for point in points
    ]
    with transaction(engine) as session:
        leasing.append(session, study.study_id, suggestions, expected=0)
    leases = builders.lease(engine, study, 4)
    epochs = {
        lease.trial_id: [epoch(i + 1, loss) for i, loss in enumerate(losses)]
        for lease, losses in zip(leases, LOSSES, strict=True)
    }
    outcomes = [
        Completed(0.5, 0.9, 2, 0.6, 0.8, "finished", 0.125),
        Pruned("diverged"),
        Pruned("pruned by median at epoch 1"),
    ]
    with transaction(engine) as session:
        reporting.flush(session, leases, epochs, 30)
        reporting.finish(session, list(zip(leases[:3], outcomes, strict=True)), "w")
    with transaction(engine) as session:
        suggestion = Suggestion("suggested", points[4], distributions, _used(), {"note": []})
        leasing.append(session, study.study_id, [suggestion], expected=5)
    with transaction(engine) as session:
        (_, failing) = leasing.lease(session, study.study_id, "w", 2, 30)
        reporting.finish(session, [(failing, Failed("ValueError", "Traceback"))], "w")
    with transaction(engine) as session:
        leasing.expire(session, study.study_id, 9)


def _through_optuna(
    url: str,
    points: Sequence[Mapping[str, Any]],
    distributions: Mapping[str, BaseDistribution],
    study_attrs: Mapping[str, Any],
) -> None:
    study = optuna.create_study(study_name="study", storage=url, direction="minimize")
    for key, value in study_attrs.items():
        study.set_user_attr(key, value)
    shown = {"used_weight_decay": 0.0, "used_patience": 3}
    if "optimizer" in distributions:  # what is not searched may go by it
        shown["used_input_noise"] = 0.0
    storage = optuna.storages.RDBStorage(url)
    study_id = storage.get_study_id_from_name("study")
    for point in [*points, points[4]]:
        note = {"note": [1, {"a": 0.5}]} if len(study.get_trials()) < 5 else {"note": []}
        study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.WAITING,
                params=dict(point),
                distributions={name: distributions[name] for name in point},
                user_attrs={"kind": "suggested", **shown},
                system_attrs=note,
            )
        )
    ids = [trial._trial_id for trial in study.get_trials()]
    assert storage.get_trial_id_from_study_id_trial_number(study_id, 0) == ids[0]
    trials = []
    for id_ in ids:
        storage.set_trial_state_values(id_, TrialState.RUNNING)
        trials.append(optuna.Trial(study, id_))
    for trial, losses in zip(trials, LOSSES, strict=False):
        for i, loss in enumerate(losses):
            trial.report(loss, i + 1)
    attributes: list[dict[str, Any]] = [
        {
            "reason": "finished",
            "worker": "w",
            "best_epoch": 2,
            "validation_score": 0.9,
            "validation_loss_spread": 0.125,
            "test_score": 0.8,
        },
        {"reason": "diverged", "worker": "w"},
        {"reason": "pruned by median at epoch 1", "worker": "w"},
        {},
        {},
        {"reason": "ValueError", "worker": "w", "error": "Traceback"},
    ]
    for trial, attrs in zip(trials, attributes, strict=True):
        for key, value in attrs.items():
            trial.set_user_attr(key, value)
    study.tell(trials[0], 0.5)
    study.tell(trials[1], state=TrialState.PRUNED)
    study.tell(trials[2], state=TrialState.PRUNED)
    study.tell(trials[5], state=TrialState.FAIL)


def _used() -> dict[str, float]:
    """What is trained; there is no noise in any trial, so nothing is told of it beside each."""
    return {"weight_decay": 0.0, "patience": 3, "input_noise": 0.0}


def _study_attrs(engine: Engine) -> Mapping[str, Any]:
    return optuna.load_study(study_name="study", storage=_url(engine)).user_attrs


_TABLES = {
    "studies": "study_id, study_name",
    "study_directions": "study_id, direction, objective",
    "study_user_attributes": "study_id, key, value_json::jsonb",
    "trials": "trial_id, number, study_id, state, datetime_start IS NULL,"
    " datetime_complete IS NULL",
    "trial_params": "trial_id, param_name, param_value, distribution_json",
    "trial_values": "trial_id, objective, value, value_type",
    "trial_intermediate_values": "trial_id, step, intermediate_value, intermediate_value_type",
    "trial_user_attributes": "trial_id, key, value_json",
    "trial_system_attributes": "trial_id, key, value_json",
}
"""Every column but the surrogate keys, which nothing refers to, and the clock's own reading."""


def _rows(engine: Engine, table: str, columns: str) -> list[str]:
    with engine.connect() as connection:
        rows = connection.execute(text(f"SELECT {columns} FROM public.{table}"))
        return sorted(repr(tuple(row)) for row in rows)


def _url(engine: Engine) -> str:
    return engine.url.render_as_string(hide_password=False)
