"""The command line: ``regtune …``."""

import json
import math
import signal
import sys
from datetime import datetime
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from regtune import answer, database, gpus, programs, progress, supervisor
from regtune.client import Client, Refused, ServiceUnreachable, Verb
from regtune.errors import DatabaseUnavailable, FieldError, InvalidSpec, RegtuneError
from regtune.settings import Settings
from regtune.spec import StudySpec, parse_text
from regtune.task import DATASETS, MODELS, TASKS, points

FAILED = 1
USAGE = 2
UNREACHABLE = 3
NOT_FOUND = 4
INTERRUPTED = 128 + signal.SIGINT

_HELP = """
Finds how strongly to regularize a neural network: weight decay, dropout, L1 and patience.

Try it on this machine, with a database of its own:

    regtune up --study examples/digits.yaml

Or against a service that runs already (`REGTUNE_URL` says where):

    regtune submit study.yaml --watch
    regtune best my-study

More workers make it faster; on any machine that reaches the database:

    REGTUNE_DATABASE_URL=postgresql://… regtune worker --gpus all
"""

_EXIT_CODES = """
**Exit codes**: 0 all went well · 1 refused, or something failed · 2 the command, a setting or a
study's file is wrong · 3 the service or the database cannot be reached · 4 there is no such study
or task, or no best trial yet · 130 ended by Ctrl-C.
"""

app = typer.Typer(
    help=_HELP,
    epilog=_EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
tasks = typer.Typer(
    no_args_is_help=True, help="List tasks, data sets and models; show or check one of them."
)
app.add_typer(tasks, name="task")
db = typer.Typer(no_args_is_help=True, help="Migrate the database, or check it.")
app.add_typer(db, name="db")

_PIPE_WIDTH = 200
_out = Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH)
_err = Console(stderr=True)

Name = Annotated[str, typer.Argument(metavar="NAME", help="The study's name.")]
AsJson = Annotated[bool, typer.Option("--json", help="Write JSON, for scripts.")]


def main() -> None:
    """Run the command line; what is expected to go wrong ends in a few words and an exit code."""
    try:
        app()
    except RegtuneError as error:
        _err.out(f"regtune: {error}", style="red")
        sys.exit(_exit_code(error))


def _exit_code(error: RegtuneError) -> int:
    match error:
        case InvalidSpec() | InvalidSettings():
            return USAGE
        case ServiceUnreachable() | DatabaseUnavailable():
            return UNREACHABLE
        case Refused(status=404):
            return NOT_FOUND
        case _:
            return FAILED


@app.command()
def up(
    study: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Train this study, print its answer and end."),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(
            "--workers",
            metavar="N",
            min=0,
            help="How many. Default: one for each GPU; one on a machine without.",
        ),
    ] = None,
) -> None:
    """Run database, service and workers on this machine.

    Until Ctrl-C, or with `--study` until its study is over. Everything is kept in `.regtune/`
    (`REGTUNE_HOME`); the next `regtune up` goes on where this one stopped.

        regtune up --study examples/digits.yaml
        REGTUNE_PORT=8800 regtune up --workers 2
    """
    spec = None if study is None else _parsed(study)
    if spec is not None and count == 0:
        raise typer.BadParameter("a study needs at least one worker", param_hint="--workers")
    raise typer.Exit(supervisor.up(_settings(), spec=spec, workers=count, console=_out))


@app.command()
def submit(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="The study, as YAML or JSON; - for stdin.")
    ],
    watch: Annotated[bool, typer.Option("--watch", help="Then show it until it is over.")] = False,
    as_json: AsJson = False,
) -> None:
    """Submit a study.

    Submitting the same study again changes nothing.

        regtune submit study.yaml --watch
        regtune submit study.yaml --json | jq .state
    """
    with _client() as api:
        study, is_new = api.submit(_text(file))
        if watch:
            _watch(api, study["name"], as_json)
        elif as_json:
            _write_json(study)
        else:
            what = "submitted" if is_new else f"is there already, {study['state']}"
            _out.out(f"study {study['name']} {what}; see `regtune watch {study['name']}`")


@app.command()
def watch(name: Name, as_json: AsJson = False) -> None:
    """Show how a study goes until it is over, then its answer.

    With `--json`: the study, as the API gives it, one line each time it has changed. Ctrl-C ends
    the watching and leaves the study running. Exit code 1 if the study fails or is cancelled.
    """
    with _client() as api:
        _watch(api, name, as_json)


@app.command()
def best(name: Name, as_json: AsJson = False) -> None:
    """Show the best trial of a study beside the one without regularization.

    regtune best my-study --json | jq .params.weight_decay
    """
    with _client() as api:
        if as_json:
            _write_json(api.best(name))
        else:
            answer.show(api.best(name), _out)


@app.command("list")
def list_(
    state: Annotated[str | None, typer.Option(help="Only these, for example active.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the studies, newest first."""
    with _client() as api:
        studies = list(api.studies(state))
    if as_json:
        _write_json(studies)
        return
    table = Table("study", "state", "trials", "best loss", box=None, pad_edge=False)
    for study in studies:
        trials = f"{progress.ended(study)} ({study['progress']:.0%})"
        loss = study["best_validation_loss"]
        best = "–" if loss is None else f"{loss:.4g}"
        table.add_row(study["name"], study["state"], trials, best)
    _show(table, "no studies; `regtune submit FILE` makes one")


@app.command()
def pause(name: Name) -> None:
    """Start no more trials of a study and keep its budget; running ones finish."""
    _act(name, "pause")


@app.command()
def resume(name: Name) -> None:
    """Let a paused study go on."""
    _act(name, "resume")


@app.command()
def stop(name: Name) -> None:
    """End a study after its running trials."""
    _act(name, "stop")


@app.command()
def cancel(name: Name) -> None:
    """End a study and its running trials now."""
    _act(name, "cancel")


@app.command()
def change(
    name: Name,
    trials: Annotated[int | None, typer.Option(help="How many trials.")] = None,
    seconds: Annotated[
        str | None, typer.Option(metavar="SECONDS|none", help="Wall-clock from the first lease.")
    ] = None,
    trial_epochs: Annotated[
        str | None, typer.Option(metavar="EPOCHS|none", help="Epochs of all trials together.")
    ] = None,
    priority: Annotated[int | None, typer.Option(help="Weight among the studies.")] = None,
) -> None:
    """Change budget and priority of a live study; what is not named stays.

    regtune change my-study --trials 80 --priority 3
    """
    budget: dict[str, Any] = {} if trials is None else {"trials": trials}
    if seconds is not None:
        budget["seconds"] = _limit(seconds, float, "--seconds")
    if trial_epochs is not None:
        budget["trial_epochs"] = _limit(trial_epochs, int, "--trial-epochs")
    changes = ({"budget": budget} if budget else {}) | (
        {} if priority is None else {"priority": priority}
    )
    if not changes:
        raise typer.BadParameter("name what to change: --trials, --seconds, …")
    with _client() as api:
        study = api.change(name, changes)
    _out.out(f"study {name}: {progress.budget_in_words(study)}; priority {study['priority']}")


@app.command()
def delete(name: Name) -> None:
    """Delete a study that is over, with all its trials; its history stays."""
    with _client() as api:
        api.delete(name)
    _out.out(f"study {name} is deleted")


@app.command()
def history(
    name: Name,
    trials: Annotated[
        bool, typer.Option("--trials", help="Also what happened to single trials.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show who did what to a study, oldest first; also of one that was deleted."""
    with _client() as api:
        entries = list(api.history(name, trials))
    if as_json:
        _write_json(entries)
        return
    table = Table("when", "who", "what", "trial", "detail", box=None, pad_edge=False)
    for entry in entries:
        number = "" if entry["number"] is None else str(entry["number"])
        when = datetime.fromisoformat(entry["at"]).astimezone().strftime("%Y-%m-%d %H:%M:%S")
        table.add_row(
            when, escape(entry["actor"]), entry["kind"], number, escape(_in_words(entry["detail"]))
        )
    _out.print(table)


@app.command()
def workers(as_json: AsJson = False) -> None:
    """List the workers, living ones first."""
    with _client() as api:
        known = list(api.workers())
    if as_json:
        _write_json(known)
        return
    columns = ("worker", "alive", "device", "lanes", "occupancy", "data", "study")
    table = Table(*columns, box=None, pad_edge=False)
    for worker in known:
        alive = "yes" if worker["alive"] else "no"
        lanes = str(worker["lanes"])
        full = "" if worker["occupancy"] is None else f"{worker['occupancy']:.0%}"
        data = (worker["capacity"] or {}).get("data") or ""
        study = worker["study"] or ""
        name, device = escape(worker["name"]), escape(worker["device"])
        table.add_row(name, alive, device, lanes, full, data, study)
    _show(table, "no workers; `regtune worker` starts one")


@app.command()
def service() -> None:
    """Run the service: REST, dashboard and scheduler.

    Any number of replicas may share a database. `REGTUNE_DATABASE_URL` says which database,
    `REGTUNE_HOST` and `REGTUNE_PORT` where to listen.
    """
    _settings()
    programs.become("service")


@app.command()
def worker(
    gpu: Annotated[
        str | None,
        typer.Option(metavar="N|free", help="One GPU; free: the one that the fewest workers use."),
    ] = None,
    every_gpu: Annotated[
        str | None, typer.Option("--gpus", metavar="all", help="One process for each GPU.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Any device of PyTorch, for example cpu.")
    ] = None,
    lanes: Annotated[
        int | None, typer.Option(min=1, help="How many trials to train at once.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="A unique name. Default: host and process id.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Only say whether a worker of this host is alive.")
    ] = False,
) -> None:
    """Run a worker: it trains what waits in the database that `REGTUNE_DATABASE_URL` names.

    By default on the first GPU, or on the CPU of a machine without. SIGTERM and Ctrl-C release
    the trials in training, for others to go on with; a second one kills.

        regtune worker --gpu 0
        regtune worker --gpus all
        regtune worker --device cpu --lanes 8
    """
    if sum(option is not None for option in (gpu, every_gpu, device)) > 1:
        raise typer.BadParameter("name one of --gpu, --gpus and --device")
    settings = _settings()
    url = _database_url(settings)
    if check:
        _check_worker(url, settings)
    elif every_gpu is not None and (devices := _devices(every_gpu)):
        workers = [
            _options(device=device, lanes=lanes, name=name and f"{name}-{number}")
            for number, device in enumerate(devices)
        ]
        raise typer.Exit(programs.run_workers(workers))
    else:
        chosen = device or (None if gpu is None else _device(gpu, settings.home))
        programs.become("worker", *_options(device=chosen, lanes=lanes, name=name))


Subject = Annotated[
    str,
    typer.Argument(metavar="NAME|FILE", help="A task, data set or model; or the file of a study."),
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SETTING=VALUE", help="A setting of it; may be given again."),
]
ForData = Annotated[
    str | None,
    typer.Option("--data", metavar="NAME", help="What a model is built for. Default: digits."),
]
WithModel = Annotated[
    str | None,
    typer.Option("--model", metavar="NAME", help="What learns a data set. Default: mlp."),
]


@tasks.command("list")
def list_tasks(as_json: AsJson = False) -> None:
    """List what is installed here, or named by `REGTUNE_TASKS`; nothing is imported."""
    own = _settings().tasks
    found = [
        {"name": point.name, "kind": kind, "defined_in": point.value, "package": _package(point)}
        for kind, group in (("task", TASKS), ("data set", DATASETS), ("model", MODELS))
        for point in sorted(points(group, own).values(), key=lambda point: point.name)
    ]
    if as_json:
        _write_json(found)
        return
    table = Table("name", "kind", "defined in", "package", box=None, pad_edge=False)
    for entry in found:
        table.add_row(*(escape(part or "") for part in entry.values()))
    _out.print(table)


@tasks.command("show")
def show_task(
    name: Subject,
    sets: Sets = None,
    data: ForData = None,
    model: WithModel = None,
    as_json: AsJson = False,
) -> None:
    """Show what a task, data set or model is: settings, rows, parameters, dropout sites.

    Its data is loaded, and downloaded where that is needed, and its model built.

        regtune task show mlp --set hidden=[64,64] --data wine
    """
    _inspect("show", name, sets, data, model, as_json)


@tasks.command("check")
def check_task(
    name: Subject,
    sets: Sets = None,
    data: ForData = None,
    model: WithModel = None,
    device: Annotated[
        str, typer.Option(help="Any device of PyTorch; by default the first GPU, or the CPU.")
    ] = "auto",
    as_json: AsJson = False,
) -> None:
    """Train a task for two epochs, and say how that goes and what is wrong.

    Exit code 1 if something is wrong. A task's own code is run, in a process of its own.

        regtune task check my_task --set width=64
        regtune task check study.yaml
    """
    _inspect("check", name, sets, data, model, as_json, device=device)


@db.command()
def upgrade() -> None:
    """Bring the schema up to date; safe to run twice, and from several places at once.

    Before an upgrade to a newer version, stop the service and all workers.
    """
    settings = _settings()
    database.upgrade(settings.direct_database_url or _database_url(settings))
    _out.out("the database's schema is up to date")


@db.command("check")
def check_() -> None:
    """Say whether the database is there, and its schema the one that this version knows."""
    settings = _settings()
    engine = database.connect(_database_url(settings), proxied=settings.proxied)
    try:
        database.check(engine)
    finally:
        engine.dispose()
    _out.out("the database's schema is as it should be")


class InvalidSettings(RegtuneError):
    """A REGTUNE_* environment variable is not what it should be."""


def _settings() -> Settings:
    try:
        return Settings()
    except ValidationError as error:
        wrong = (f"REGTUNE_{str(e['loc'][0]).upper()}: {e['msg']}" for e in error.errors())
        raise InvalidSettings("; ".join(wrong)) from None


def _database_url(settings: Settings) -> str:
    if not settings.database_url:
        raise InvalidSettings("set REGTUNE_DATABASE_URL to the database of the service")
    return database.address(settings.database_url)


def _client() -> Client:
    return Client(_settings().url)


def _parsed(file: Path) -> StudySpec:
    try:
        return parse_text(_text(file))
    except InvalidSpec as error:
        raise InvalidSpec(
            tuple(FieldError(f"{file}: {e.field}".rstrip(": "), e.message) for e in error.errors)
        ) from None


def _text(file: Path) -> str:
    try:
        return sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{file} cannot be read: {error}", param_hint="FILE") from None


def _act(name: str, verb: Verb) -> None:
    with _client() as api:
        study = api.act(name, verb)
    _out.out(f"study {name} is {study['state']}")


def _in_words(detail: dict[str, Any]) -> str:
    """Return what an event says beside its kind; a change is written as from → to."""
    words = (
        f"{value['from']} → {value['to']}" if isinstance(value, dict) else str(value)
        for value in detail.values()
    )
    return ", ".join(f"{name}: {word}" for name, word in zip(detail, words, strict=True))


def _limit(text: str, number: type[int] | type[float], option: str) -> float | None:
    if text == "none":
        return None
    try:
        value = number(text)
        if math.isfinite(value):
            return value
    except (ValueError, OverflowError):  # the latter for more digits than a float has
        pass
    raise typer.BadParameter(f"a number or none, not {text!r}", param_hint=option)


def _watch(api: Client, name: str, as_json: bool) -> None:
    """Show a study until it is over, then its answer; exit with 1 unless that is good."""
    try:
        study = (
            progress.show_json(api, name, typer.echo) if as_json else progress.show(api, name, _out)
        )
    except KeyboardInterrupt:
        _err.out(f"\nthe study goes on; see `regtune watch {name}`")
        raise typer.Exit(INTERRUPTED) from None
    if not as_json and study["best"]:
        answer.show(api.best(name), _out)
    raise typer.Exit(FAILED if study["state"] in ("failed", "cancelled") else 0)


def _devices(every_gpu: str) -> list[str]:
    if every_gpu != "all":
        raise typer.BadParameter(f"all, not {every_gpu!r}; one alone: --gpu N", param_hint="--gpus")
    return [f"cuda:{number}" for number in range(gpus.count())]


def _device(gpu: str, home: Path) -> str:
    if gpu == "free":
        claimed = gpus.claim(home)
        return "cpu" if claimed is None else f"cuda:{claimed}"
    if not gpu.isdecimal():
        raise typer.BadParameter(f"a number or free, not {gpu!r}", param_hint="--gpu")
    return f"cuda:{gpu}"


def _inspect(
    verb: str,
    name: str,
    sets: list[str] | None,
    data: str | None,
    model: str | None,
    as_json: bool,
    **options: str,
) -> None:
    """Become the worker's program that imports what is looked at: here is no torch."""
    _settings()
    given = [part for setting in sets or () for part in ("--set", setting)]
    given += _options(data=data, model=model, **options)
    programs.become("worker.inspection", verb, name, *given, *(["--json"] if as_json else []))


def _package(point: EntryPoint) -> str | None:
    return f"{point.dist.name} {point.dist.version}" if point.dist else None


def _options(**options: Any) -> list[str]:
    return [part for name, value in options.items() if value for part in (f"--{name}", str(value))]


def _check_worker(url: str, settings: Settings) -> None:
    if not programs.has_living_worker(url, settings.lease_seconds, proxied=settings.proxied):
        raise RegtuneError("no worker of this host is alive")
    _out.out("a worker of this host is alive")


def _show(table: Table, if_empty: str) -> None:
    if table.row_count:
        _out.print(table)
    else:
        _out.out(if_empty)


def _write_json(document: Any) -> None:
    typer.echo(json.dumps(document))


if __name__ == "__main__":
    main()
