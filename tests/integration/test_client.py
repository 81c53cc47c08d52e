"""The Python client and the commands that use it, against a real service."""

import _thread
import itertools
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console
from sqlalchemy import Engine, make_url, text

from regtune import cli, database, progress, studies, supervisor, workers
from regtune.client import Client, Refused
from regtune.database import transaction
from regtune.task import installed
from tests import builders
from tests.serving import app, serving

YAML = """
name: digits
task: { dataset: digits, model: mlp }
search: { weight_decay: { low: 1e-4, high: 3, log: true, or_zero: true } }
budget: { trials: 5 }
"""

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def url(database_url: str) -> Iterator[str]:
    with serving(app(database_url, poll_seconds=0.2)) as client:
        yield str(client.base_url)


@pytest.fixture
def api(url: str) -> Iterator[Client]:
    with Client(url) as api:
        yield api


@pytest.fixture
def run(url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run ``regtune``; return exit code, output and errors."""
    monkeypatch.setenv("REGTUNE_URL", url)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["regtune", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
        return code, *capsys.readouterr()

    return run


def train(engine: Engine, study: studies.Study, losses: list[float]) -> None:
    """Append, lease and complete one trial for each loss."""
    builders.append(engine, study, len(losses))
    for loss in losses:
        assert builders.complete(engine, builders.lease(engine, study), loss)


def register(engine: Engine, name: str, host: str) -> None:
    with transaction(engine) as session:
        workers.register(
            session, name=name, host=host, pid=1, device="cpu", lanes=4, offer=installed({})
        )


def find(engine: Engine, name: str) -> studies.Study:
    with transaction(engine) as session:
        return studies.find(session, name)


def test_a_study_is_submitted_as_mapping_as_text_and_as_file_and_is_the_same(
    api: Client, tmp_path: Path
) -> None:
    file = tmp_path / "digits.yaml"
    file.write_text(YAML)
    study, is_new = api.submit(file)
    assert is_new
    assert study["spec"]["search"]["weight_decay"]["low"] == 1e-4
    assert api.submit(YAML)[1] is False
    assert api.submit(study["spec"]) == (api.study("digits"), False)


def test_a_refusal_says_which_fields_are_wrong(api: Client) -> None:
    with pytest.raises(Refused) as refusal:
        api.submit(YAML.replace("5", "0").replace("low: 1e-4", "low: 4"))
    assert refusal.value.status == 422
    assert {error.field for error in refusal.value.errors} == {
        "budget.trials",
        "search.weight_decay",
    }
    assert "low must be below high" in str(refusal.value)


def test_what_is_not_there_is_404(api: Client) -> None:
    for ask in (api.study, api.best, api.delete, lambda name: list(api.trials(name))):
        with pytest.raises(Refused, match="there is no study 'none'") as refusal:
            ask("none")
        assert refusal.value.status == 404
    with pytest.raises(Refused) as refusal:
        next(api.events("none"))
    assert refusal.value.status == 404


def test_lists_are_read_to_their_last_page(api: Client, engine: Engine) -> None:
    for number in range(60):
        builders.create(engine, f"study-{number}")
    study = builders.create(engine, "many", budget={"trials": 150})
    builders.append(engine, study, 150)
    assert len(list(api.studies())) == 61
    assert list(api.studies("paused")) == []
    assert [trial["number"] for trial in api.trials("many")] == list(range(150))
    assert api.trial("many", 149)["state"] == "waiting"


def test_trials_are_ordered_by_value(api: Client, engine: Engine) -> None:
    train(engine, builders.create(engine, "x"), [0.3, 0.1, 0.2])
    assert [trial["number"] for trial in api.trials("x", order_by="value")] == [1, 2, 0]
    assert api.best("x")["number"] == 1
    assert api.best("x")["baseline"]["number"] == 0


def test_a_study_is_paused_resumed_cancelled_and_deleted(api: Client) -> None:
    api.submit(YAML)
    assert api.act("digits", "pause")["state"] == "paused"
    assert api.act("digits", "resume")["state"] == "active"
    with pytest.raises(Refused) as refusal:
        api.delete("digits")
    assert refusal.value.status == 409
    assert api.act("digits", "cancel")["state"] == "cancelled"
    api.delete("digits")
    assert list(api.studies()) == []


def test_waiting_ends_when_the_study_does(api: Client) -> None:
    api.submit(YAML)
    looks = []

    def pause() -> None:
        looks.append(1)
        if len(looks) == 2:
            api.act("digits", "cancel")

    assert api.wait("digits", pause)["state"] == "cancelled"
    assert len(looks) == 2


def test_events_come_as_they_happen_and_end_with_the_study(api: Client, engine: Engine) -> None:
    api.submit(YAML)
    events = api.events("digits")
    first = next(events)
    assert first["kind"] == "study_created"
    train(engine, find(engine, "digits"), [0.5])
    kinds = ["trial_appended", "trial_started", "trial_complete"]
    assert [next(events)["kind"] for _ in kinds] == kinds
    api.act("digits", "cancel")
    rest = [event["kind"] for event in events]
    assert "study_ended" in rest
    after = [event["kind"] for event in api.events("digits", after=first["cursor"])]
    assert after == kinds + rest


def test_events_go_on_where_they_broke_off_when_the_service_comes_back(
    database_url: str, engine: Engine
) -> None:
    study = builders.create(engine, "x")
    service = app(database_url, poll_seconds=0.2)
    with serving(service) as http:
        port = http.base_url.port
        api = Client(str(http.base_url))
        events = api.events("x")
        assert next(events)["kind"] == "study_created"
    train(engine, study, [0.5])  # while nobody is there to tell of it
    rest: list[str] = []
    reader = threading.Thread(target=lambda: rest.extend(event["kind"] for event in events))
    reader.start()
    with serving(app(database_url, poll_seconds=0.2), port=port):
        with Client(f"http://127.0.0.1:{port}") as other:
            other.act("x", "cancel")
        reader.join(30)
    assert rest.count("study_created") == 0
    assert rest.count("trial_complete") == 1
    assert "study_ended" in rest


def test_a_demo_goes_on_with_what_is_live_and_takes_a_fresh_name_else(
    api: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = builders.spec("demo")
    changed = builders.spec("demo", budget={"trials": 6})
    console = Console()
    assert supervisor.submit(api, spec, console)["name"] == "demo"
    assert supervisor.submit(api, spec, console)["name"] == "demo"
    assert capsys.readouterr().out == "study 'demo' goes on where it stopped\n"
    assert supervisor.submit(api, changed, console)["name"] == "demo-2"
    api.act("demo", "cancel")
    assert supervisor.submit(api, spec, console)["name"] == "demo-3"
    assert "a study 'demo' is there already; this one is 'demo-3'" in capsys.readouterr().out


def test_submitting_twice_on_the_command_line_changes_nothing(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "digits.yaml"
    file.write_text(YAML)
    assert run("submit", str(file))[:2] == (
        0,
        "study digits submitted; see `regtune watch digits`\n",
    )
    code, out, _ = run("submit", str(file))
    assert (code, "is there already, active" in out) == (0, True)
    assert json.loads(run("submit", str(file), "--json")[1])["name"] == "digits"


def test_exit_codes_tell_refused_from_not_found(run: Run, tmp_path: Path, api: Client) -> None:
    file = tmp_path / "digits.yaml"
    file.write_text(YAML)
    api.submit(file)
    file.write_text(YAML.replace("5", "6"))
    assert run("submit", str(file))[0] == cli.FAILED
    assert run("delete", "digits")[0] == cli.FAILED
    assert run("best", "digits")[0] == cli.NOT_FOUND
    assert run("pause", "none")[0] == cli.NOT_FOUND


def test_broken_yaml_is_refused_with_its_line(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "digits.yaml"
    file.write_text(YAML + "training: ]\n")
    code, _, err = run("submit", str(file))
    assert code == cli.FAILED
    assert "line 6" in err


def test_the_answer_is_shown_beside_the_reference_points(run: Run, engine: Engine) -> None:
    train(engine, builders.create(engine, "x"), [0.5, 0.4])
    code, out, _ = run("best", "x")
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    assert ["validation", "loss", "0.4", "0.4", "0.5", "-20.0%"] in lines
    assert ["test", "accuracy", *["80.00%"] * 3, "+0.00", "points"] in lines
    assert json.loads(run("best", "x", "--json")[1])["baseline"]["validation_loss"] == 0.5


def test_studies_and_workers_are_listed(run: Run, engine: Engine) -> None:
    assert run("list")[1] == "no studies; `regtune submit FILE` makes one\n"
    assert run("workers")[1] == "no workers; `regtune worker` starts one\n"
    train(engine, builders.create(engine, "x"), [0.5])
    register(engine, "w", "h")
    assert run("list")[1].splitlines()[1].split() == ["x", "active", "1", "(20%)", "0.5"]
    assert run("workers")[1].splitlines()[1].split() == ["w", "yes", "cpu", "4"]
    with transaction(engine) as session:
        workers.beat(session, "w", wanted_lanes=0, study_id=None, occupancy=0.934)
    assert run("workers")[1].splitlines()[1].split() == ["w", "yes", "cpu", "4", "93%"]
    assert [study["name"] for study in json.loads(run("list", "--json")[1])] == ["x"]
    assert json.loads(run("list", "--state", "paused", "--json")[1]) == []
    assert [worker["name"] for worker in json.loads(run("workers", "--json")[1])] == ["w"]


def test_watching_shows_each_change_and_says_by_its_exit_code_how_it_ended(
    run: Run, engine: Engine, api: Client
) -> None:
    study = builders.create(engine, "x")
    train(engine, study, [0.5, 0.4])
    with transaction(engine) as session:
        studies.end(session, study.study_id, "completed", "all done", "test")
    code, out, _ = run("watch", "x")
    assert code == 0
    assert out.startswith("x: 2 of 5 trials done, best validation loss 0.4, completed\n")
    assert "everything off" in out
    builders.create(engine, "y")
    api.act("y", "cancel")
    code, out, _ = run("watch", "y", "--json")
    assert code == cli.FAILED
    assert [json.loads(line)["state"] for line in out.splitlines()] == ["cancelled"]


def test_a_study_is_measured_by_the_limits_that_it_has(run: Run, engine: Engine) -> None:
    builders.create(engine, "x", budget={"seconds": 600})
    _, out, _ = run("change", "x", "--seconds", "900")
    assert out == "study x: 0 trials done, 0% of the budget of 900 s; priority 1\n"
    _, out, _ = run("change", "x", "--trials", "30")
    assert out == "study x: 0 of 30 trials done, 0% of the budget of 900 s; priority 1\n"


def test_plain_lines_come_seldom_and_the_last_one_always(
    api: Client, engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    study = builders.create(engine, "x", budget={"trials": 20})
    looks = itertools.count(1)

    def pause(seconds: float) -> None:
        train(engine, study, [0.5])
        if next(looks) == 10:
            api.act("x", "cancel")

    progress.show(api, "x", Console(), pause)
    assert [line.partition(",")[0] for line in capsys.readouterr().out.splitlines()] == [
        "x: 0 of 20 trials done",
        "x: 10 of 20 trials done",
    ]


def test_what_a_bar_shows_is_no_markup(
    api: Client, engine: Engine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    builders.create(engine, "x", budget={"trials": 20})
    warning = {"warning": "'/data/[a]/t.csv' is no file [/b]"}
    study = Client.study
    monkeypatch.setattr(Client, "study", lambda self, name: study(self, name) | warning)
    console = Console(force_terminal=True, width=200)
    progress.show(api, "x", console, lambda _: api.act("x", "cancel"))
    assert warning["warning"] in capsys.readouterr().out


def test_ctrl_c_leaves_a_watched_study_running(
    run: Run, engine: Engine, api: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    builders.create(engine, "x")
    threading.Timer(0.5, _thread.interrupt_main).start()
    code, _, err = run("watch", "x")
    assert code == cli.INTERRUPTED
    assert "the study goes on" in err
    assert api.study("x")["state"] == "active"


def test_a_worker_is_found_alive_by_its_host(
    run: Run, engine: Engine, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REGTUNE_DATABASE_URL", database_url)
    register(engine, "another", "elsewhere")
    assert run("worker", "--check")[0] == cli.FAILED
    register(engine, "ours", socket.gethostname())
    assert run("worker", "--check")[0] == 0


def test_before_the_first_upgrade_a_check_of_the_workers_says_what_to_do(
    run: Run, empty_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REGTUNE_DATABASE_URL", empty_database_url)
    code, _, err = run("worker", "--check")
    assert code == cli.FAILED
    assert "regtune db upgrade" in err


def test_a_role_that_may_create_nothing_is_told_what_it_needs(
    run: Run, empty_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = database.connect(empty_database_url)
    with engine.begin() as connection:
        connection.execute(text("DROP ROLE IF EXISTS reader"))
        connection.execute(text("CREATE ROLE reader LOGIN PASSWORD 'x'"))
    engine.dispose()
    url = make_url(empty_database_url).set(username="reader", password="x")
    monkeypatch.setenv("REGTUNE_DATABASE_URL", url.render_as_string(hide_password=False))
    code, _, err = run("db", "upgrade")
    assert code == cli.FAILED
    assert "permission denied" in err
    assert "grant it CREATE" in err


def test_a_database_is_checked_and_upgraded(
    run: Run, empty_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REGTUNE_DATABASE_URL", empty_database_url)
    code, _, err = run("db", "check")
    assert code == cli.FAILED
    assert "regtune db upgrade" in err
    assert run("db", "upgrade")[0] == 0
    assert run("db", "upgrade")[0] == 0
    assert run("db", "check")[0] == 0


def test_a_study_is_changed_and_its_history_shown_on_the_command_line(
    run: Run, api: Client
) -> None:
    api.submit(YAML)
    code, out, _ = run("change", "digits", "--trials", "9", "--priority", "3", "--seconds", "60")
    assert (code, out) == (
        0,
        "study digits: 0 of 9 trials done, 0% of the budget of 60 s; priority 3\n",
    )
    assert run("change", "digits", "--seconds", "none")[0] == 0
    study = api.study("digits")
    assert (study["budget_trials"], study["budget_seconds"], study["priority"]) == (9, None, 3)
    assert study["spec"]["budget"] == {"trials": 5, "seconds": None, "trial_epochs": None}
    assert run("change", "digits")[0] == cli.USAGE
    assert run("change", "digits", "--seconds", "soon")[0] == cli.USAGE
    code, _, err = run("change", "digits", "--trials", "0")
    assert code == cli.FAILED
    assert "budget.trials" in err
    code, out, _ = run("history", "digits")
    assert code == 0
    assert [line.split()[-1] for line in out.splitlines()[:2]] == ["detail", "study_created"]
    assert "trials: 5 → 9" in out
    code, out, _ = run("history", "digits", "--json")
    kinds = [entry["kind"] for entry in json.loads(out)]
    assert kinds == ["study_created", "study_changed", "study_changed"]
    assert run("history", "nothing")[0] == cli.NOT_FOUND
