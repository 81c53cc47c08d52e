from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import optuna
import pytest
from sqlalchemy import Engine, create_engine, make_url, text

from regtune import database
from regtune.errors import DatabaseUnavailable, UnknownSchema
from tests import builders
from tests.audit import audit


def test_the_migrations_lead_to_the_tables_in_the_code(empty_database_url: str) -> None:
    database.upgrade(empty_database_url)
    assert database.compare(empty_database_url) == []


def test_many_may_upgrade_at_once_and_again(empty_database_url: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(database.upgrade, [empty_database_url] * 4))
    database.upgrade(empty_database_url)
    engine = database.connect(empty_database_url)
    database.check(engine)
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
