import signal
import socket
import subprocess

import httpx
import pytest
from sqlalchemy import Engine, text

from regtune import workers
from regtune.database import transaction
from regtune.task import Offer
from tests import builders
from tests.serving import service_process, start_service
from tests.waiting import free_port, wait_until


def died(process: subprocess.Popen[str]) -> tuple[int, str]:
    """How a service ended that could not start: its exit code and its last word."""
    try:
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, said


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_the_service_ends_well_when_told_to_though_streams_are_open(
    database_url: str, engine: Engine, signum: signal.Signals
) -> None:
    builders.create(engine)
    with (
        service_process(database_url) as (process, client),
        client.stream("GET", "/v1/studies/study/events") as response,
    ):
        lines = response.iter_lines()
        next(lines)
        process.send_signal(signum)
        _, said = process.communicate(timeout=30)
        assert process.returncode == 0
        assert "Traceback" not in said
        with pytest.raises(httpx.ConnectError):
            client.get("/healthz")
    assert connections(engine) == 0


def connections(engine: Engine) -> int:
    """How many connections of the service are left, on a short wait for the server to notice."""

    def count() -> int:
        with engine.connect() as connection:
            found: int = connection.execute(
                text(
                    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
                    " AND application_name LIKE 'regtune%' AND pid <> pg_backend_pid()"
                )
            ).scalar_one()
            return found

    wait_until(lambda: count() == 0)
    return count()


def test_the_scheduler_runs_inside_the_service(database_url: str, engine: Engine) -> None:
    study = builders.create(engine)
    offer = Offer(frozenset({"digits"}), frozenset({"mlp"}))
    with service_process(database_url):
        with transaction(engine) as session:
            workers.register(session, name="w", host="h", pid=1, device="cpu", lanes=2, offer=offer)
        wait_until(lambda: builders.states(engine, study) == ["waiting", "waiting"])


def test_a_busy_port_ends_the_service_with_one_line(database_url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        code, said = died(start_service(database_url, port))
    assert code == 1
    assert said.strip() == (
        f"regtune service: cannot listen on 127.0.0.1:{port}: Address already in use"
    )


def test_a_database_that_cannot_be_reached_ends_the_service_with_one_line() -> None:
    url = f"postgresql://nobody@127.0.0.1:{free_port()}/nothing"
    code, said = died(start_service(url, free_port()))
    assert code == 3
    assert said.startswith("regtune service: the database cannot be reached")
    assert len(said.splitlines()) == 1


def test_a_schema_that_is_not_there_ends_the_service_with_one_line(
    empty_database_url: str,
) -> None:
    code, said = died(start_service(empty_database_url, free_port()))
    assert code == 1
    assert "run `regtune db upgrade`" in said
    assert len(said.splitlines()) == 1


def test_an_answer_does_not_wait_for_its_head_to_be_acknowledged(database_url: str) -> None:
    # Forty milliseconds each on Linux, if it did.
    with service_process(database_url) as (_, client):
        taken = [client.get("/healthz").elapsed.total_seconds() for _ in range(20)]
    assert min(taken) < 0.03
