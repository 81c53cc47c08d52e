"""The command line, as far as it goes without a service and a database."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from regtune import cli

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run ``regtune`` in an empty folder; return exit code, output and errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REGTUNE_URL", "http://127.0.0.1:1")
    monkeypatch.delenv("REGTUNE_DATABASE_URL", raising=False)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["regtune", *arguments])
        try:
            cli.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return run


COMMANDS = (
    *("up", "submit", "watch", "best", "list", "pause", "resume", "stop", "cancel", "delete"),
    *("history", "change", "workers", "service", "worker", "db"),
)


def test_help_names_every_command_and_exit_code(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    for command in COMMANDS:
        assert re.search(rf"^│ {command} ", out, re.MULTILINE), command
    words = " ".join(out.split())
    for meaning in (
        f"{cli.FAILED} refused",
        f"{cli.USAGE} the command",
        f"{cli.UNREACHABLE} the service or the database cannot be reached",
        f"{cli.NOT_FOUND} there is no such study",
        f"{cli.INTERRUPTED} ended by Ctrl-C",
    ):
        assert meaning in words


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(run: Run, command: str) -> None:
    code, out, _ = run(command, "--help")
    assert code == 0
    assert f"Usage: regtune {command}" in out


@pytest.mark.parametrize(
    "arguments", [["list"], ["best", "x"], ["watch", "x"], ["stop", "x"], ["workers", "--json"]]
)
def test_a_service_that_is_not_there_is_said_in_one_line(run: Run, arguments: list[str]) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (3, "")
    assert err.count("\n") == 1
    assert "the service cannot be reached at http://127.0.0.1:1" in err


def test_broken_yaml_is_reported_with_file_and_line(run: Run) -> None:
    Path("study.yaml").write_text("name: digits\ntask: {\nbudget: ]\n")
    code, _, err = run("up", "--study", "study.yaml")
    assert code == 2
    assert re.match(r"regtune: study\.yaml: not valid YAML: .*, line 3, column", err)


def test_every_wrong_field_of_a_study_is_named(run: Run) -> None:
    Path("study.yaml").write_text(
        "name: a/b\ntask: {dataset: digits, model: mlp}\nbudget: {trials: 0}\n"
    )
    code, _, err = run("up", "--study", "study.yaml")
    assert code == 2
    assert "study.yaml: name:" in err
    assert "study.yaml: budget.trials:" in err
    assert not Path(".regtune").exists()


@pytest.mark.parametrize("arguments", [["up", "--study", "none.yaml"], ["submit", "none.yaml"]])
def test_a_file_that_is_not_there_is_a_usage_error(run: Run, arguments: list[str]) -> None:
    code, _, err = run(*arguments)
    assert code == 2
    assert "none.yaml" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["worker", "--gpu", "0", "--device", "cpu"], "name one of"),
        (["worker", "--gpus", "some"], "all, not 'some'"),
        (["worker", "--gpu", "first"], "a number or free, not 'first'"),
        (["worker", "--lanes", "0"], "greater than or equal to 1"),
        (["up", "--workers", "0", "--study", "study.yaml"], "at least one worker"),
        (["change", "x", "--seconds", "inf"], "a number or none, not 'inf'"),
        (["best"], "Missing argument"),
        (["frobnicate"], "No such command"),
    ],
)
def test_wrong_usage_is_2(
    run: Run, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    monkeypatch.setenv("REGTUNE_DATABASE_URL", "postgresql://nobody@127.0.0.1:1/nothing")
    Path("study.yaml").write_text(
        "name: x\ntask: {dataset: digits, model: mlp}\nbudget: {trials: 3}\n"
    )
    code, _, err = run(*arguments)
    assert code == 2
    assert words in " ".join(err.split())


def test_a_wrong_setting_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGTUNE_PORT", "high")
    code, _, err = run("list")
    assert code == 2
    assert "REGTUNE_PORT" in err


@pytest.mark.parametrize("arguments", [["db", "check"], ["db", "upgrade"], ["worker"]])
def test_what_needs_a_database_says_which_setting_names_it(run: Run, arguments: list[str]) -> None:
    code, _, err = run(*arguments)
    assert code == 2
    assert "REGTUNE_DATABASE_URL" in err


@pytest.mark.parametrize(
    ("setting", "address", "arguments"),
    [
        ("REGTUNE_URL", "http://127.0.0.1:port", ["list"]),
        ("REGTUNE_DATABASE_URL", "postgresql://user:password@host:port/database", ["db", "check"]),
    ],
)
def test_an_address_without_a_number_for_its_port_is_said_in_one_line(
    run: Run, monkeypatch: pytest.MonkeyPatch, setting: str, address: str, arguments: list[str]
) -> None:
    monkeypatch.setenv(setting, address)
    code, _, err = run(*arguments)
    assert code == 3
    assert setting in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["db", "check"], ["db", "upgrade"], ["worker", "--check"]])
def test_a_database_that_is_not_there_is_said_in_one_line(
    run: Run, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.setenv("REGTUNE_DATABASE_URL", "postgresql://nobody@127.0.0.1:1/nothing")
    code, _, err = run(*arguments)
    assert code == 3
    assert err.count("\n") == 1
