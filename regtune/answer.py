"""The answer of a study, as people want to read it: the best strengths, and what they bring."""

from rich.console import Console
from rich.table import Table

from regtune import progress
from regtune.client import Client, Document, Refused

BASELINE = 0
"""Number of the trial without regularization: every study begins with it."""


def show(api: Client, study: Document, console: Console) -> None:
    """Print the best trial of a study beside the one without regularization."""
    try:
        best = api.best(study["name"])
    except Refused as refusal:
        console.print(str(refusal), soft_wrap=True, highlight=False)
        return
    console.print(_headline(study), soft_wrap=True, highlight=False)
    console.print(_table(best, _baseline(api, study["name"])))


def _headline(study: Document) -> str:
    trials = sum(study["trials"].values())
    state = study["state"] + (f" ({study['reason']})" if study["reason"] else "")
    return f"\n[bold]{study['name']}[/bold]: {trials} trials, {state}"


def _baseline(api: Client, name: str) -> Document | None:
    """Return the trial without regularization, unless it did not complete."""
    trial = api.trial(name, BASELINE)
    return trial if trial["state"] == "complete" else None


def _table(best: Document, baseline: Document | None) -> Table:
    table = Table("", box=None, pad_edge=False)
    table.add_column(f"best (trial {best['number']})", justify="right")
    table.add_column("no regularization", justify="right")
    table.add_column("gain", justify="right")
    nothing = {} if baseline is None else baseline["params"]
    for name, value in best["params"].items():
        table.add_row(name, number(value), number(nothing.get(name)))
    for label, key, gain in (
        ("validation loss", "validation_loss", _less),
        ("test accuracy", "test_score", _more),
    ):
        before = None if baseline is None else baseline[key]
        write = percent if key == "test_score" else number
        table.add_row(label, write(best[key]), write(before), gain(best[key], before))
    return table
