"""A package outside the project, as a person would make it: installed, checked, trained."""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from sqlalchemy import Engine

from tests.audit import audit
from tests.serving import service_process
from tests.system.test_up import new_folder
from tests.waiting import free_port, wait_until
from tests.working import worker_process

MODULES = os.pathsep.join(sys.path)


@pytest.fixture(scope="module")
def site(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the example is installed, and nothing else."""
    folder = tmp_path_factory.mktemp("site")
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"),
            *("--no-build-isolation", "--target", str(folder), str(project / "examples/own_task")),
        ],
        check=True,
    )
    return folder


def regtune(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "regtune.cli", *arguments],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(site), MODULES]),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_an_installed_task_is_listed_shown_and_checked(site: Path) -> None:
    listed = json.loads(regtune(site, "task", "list", "--json").stdout)
    assert {
        "name": "waves",
        "kind": "task",
        "defined_in": "waves:Waves",
        "package": "waves 1.0.0",
    } in listed
    shown = json.loads(regtune(site, "task", "show", "waves", "--json").stdout)
    assert [setting["name"] for setting in shown["settings"]] == ["recordings", "noise", "width"]
    assert (shown["own_loss"], shown["own_score"]) == (True, True)
    checked = regtune(site, "task", "check", "waves", "--set", "recordings=100", "--device", "cpu")
    assert checked.returncode == 0, checked.stderr + checked.stdout
    assert "as one batched model (vmap)" in checked.stdout
    assert "nothing is wrong with it" in checked.stdout
    wrong = regtune(site, "task", "check", "waves", "--set", "width=wide", "--device", "cpu")
    assert wrong.returncode == 1
    assert "task.width" in wrong.stdout
    assert regtune(site, "task", "check", "tides").returncode == 4


@pytest.mark.slow
def test_the_page_on_tasks_leads_to_a_trained_one(project: Path) -> None:
    """Its first blocks of code, saved and run as they stand there, in an empty folder."""
    page = (project / "docs/tasks.md").read_text().partition("### Ten lines")[2]
    block = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)
    found = [match.groups() for match in itertools.islice(block.finditer(page), 3)]
    assert [language for language, _ in found] == ["python", "yaml", "sh"]
    (_, module), (_, study), (_, commands) = found
    with new_folder() as folder:
        (folder / "moons.py").write_text(module)
        (folder / "moons.yaml").write_text(study)
        program = folder / "bin" / "regtune"
        program.parent.mkdir()
        program.write_text(
            f'#!/bin/sh\nPYTHONPATH="$PYTHONPATH:{MODULES}" '
            f'exec {sys.executable} -m regtune.cli "$@"\n'
        )
        program.chmod(0o755)
        run = subprocess.run(
            ["bash", "-ec", commands],
            cwd=folder,
            env={
                **os.environ,
                "PATH": f"{program.parent}:{os.environ['PATH']}",
                "OMP_NUM_THREADS": "1",
                "REGTUNE_PORT": str(free_port()),
                "REGTUNE_DATA_DIR": str(folder / "data"),
            },
            capture_output=True,
            text=True,
            check=False,
        )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "nothing is wrong with it" in run.stdout
    assert "study moons completed (all 20 trials have ended)" in run.stdout


@pytest.mark.slow
def test_a_study_of_an_installed_task_is_trained_to_its_end(
    site: Path, project: Path, engine: Engine, database_url: str, tmp_path: Path
) -> None:
    study: dict[str, Any] = yaml.safe_load((project / "examples/own_task/study.yaml").read_text())
    study |= {"training": {"max_epochs": 12, "batch_size": 32}, "budget": {"trials": 4}}
    study["pruner"] = "none"  # by default one of four may be pruned, depending on who is ahead
    with (
        service_process(database_url) as (_, client),
        worker_process(
            database_url,
            "w",
            PYTHONPATH=os.pathsep.join([str(site), MODULES]),
            REGTUNE_DATA_DIR=str(tmp_path),
        ),
    ):
        wait_until(lambda: client.get("/v1/workers").json()["items"], 60)
        assert client.post("/v1/studies", json=study).status_code == 201

        def shown() -> Any:
            return client.get("/v1/studies/waves").json()

        wait_until(lambda: shown()["state"] != "active", 180)
        assert (shown()["state"], shown()["counts"]["complete"]) == ("completed", 4), shown()
        assert shown()["model"]["score"] == "own"
        best = client.get("/v1/studies/waves/best").json()
    assert best["test_loss"] < 1.2  # whoever always says the mean frequencies has 1.9
    assert best["test_score"] > 0.1
    assert audit(engine) == {}
