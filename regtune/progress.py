"""Live progress of a study: a bar in a terminal, plain lines elsewhere, JSON lines for scripts."""

import json
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.progress import Task as Row
from rich.text import Text

from regtune.client import Client, Document, is_live

_LOOK_SECONDS = 0.5
_LINE_SECONDS = 3.0
"""Plain lines come at most this often."""

Pause = Callable[[float], None]
"""Lets so many seconds pass; may raise to give up."""


def show(api: Client, name: str, console: Console, pause: Pause = time.sleep) -> Document:
    """Show how a study goes until it is over; return it."""
    studies = _changes(api, name, pause)
    return _as_bar(studies, console) if console.is_terminal else _as_lines(studies, console)


def show_json(api: Client, name: str, write: Callable[[str], None]) -> Document:
    """Write a study as one line of JSON whenever it has changed, until it is over; return it."""
    for study in _changes(api, name, time.sleep):
        write(json.dumps(study))
    return study


def in_words(study: Document) -> str:
    """Say how far a study is, on one line."""
    parts = [f"{_ended(study)} of {_budget(study)} trials done"]
    if study["trials"]["running"]:
        parts.append(f"{study['trials']['running']} running")
    if study["best"]:
        parts.append(f"best validation loss {study['best']['validation_loss']:.4g}")
    if study["eta_seconds"] is not None:
        parts.append(f"about {duration(study['eta_seconds'])} left")
    if not is_live(study):
        parts.append(study["state"])
    elif study["warning"]:
        parts.append(study["warning"])
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """Return seconds as a person would say them."""
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {left} s" if minutes else f"{left} s"


def _changes(api: Client, name: str, pause: Pause) -> Iterator[Document]:
    """Yield a study whenever it has changed in more than the time left; last, when it is over."""
    known = None
    while True:
        study = api.study(name)
        if (seen := {**study, "eta_seconds": None}) != known:
            known = seen
            yield study
        if not is_live(study):
            return
        pause(_LOOK_SECONDS)


def _as_bar(studies: Iterator[Document], console: Console) -> Document:
    columns = TextColumn("{task.description}"), BarColumn(), _Words()
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("")
        for study in studies:
            bar.update(
                task,
                description=study["name"],
                completed=_ended(study),
                total=_budget(study),
                words=in_words(study),
            )
    return study


class _Words(TextColumn):
    """What ``in_words`` says, cut off where the terminal ends."""

    def __init__(self) -> None:
        super().__init__("{task.fields[words]}")

    def render(self, task: Row) -> Text:
        return Text(task.fields.get("words", ""), overflow="ellipsis", no_wrap=True)


def _as_lines(studies: Iterator[Document], console: Console) -> Document:
    due = time.monotonic()
    for study in studies:
        if time.monotonic() >= due or not is_live(study):
            console.print(f"{study['name']}: {in_words(study)}", soft_wrap=True, highlight=False)
            due = time.monotonic() + _LINE_SECONDS
    return study


def _ended(study: Document) -> int:
    counts: dict[str, int] = study["trials"]
    return sum(counts[state] for state in ("complete", "pruned", "failed", "cancelled"))


def _budget(study: Document) -> int:
    trials: int = study["spec"]["budget"]["trials"]
    return trials
