import os
from pathlib import Path

import pytest

from regtune import programs


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(8))
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(("workers", "threads"), [(1, None), (2, "4"), (3, "2"), (16, "1")])
def test_several_workers_share_the_cores_of_their_machine(workers, threads):
    assert programs.environment(workers=workers).get("OMP_NUM_THREADS") == threads


def test_what_a_person_has_set_stays(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    environment = programs.environment(workers=4)
    assert (environment["OMP_NUM_THREADS"], environment["OMP_WAIT_POLICY"]) == ("7", "ACTIVE")


def test_what_the_program_needs_goes_before_all_else(monkeypatch):
    monkeypatch.setenv("REGTUNE_PORT", "1")
    assert programs.environment(REGTUNE_PORT="2")["REGTUNE_PORT"] == "2"


@pytest.mark.parametrize("name", ["worker.py", "worker/__init__.py"])
def test_what_would_hide_a_part_of_regtune_is_named(monkeypatch, tmp_path, name):
    hiding = tmp_path / name
    hiding.parent.mkdir(exist_ok=True)
    hiding.touch()
    ours = str(Path(programs.__file__).parent.parent)
    monkeypatch.chdir("/")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([ours, str(tmp_path)]))
    assert programs.command("worker", "--lanes", "2")[-2:] == ["--lanes", "2"]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", str(tmp_path), ours]))
    with pytest.raises(programs.Hidden, match=str(tmp_path / "worker")):
        programs.command("worker")
    with pytest.raises(programs.Hidden):
        programs.command("worker.inspection")
    assert programs.command("service")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", ours]))
    with pytest.raises(programs.Hidden):
        programs.command("worker")


@pytest.mark.parametrize(
    ("limit", "cores", "threads"),
    [
        ("200000 100000", 2, "2"),
        ("150000 100000", 2, "2"),
        ("10000 100000", 1, "1"),
        ("1600000 100000", 8, None),
        ("max 100000", 8, None),
        (None, 8, None),
    ],
)
def test_a_container_that_may_use_less_than_all_cores_gets_fewer_threads(
    tmp_path, monkeypatch, limit, cores, threads
):
    file = tmp_path / "cpu.max"
    if limit is not None:
        file.write_text(limit + "\n")
    monkeypatch.setattr(programs, "_CPU_LIMIT", file)
    assert programs.cores() == cores
    assert programs.environment().get("OMP_NUM_THREADS") == threads
    assert programs.environment(workers=4)["OMP_NUM_THREADS"] == str(max(1, cores // 4))
