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
    """Print the best trial of a study beside the reference points; gains are over everything off.

    The best is the one of the lowest validation loss; no test figure had a part in that.
    """
    others = [best["default"], best["baseline"]]
    table = Table(box=None, pad_edge=False)
    table.add_column(best["study"], style="bold")
    table.add_column(f"best (trial {best['number']})", justify="right")
    table.add_column("common default", justify="right")
    table.add_column("everything off", justify="right")
    table.add_column("gain", justify="right")
    for name in _told(best):
        values = [_value(trial["params"][name]) if trial else _NOTHING for trial in others]
        table.add_row(name.replace("_", " "), _value(best["params"][name]), *values)
    table.add_section()
    for key in ("validation_loss", "test_loss"):
        losses = [trial[key] if trial else None for trial in (best, *others)]
        table.add_row(key.replace("_", " "), *map(_number, losses), _less(losses[0], losses[-1]))
    scores = [trial["test_score"] if trial else None for trial in (best, *others)]
    is_share = best["score"] in _SHARES
    table.add_row(
        f"test {best['score'].replace('_', ' ')}",
        *map(_per_cent if is_share else _number, scores),
        _more(scores[0], scores[-1], is_share),
    )
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


def _less(loss: float | None, before: float | None) -> str:
    """Return by how much of the other loss this one is lower."""
    if loss is None or not before:
        return _NOTHING
    return f"{(loss - before) / abs(before):+.1%}"


def _more(score: float | None, before: float | None, is_share: bool) -> str:
    """Return what is between two scores; one of a single test row may be unknown, as R²."""
    if score is None or before is None:
        return _NOTHING
    return f"{100 * (score - before):+.2f} points" if is_share else f"{score - before:+.4g}"


def _per_cent(share: float | None) -> str:
    return _NOTHING if share is None else f"{share:.2%}"


def _number(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:.4g}"


def _value(value: Any) -> str:
    """Return a parameter's value: a number, or what a model's setting may be."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return _number(value) if is_number else escape(str(value))
