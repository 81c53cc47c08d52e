"""What was found of a task, for people to read."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from worker.inspection.checking import Form, Verdict
from worker.inspection.showing import Description, Network, Rows, Setting


def show_description(known: Description, console: Console) -> None:
    """Write what a task, data set or model is."""
    table = _table()
    _row(table, known.kind, known.name)
    _row(table, "defined in", known.defined_in)
    _row(table, "summary", known.summary)
    if known.data:
        _add_rows(table, known.data)
    if known.model:
        _add_network(table, known.model, known.built_for)
    if known.data or known.model:
        measured = [
            part for part, own in (("loss", known.own_loss), ("score", known.own_score)) if own
        ]
        _row(table, "of its own", " and ".join(measured))
    if known.best_decay is not None:
        _row(table, "best decay", f"{known.best_decay:.4g}, coupled, of the model linear")
    console.print(table)
    if known.settings is not None:
        console.print(_settings(known.settings) if known.settings else "it has no settings")


def show_verdict(verdict: Verdict, console: Console) -> None:
    """Write what a check has found, the problems last."""
    table = _table()
    _row(table, "checked", verdict.name)
    _row(table, "device", verdict.device)
    _row(table, "parameters", _number(verdict.parameters))
    _row(table, "dropout sites", _names(verdict.dropout_sites))
    _row(table, "training rows", _number(verdict.training_rows))
    _row(table, "steps an epoch", _number(verdict.steps_per_epoch))
    _row(table, "lanes", _lanes(verdict))
    _row(table, "training loss", _course(verdict.train_loss))
    _row(table, "validation loss", _course(verdict.validation_loss))
    _row(table, f"validation {verdict.score}", _course(verdict.validation_score))
    _row(table, "test loss", _figure(verdict.test_loss))
    _row(table, f"test {verdict.score}", _figure(verdict.test_score))
    _row(table, "reproducible", _yes(verdict.reproducible))
    _row(table, "speed", _speed(verdict.trial_epochs_per_second))
    _row(table, "step", _form(verdict.step))
    _row(table, "memory a lane", _megabytes(verdict.bytes_per_lane))
    console.print(table)
    _say_findings(verdict, console)
    for option in verdict.options:
        _show_option(option, console)
    if not verdict.wrong:
        console.print("[green]nothing is wrong with it[/]")


def _show_option(verdict: Verdict, console: Console) -> None:
    """Write what was found of a shape besides the first."""
    table = _table()
    _row(table, "option", verdict.name)
    _row(table, "parameters", _number(verdict.parameters))
    _row(table, "steps an epoch", _number(verdict.steps_per_epoch))
    _row(table, "lanes", _lanes(verdict))
    _row(table, "validation loss", _course(verdict.validation_loss))
    _row(table, "memory a lane", _megabytes(verdict.bytes_per_lane))
    console.print(table)
    _say_findings(verdict, console)


def _say_findings(verdict: Verdict, console: Console) -> None:
    if verdict.traceback:
        console.print(escape(verdict.traceback), style="dim", end="")
    for remark in verdict.remarks:
        console.print(f"[yellow]note:[/] {escape(remark)}", soft_wrap=True)
    for problem in verdict.problems:
        console.print(f"[red]wrong:[/] {escape(problem)}", soft_wrap=True)


def _table() -> Table:
    return Table(box=None, show_header=False, pad_edge=False)


def _row(table: Table, name: str, value: str | None) -> None:
    if value:
        table.add_row(name, escape(value))


def _add_rows(table: Table, data: Rows) -> None:
    kind = f"{data.classes} classes" if data.classes else "numbers to predict"
    _row(table, "rows", f"{data.training_rows:,} to train on, {data.test_rows:,} to test; {kind}")
    standardized = "" if data.standardized else ", as they are"
    _row(table, "inputs of a row", f"{_shape(data.input_shape)}{standardized}")
    _row(table, "content", data.content_hash)


def _add_network(table: Table, model: Network, built_for: str | None) -> None:
    _row(table, "built for", built_for)
    _row(table, "parameters", f"{model.parameters:,}")
    _row(table, "decayed", _shapes(model.penalized))
    _row(table, "spared", _shapes(model.spared))
    _row(table, "frozen", _shapes(model.frozen) if model.frozen else None)
    _row(table, "dropout sites", _names(model.dropout_sites))


def _settings(settings: Sequence[Setting]) -> Table:
    table = Table("setting", "default", "type", "", box=None, pad_edge=False)
    for setting in settings:
        default = "required" if setting.required else str(setting.default)
        parts = (setting.name, default, setting.type, setting.description or "")
        table.add_row(*map(escape, parts))
    return table


def _shapes(shapes: Mapping[str, Sequence[int]]) -> str:
    return ", ".join(f"{name} {_shape(shape)}" for name, shape in shapes.items()) or "none"


def _shape(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape)) or "1"


def _names(names: Sequence[str] | None) -> str | None:
    return None if names is None else ", ".join(names) or "none"


def _number(number: int | None) -> str | None:
    return None if number is None else f"{number:,}"


def _figure(number: float | None) -> str | None:
    return None if number is None else f"{number:.4g}"


def _course(numbers: Sequence[float] | None) -> str | None:
    return None if numbers is None else " → ".join(f"{number:.4g}" for number in numbers)


def _lanes(verdict: Verdict) -> str | None:
    if verdict.vectorized is None:
        return None
    if verdict.vectorized:
        return "as one batched model (vmap)"
    return f"one after the other: {verdict.not_vectorized_because}"


def _yes(value: bool | None) -> str | None:
    return None if value is None else "yes" if value else "no"


def _speed(rate: float | None) -> str | None:
    return None if rate is None else f"{rate:,.4g} trial-epochs a second, with 2 lanes"


def _megabytes(count: int | None) -> str | None:
    return None if count is None else f"{count / 1e6:.3g} MB"


def _form(form: Form | None) -> str | None:
    if form is None:
        return None
    if form.speedup is not None:
        return f"recorded; compiled, {form.speedup:.2g} times as fast"
    said = "recorded, not compiled" if form.recorded else "as it is written"
    return f"{said}: {form.obstacle}" if form.obstacle else said
