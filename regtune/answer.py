"""The answer of a study as people want to read it: the best strengths, and what they bring."""

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from regtune.client import Document
from regtune.spec import STRENGTHS

_NOTHING = "–"
_SHARES = ("accuracy", "balanced_accuracy")
"""Scores that are shares of rows, and shown in per cent."""


def show(best: Document, console: Console) -> None:
    """Print the best trial of a study beside the one without regularization."""
    baseline = best["baseline"]
    table = Table(box=None, pad_edge=False)
    table.add_column(best["study"], style="bold")
    table.add_column(f"best (trial {best['number']})", justify="right")
    table.add_column("no regularization", justify="right")
    table.add_column("gain", justify="right")
    for name in _told(best):
        unregularized = _value(baseline["params"][name]) if baseline else _NOTHING
        table.add_row(name.replace("_", " "), _value(best["params"][name]), unregularized)
    table.add_section()
    table.add_row("validation loss", *_losses(best, baseline))
    table.add_row(f"test {best['score'].replace('_', ' ')}", *_scores(best, baseline))
    console.print()
    console.print(table)


def _told(best: Document) -> list[str]:
    """Return the parameters that say something: searched ones, and strengths fixed above zero.

    The learning rate says something as well where it may differ by optimizer.

    A trial from before a parameter was known does not name it.
    """
    searched, params = best["searched"], best["params"]
    return [
        name
        for name in dict.fromkeys([*STRENGTHS, *searched])
        if name in searched
        or (name != "learning_rate" and params.get(name))
        or (name == "learning_rate" and "optimizer" in searched)
    ]


def _losses(best: Document, baseline: Document | None) -> list[str]:
    """Return the best loss, the baseline's, and by how much of it the best is lower."""
    loss = best["validation_loss"]
    if baseline is None or not baseline["validation_loss"]:
        return [_number(loss), _NOTHING, _NOTHING]
    before = baseline["validation_loss"]
    return [_number(loss), _number(before), f"{(loss - before) / abs(before):+.1%}"]


def _scores(best: Document, baseline: Document | None) -> list[str]:
    """Return the best trial's score, the baseline's, and what is between them."""
    score = best["test_score"]
    before = baseline["test_score"] if baseline else None
    if score is None:  # as R² of a single test row
        return [_NOTHING] * 3
    if best["score"] not in _SHARES:
        return _in_numbers(score, before)
    if before is None:
        return [f"{score:.2%}", _NOTHING, _NOTHING]
    return [f"{score:.2%}", f"{before:.2%}", f"{100 * (score - before):+.2f} points"]


def _in_numbers(score: float, before: float | None) -> list[str]:
    if before is None:
        return [_number(score), _NOTHING, _NOTHING]
    return [_number(score), _number(before), f"{score - before:+.4g}"]


def _number(value: float) -> str:
    return f"{value:.4g}"


def _value(value: Any) -> str:
    """Return a parameter's value: a number, or what a model's setting may be."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return _number(value) if is_number else escape(str(value))
