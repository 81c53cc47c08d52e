"""Live progress of a study: a bar in a terminal, plain lines elsewhere, JSON lines for scripts."""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from regtune.client import Client, Document, is_live
from regtune.spec import MOST_TRIALS

_LOOK_SECONDS, _LONGEST_LOOK_SECONDS, _LOOK_SHARE = 0.5, 5.0, 1 / 50
"""A study is looked at the more seldom the longer it has been watched: each look costs the service,
which may share the cores with the training, some 15 ms."""
_LINE_SECONDS = 3.0
"""Plain lines come at most this often."""

Pause = Callable[[float], None]
"""Lets so many seconds pass; may raise to give up."""


def show(api: Client, name: str, console: Console, pause: Pause = time.sleep) -> Document:
    """Show how a study goes until it is over; return it."""
    looks = _looks(api, name, pause)
    return _as_bar(looks, console) if console.is_terminal else _as_lines(looks, console)


def show_json(api: Client, name: str, write: Callable[[str], None]) -> Document:
    """Write a study as one line of JSON whenever it has changed, until it is over; return it."""
    written = None
    for study in _looks(api, name, time.sleep):
        if (seen := _without_time_left(study)) != written:
            write(json.dumps(study))
            written = seen
    return study


def ended(study: Document) -> int:
    """Return how many trials of a study will not change any more."""
    counts: dict[str, int] = study["counts"]
    return sum(counts[state] for state in ("complete", "pruned", "failed", "cancelled"))


def budget_in_words(study: Document) -> str:
    """Return how far a study is, by the limits that it has: ``3 of 40 trials done, …``."""
    parts = [f"{ended(study)} of {study['budget_trials']} trials done"]
    if study["budget_trials"] >= MOST_TRIALS:  # of which nobody has asked for fewer
        parts = [f"{ended(study)} trials done"]
    limits = {
        "budget_seconds": f"{study['budget_seconds'] or 0:g} s",
        "budget_trial_epochs": f"{study['budget_trial_epochs']} trial-epochs",
    }
    asked = [words for key, words in limits.items() if study[key] is not None]
    if asked:
        parts.append(f"{study['progress']:.0%} of the budget of {' and '.join(asked)}")
    return ", ".join(parts)


def seconds_taken(study: Document) -> float:
    """Return how long a study that is over has taken, from its POST on."""
    since, until = (datetime.fromisoformat(study[key]) for key in ("created_at", "finished_at"))
    return (until - since).total_seconds()


def duration(seconds: float) -> str:
    """Return seconds as a person would say them."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _looks(api: Client, name: str, pause: Pause) -> Iterator[Document]:
    """Yield a study again and again; last, when it is over."""
    began = time.monotonic()
    study = api.study(name)
    while is_live(study):
        yield study
        share = (time.monotonic() - began) * _LOOK_SHARE
        pause(min(max(share, _LOOK_SECONDS), _LONGEST_LOOK_SECONDS))
        study = api.study_patiently(name, pause)
    yield study


def _as_bar(looks: Iterable[Document], console: Console) -> Document:
    name, words = "{task.description}", "{task.fields[words]}"
    columns = (
        TextColumn(name, markup=False),
        BarColumn(20),
        TextColumn(words, markup=False),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", words="")
        for study in looks:
            progress.update(
                bar,
                description=study["name"],
                completed=study["progress"],
                total=1.0,
                words=_in_words(study),
            )
    return study


def _as_lines(looks: Iterable[Document], console: Console) -> Document:
    shown, due = None, time.monotonic()
    for study in looks:
        is_due = time.monotonic() >= due or not is_live(study)
        if is_due and (seen := _without_time_left(study)) != shown:
            console.out(f"{study['name']}: {_in_words(study)}")
            shown, due = seen, time.monotonic() + _LINE_SECONDS
    return study


def _without_time_left(study: Document) -> Document:
    return study | {"eta_seconds": None}


def _in_words(study: Document) -> str:
    parts = [budget_in_words(study)]
    if study["counts"]["running"]:
        parts.append(f"{study['counts']['running']} running")
    if study["best_validation_loss"] is not None:
        parts.append(f"best validation loss {study['best_validation_loss']:.4g}")
    if study["eta_seconds"] is not None:
        parts.append(f"about {duration(study['eta_seconds'])} left")
    if study["warning"]:
        parts.append(study["warning"])
    if study["state"] != "active":
        parts.append(study["state"])
    return ", ".join(parts)
