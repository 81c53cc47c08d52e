import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import optuna
import pytest
from alembic import command
from sqlalchemy import Engine, create_engine, make_url, text
from sqlalchemy.exc import IntegrityError

from migrations.check import differences
from regtune import database, optuna_tables, studies
from regtune.database import transaction
from regtune.errors import DatabaseUnavailable, UnknownSchema
from regtune.spec import parse_spec
from regtune.studies import ModelFacts
from tests import builders
from tests.audit import audit
from tests.serving import app, serving


def test_the_migrations_lead_to_the_tables_in_the_code(empty_database_url: str) -> None:
    database.upgrade(empty_database_url)
    assert differences(empty_database_url) == []


def test_many_may_upgrade_at_once_and_again(empty_database_url: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(database.upgrade, [empty_database_url] * 4))
    database.upgrade(empty_database_url)
    engine = database.connect(empty_database_url)
    database.check(engine)
    engine.dispose()


SPEC_OF_0001 = {
    "name": "old",
    "task": {"dataset": "digits", "model": "mlp", "hidden": [128], "norm": "batch"},
    "training": {
        "optimizer": "adamw",
        "learning_rate": 0.002,
        "batch_size": 128,
        "max_epochs": 50,
        "schedule": "constant",
        "min_delta": 0.0,
        "l1": "proximal",
        "seed": 0,
    },
    "search": {
        "weight_decay": {"low": 1e-4, "high": 3.0, "log": True, "or_zero": True},
        "dropout": {"low": 0.0, "high": 0.7, "log": False, "or_zero": False},
        "l1_lambda": 0.0,
        "patience": 9,
    },
    "validation": {"fraction": 0.2},
    "budget": {"trials": 5, "seconds": None},
    "sampler": {"name": "tpe", "seed": 0},
    "pruner": {
        "name": "none",
        "first_epoch": None,
        "startup_trials": 5,
        "reduction_factor": 3,
    },
    "priority": 1,
}
"""A study as the first version stored it."""

PARAMS_OF_0001 = {"weight_decay": 0.5, "dropout": 0.2, "l1_lambda": 0.0, "patience": 9}

ROWS_OF_0001 = """
INSERT INTO public.studies (study_name) VALUES ('old');
INSERT INTO public.study_directions (study_id, direction, objective) VALUES (1, 'MINIMIZE', 0);
INSERT INTO public.trials (number, study_id, state) VALUES (0, 1, 'COMPLETE'), (1, 1, 'WAITING');
INSERT INTO public.trial_values (trial_id, objective, value, value_type)
VALUES (1, 0, 0.5, 'FINITE');
INSERT INTO regtune.studies (study_id, name, spec, state, priority, budget_trials, appended)
VALUES (1, 'old', cast(:spec AS jsonb), 'active', 1, 5, 2);
INSERT INTO regtune.trials
       (trial_id, study_id, number, kind, params, state, attempt, value, validation_score,
        best_epoch, test_loss, test_score, reason, finished_at)
VALUES (1, 1, 0, 'baseline', cast(:params AS jsonb), 'complete', 1, 0.5, 0.9, 1, 0.6, 0.8,
        'finished', now()),
       (2, 1, 1, 'default', cast(:params AS jsonb), 'waiting', 0, NULL, NULL, NULL, NULL, NULL,
        NULL, NULL);
INSERT INTO regtune.epochs VALUES (1, 1, 1, 1.0, 0.5, 0.9, 0.0, 0.0, 0.1);
INSERT INTO public.trial_intermediate_values
       (trial_id, step, intermediate_value, intermediate_value_type)
VALUES (1, 1, 0.5, 'FINITE');
INSERT INTO regtune.events (study_id, number, kind, actor) VALUES (1, 0, 'trial_started', 'w');
INSERT INTO regtune.workers
       (name, host, pid, device, lanes, wanted_lanes, datasets, models, started_at, heartbeat_at)
VALUES ('w', 'h', 1, 'cpu', 4, 1, '["digits"]', '["mlp"]', now(), now());
"""


@pytest.fixture
def old_database_url(empty_database_url: str) -> str:
    """A database as the first version left it, with a study that it had not finished."""
    optuna_tables.create(database.address(empty_database_url))
    engine = database.connect(empty_database_url)
    values = {"spec": json.dumps(SPEC_OF_0001), "params": json.dumps(PARAMS_OF_0001)}
    with engine.begin() as connection:
        connection.execute(text("CREATE SCHEMA regtune"))
        command.upgrade(database._alembic(connection), "0001")
        for statement in ROWS_OF_0001.split(";\n")[:-1]:
            connection.execute(text(statement), values)
    with pytest.raises(UnknownSchema, match="is at 0001"):
        database.check(engine)
    engine.dispose()
    return empty_database_url


def test_what_the_first_version_left_is_read_and_gone_on_with(old_database_url: str) -> None:
    database.upgrade(old_database_url)
    assert differences(old_database_url) == []
    engine = database.connect(old_database_url)
    with transaction(engine) as session:
        study = studies.find(session, "old")
        assert study.model is None
        assert study.spec.search.learning_rate.numbers() == (0.002,)
        assert not studies.create(session, parse_spec(SPEC_OF_0001), "test")[1]
        facts = ModelFacts(1, ["w"], [], [], True, steps_per_epoch=100, training_rows=9)
        studies.describe_model(session, 1, facts)
    (lease,) = builders.lease(engine, study)
    assert lease.params == PARAMS_OF_0001
    builders.complete(engine, [lease], 0.25)
    builders.append(engine, study, 1)
    assert audit(engine) == {}
    with serving(app(old_database_url)) as client:
        for path in ("", "/trials", "/trials/0", "/trials/1"):
            assert client.get(f"/v1/studies/old{path}").is_success
        best = client.get("/v1/studies/old/best").json()
        (worker,) = client.get("/v1/workers").json()["items"]
    assert best["params"] == best["baseline"]["params"] == PARAMS_OF_0001
    assert best["decay_timescale_epochs"] == pytest.approx(10.0)  # 1 / (0.002 · 0.5 · 100 steps)
    assert (worker["occupancy"], worker["capacity"]) == (None, None)
    engine.dispose()


def test_a_worker_of_a_version_that_does_not_count_cannot_end_a_trial(engine: Engine) -> None:
    with pytest.raises(IntegrityError, match="null value in column"), engine.begin() as connection:
        connection.execute(text("INSERT INTO regtune.charges (study_id, seconds) VALUES (1, 2)"))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (
            {"name": "extrapolation", "first_epoch": 9, "startup_trials": 3, "reduction_factor": 4},
            {"name": "extrapolation", "first_epoch": 9},
        ),
        (
            {"name": "median", "first_epoch": None, "startup_trials": 3, "reduction_factor": 4},
            {"name": "median", "first_epoch": None, "startup_trials": 3},
        ),
        ({"name": "asha", "first_epoch": 50, "startup_trials": 3}, {"name": "none"}),
    ],
)
def test_settings_of_a_pruner_that_do_nothing_are_dropped(
    old_database_url: str, before: dict[str, Any], after: dict[str, Any]
) -> None:
    engine = database.connect(old_database_url)
    with engine.begin() as connection:
        connection.execute(
            text("UPDATE regtune.studies SET spec = jsonb_set(spec, '{pruner}', :pruner)"),
            {"pruner": json.dumps(before)},
        )
    database.upgrade(old_database_url)
    with transaction(engine) as session:
        shown = studies.find(session, "old").spec.canonical()["pruner"]
    assert shown == {**shown, **after}
    assert shown.keys() <= before.keys()
    engine.dispose()


def test_the_tables_of_the_first_version_can_be_gone_back_to(old_database_url: str) -> None:
    database.upgrade(old_database_url)
    engine = database.connect(old_database_url)
    with engine.begin() as connection:
        command.downgrade(database._alembic(connection), "0001")
    database.upgrade(old_database_url)
    assert differences(old_database_url) == []
    with transaction(engine) as session:
        study = studies.find(session, "old")
    assert builders.states(engine, study) == ["complete", "waiting"]
    engine.dispose()


def test_an_empty_database_is_told_how_to_be_upgraded(empty_database_url: str) -> None:
    engine = database.connect(empty_database_url)
    with pytest.raises(UnknownSchema, match="regtune db upgrade"):
        database.check(engine)
    engine.dispose()


def test_a_schema_of_another_version_is_refused(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text("UPDATE regtune.alembic_version SET version_num = '9999'"))
    with pytest.raises(UnknownSchema, match="9999"):
        database.check(engine)


@pytest.mark.parametrize(
    "url", ["mysql://h/d", "not an address", "", "postgresql://nobody@127.0.0.1:1/none"]
)
def test_an_address_that_leads_nowhere_is_named(url: str) -> None:
    with pytest.raises(DatabaseUnavailable):
        database.check(database.connect(url))


@pytest.fixture
def namesake_url(empty_database_url: str) -> Iterator[str]:
    """A fresh database of a role that is named like our schema, and is no superuser."""
    admin = create_engine(empty_database_url, isolation_level="AUTOCOMMIT")
    name = make_url(empty_database_url).database
    with admin.connect() as connection:
        connection.execute(text("CREATE ROLE regtune LOGIN"))
        connection.execute(text(f"ALTER DATABASE {name} OWNER TO regtune"))
    yield make_url(empty_database_url).set(username="regtune").render_as_string(False)
    with admin.connect() as connection:
        connection.execute(text("REASSIGN OWNED BY regtune TO postgres"))
        connection.execute(text("DROP OWNED BY regtune"))
        connection.execute(text("DROP ROLE regtune"))
    admin.dispose()


def test_a_role_named_like_our_schema_sees_optunas_tables(namesake_url: str) -> None:
    database.upgrade(namesake_url)
    database.upgrade(namesake_url)
    engine = database.connect(namesake_url)
    database.check(engine)
    study = builders.create(engine)
    builders.append(engine, study, 2)
    builders.complete(engine, builders.lease(engine, study))
    assert audit(engine) == {}
    read = optuna.load_study(study_name="study", storage=namesake_url)
    assert [trial.state.name for trial in read.get_trials()] == ["COMPLETE", "WAITING"]
    engine.dispose()


def test_a_search_path_that_hides_optunas_tables_is_refused(
    engine: Engine, database_url: str
) -> None:
    hiding = create_engine(database_url, connect_args={"options": "-c search_path=regtune"})
    with pytest.raises(UnknownSchema, match="search_path begins with 'regtune'"):
        database.check(hiding)
    hiding.dispose()


def test_events_of_a_dump_restored_on_another_server_are_readable(
    engine: Engine, database_url: str
) -> None:
    """That has not come to the numbers of the transactions that wrote them."""
    for name in ("early", "late"):
        builders.create(engine, name)
    with engine.begin() as connection:
        for place, number in enumerate(("7", "999999999999"), start=1):
            change = (
                f"UPDATE regtune.events SET transaction_id = '{number}' WHERE event_id = {place}"
            )
            connection.execute(text(change))
    database.upgrade(database_url)
    assert set(builders.column(engine, "SELECT transaction_id::text FROM regtune.events")) == {"1"}
