"""``docker-compose.yml`` without Docker: every service's command, as a process on this machine.

PostgreSQL is the tests' own; hosts and ports are put in its and this machine's terms. What else the
file says (conditions, health checks, reservations) is checked as it is written.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from sqlalchemy import create_engine

from regtune.client import Client
from tests.audit import audit
from tests.waiting import free_port, wait_until

BIN = str(Path(sys.executable).parent)
SECONDS = 120
STUDY = {
    "name": "composed",
    "task": {"dataset": "digits", "model": "mlp", "hidden": [16]},
    "training": {"max_epochs": 20},
    "pruner": "none",
    "budget": {"trials": 24},
}


@pytest.fixture(scope="module")
def compose(project: Path) -> dict[str, Any]:
    """The file, its variables at their defaults."""
    text = (project / "docker-compose.yml").read_text()
    loaded: dict[str, Any] = yaml.safe_load(re.sub(r"\$\{\w+:-([\w.]+)\}", r"\1", text))
    return loaded


class Machine:
    """Runs what the file describes, with a database and a port of this machine."""

    def __init__(self, compose: dict[str, Any], database_url: str, folder: Path) -> None:
        self._services = compose["services"]
        self._database_url = database_url
        self._folder = folder
        self.url = f"http://127.0.0.1:{free_port()}"

    @contextmanager
    def running(self, service: str) -> Iterator[subprocess.Popen[bytes]]:
        process = subprocess.Popen(
            self._local(self._services[service]["command"]),
            env=self._environment(service),
            cwd=self._folder,
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def is_healthy(self, service: str) -> bool:
        """Run the service's health check."""
        kind, *command = self._services[service]["healthcheck"]["test"]
        assert kind == "CMD"
        ended = subprocess.run(
            self._local(command),
            env=self._environment(service),
            cwd=self._folder,
            check=False,
            capture_output=True,
        )
        return ended.returncode == 0

    def _local(self, command: list[str]) -> list[str]:
        program = {"python": sys.executable, "regtune": shutil.which("regtune", path=BIN)}
        port = self.url.rpartition(":")[2]
        first, *rest = command
        return [program[first] or first, *(part.replace(":8700", f":{port}") for part in rest)]

    def _environment(self, service: str) -> dict[str, str]:
        given: Mapping[str, str] = self._services[service]["environment"]
        of_this_machine = {
            "REGTUNE_DATABASE_URL": self._database_url,
            "REGTUNE_DATA_DIR": str(self._folder / "data"),
            "REGTUNE_HOME": str(self._folder / "claims"),
            "REGTUNE_HOST": "127.0.0.1",
        }
        return {
            **os.environ,
            **{name: of_this_machine.get(name, value) for name, value in given.items()},
            "REGTUNE_PORT": self.url.rpartition(":")[2],
            "REGTUNE_LANES": "4",
            "OMP_NUM_THREADS": "1",
        }


@pytest.mark.slow
def test_migrate_service_and_two_workers_train_a_whole_study(
    compose: dict[str, Any], empty_database_url: str, tmp_path: Path
) -> None:
    machine = Machine(compose, empty_database_url, tmp_path)
    with machine.running("migrate") as migrate:
        assert migrate.wait(SECONDS) == 0
    with ExitStack() as stack:
        service = stack.enter_context(machine.running("service"))
        workers = [stack.enter_context(machine.running("worker")) for _ in range(2)]
        api = stack.enter_context(Client(machine.url))
        wait_until(api.ready, SECONDS)
        wait_until(lambda: sum(worker["alive"] for worker in api.workers()) == 2, SECONDS)
        assert machine.is_healthy("service")
        assert machine.is_healthy("worker")
        api.submit(STUDY)
        wait_until(lambda: api.study("composed")["state"] != "active", SECONDS)
        assert api.study("composed")["counts"]["complete"] == 24
        assert {trial["worker"] for trial in api.trials("composed")} == {
            worker["name"] for worker in api.workers()
        }
        for process in (*workers, service):
            process.terminate()
        assert [process.wait(SECONDS) for process in (*workers, service)] == [0, 0, 0]
        assert not machine.is_healthy("service")
        assert not machine.is_healthy("worker")
    engine = create_engine(empty_database_url)
    assert audit(engine) == {}
    engine.dispose()


def test_nothing_starts_before_what_it_needs(compose: dict[str, Any]) -> None:
    needs = {name: service.get("depends_on", {}) for name, service in compose["services"].items()}
    migrated = {"migrate": {"condition": "service_completed_successfully"}}
    assert needs == {
        "postgres": {},
        "migrate": {"postgres": {"condition": "service_healthy"}},
        "service": migrated,
        "worker": migrated,
    }


def test_workers_may_be_many_and_have_time_to_release_their_trials(
    compose: dict[str, Any],
) -> None:
    worker = compose["services"]["worker"]
    assert "container_name" not in worker
    assert "hostname" not in worker
    assert "ports" not in worker
    assert "--name" not in worker["command"]
    (device,) = worker["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert worker["stop_grace_period"] == "60s"


@pytest.mark.parametrize("name", ["service", "worker"])
def test_an_image_runs_what_the_file_runs_and_not_as_root(
    project: Path, compose: dict[str, Any], name: str
) -> None:
    text = (project / "deploy" / f"{name}.Dockerfile").read_text().replace("\\\n", " ")
    last = dict(re.findall(r"^([A-Z]+) (.*)$", text, re.MULTILINE))
    service = compose["services"][name]
    assert last["USER"] == "regtune"
    assert json.loads(last["CMD"]) == service["command"]
    options, _, check = last["HEALTHCHECK"].partition("CMD ")
    assert ["CMD", *json.loads(check)] == service["healthcheck"]["test"]
    assert f"--timeout={service['healthcheck']['timeout']}" in options
    assert f"COPY requirements/{name}.txt" in text
    assert "--require-hashes" in text
