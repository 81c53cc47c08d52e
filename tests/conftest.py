"""A real PostgreSQL for the whole run, and a fresh database for each test that asks for one."""

import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from sqlalchemy import Engine, create_engine, make_url, text

from regtune import database
from regtune.embedded import EmbeddedServer
from tests.object_store import BUCKET, ObjectStore, object_store

_numbers = itertools.count()

# As for a worker's process, before torch is imported: threads that wait must not spin.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# These machines are shared: how long an example takes says nothing about the code.
hypothesis.settings.register_profile("shared", deadline=None)
hypothesis.settings.load_profile("shared")


@pytest.fixture(scope="session")
def server_url() -> Iterator[str]:
    """A PostgreSQL server of this test process alone."""
    # Not under pytest's own folder: that is closed to the server's user by every run that starts.
    folder = Path(tempfile.mkdtemp(prefix="regtune-tests-"))
    server = EmbeddedServer(folder)
    try:
        url = server.start()
        # A test's database need not outlive a power cut.
        for setting in ("fsync", "synchronous_commit", "full_page_writes"):
            _administer(url, f"ALTER SYSTEM SET {setting} = off")
        _administer(url, "SELECT pg_reload_conf()")
        yield url
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def template(server_url: str) -> str:
    """The name of a database that holds both schemas and no rows."""
    _administer(server_url, "CREATE DATABASE template_of_tests")
    database.upgrade(_with_database(server_url, "template_of_tests"))
    return "template_of_tests"


@pytest.fixture
def database_url(server_url: str, template: str) -> Iterator[str]:
    """The address of a fresh database with both schemas."""
    name = f"test_{next(_numbers)}"
    _administer(server_url, f"CREATE DATABASE {name} TEMPLATE {template}")
    yield _with_database(server_url, name)
    _administer(server_url, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def empty_database_url(server_url: str) -> Iterator[str]:
    """The address of a fresh database with nothing in it."""
    name = f"test_{next(_numbers)}"
    _administer(server_url, f"CREATE DATABASE {name}")
    yield _with_database(server_url, name)
    _administer(server_url, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    """An engine on a fresh database."""
    engine = database.connect(database_url, pool_size=20)
    yield engine
    engine.dispose()


@pytest.fixture(scope="session")
def s3() -> Iterator[ObjectStore]:
    """An object store of this test process alone."""
    with object_store() as store:
        yield store


@pytest.fixture
def folder_in_s3(s3: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a folder in an object store with nothing in it; this process knows how."""
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{next(_numbers)}"


@pytest.fixture(scope="session")
def project() -> Path:
    """The root of the project."""
    return Path(__file__).resolve().parent.parent


def _with_database(url: str, name: str) -> str:
    return make_url(url).set(database=name).render_as_string(hide_password=False)


def _administer(url: str, statement: str) -> None:
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(statement))
    engine.dispose()
