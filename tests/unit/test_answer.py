import io
from typing import Any

from rich.console import Console

from regtune import answer

OLD: dict[str, float] = {"weight_decay": 0.31, "dropout": 0.22, "l1_lambda": 0.0, "patience": 12}
PARAMS = OLD | {
    "learning_rate": 0.002,
    "label_smoothing": 0.0,
    "input_noise": 0.0,
    "weight_noise": 0.0,
    "max_norm": 0.0,
    "max_gradient_norm": 0.0,
    "input_dropout": 0.0,
    "augment_strength": 0.0,
    "mixup": 0.0,
}
DEFAULT = PARAMS | {"dropout": 0.2}
SCORES = ["validation loss", "test loss", "test accuracy"]


def rows(
    searched: list[str], params: dict[str, float], score: str = "accuracy", **reached: Any
) -> dict[str, list[str]]:
    """Show an answer whose baseline is ``PARAMS``; return its rows by their first column."""
    figures: dict[str, Any] = {"validation_loss": 0.5, "test_loss": 0.4, "test_score": 0.8}
    best = {"study": "x", "number": 3, "searched": searched, "params": params, **figures}
    best |= {"score": score, **reached}
    if reached:
        figures["validation_loss"] = -1.0
    others = {"baseline": {"params": PARAMS, **figures}, "default": {"params": DEFAULT, **figures}}
    out = io.StringIO()
    answer.show(best | others, Console(file=out, width=100))
    lines = [line.split("  ") for line in out.getvalue().splitlines()]
    table = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    return {row[0]: row[1:] for row in table if row}


def test_what_is_searched_has_a_row_even_at_zero() -> None:
    shown = rows(list(OLD), PARAMS)
    assert list(shown) == ["x", "weight decay", "dropout", "l1 lambda", "patience", *SCORES]
    assert shown["l1 lambda"] == ["0", "0", "0"]
    assert shown["dropout"] == ["0.22", "0.2", "0.22"]


def test_a_searched_learning_rate_and_noise_have_rows_too() -> None:
    shown = rows(["learning_rate", "input_noise"], PARAMS | {"learning_rate": 0.01})
    assert shown["learning rate"] == ["0.01", "0.002", "0.002"]
    assert shown["input noise"] == ["0", "0", "0"]
    assert "label smoothing" not in shown


def test_what_is_fixed_has_a_row_unless_it_is_zero_or_the_learning_rate() -> None:
    shown = rows(["dropout"], PARAMS | {"label_smoothing": 0.1})
    assert list(shown) == ["x", "weight decay", "dropout", "patience", "label smoothing", *SCORES]


def test_a_trial_from_before_there_was_noise_is_shown() -> None:
    assert rows(list(OLD), OLD) == rows(list(OLD), PARAMS)


def test_the_score_is_named_and_in_per_cent_only_where_it_is_a_share_of_rows() -> None:
    assert rows(["dropout"], PARAMS)["test accuracy"] == [
        "80.00%",
        "80.00%",
        "80.00%",
        "+0.00 points",
    ]
    shown = rows(["dropout"], PARAMS, "balanced_accuracy")
    assert shown["test balanced accuracy"] == ["80.00%", "80.00%", "80.00%", "+0.00 points"]
    assert rows(["dropout"], PARAMS, "rmse")["test rmse"] == ["0.8", "0.8", "0.8", "+0"]


def test_a_loss_below_zero_gains_by_falling_and_a_score_may_be_unknown() -> None:
    shown = rows(["dropout"], PARAMS, "r2", validation_loss=-2.0, test_score=None)
    assert shown["validation loss"] == ["-2", "-1", "-1", "-100.0%"]
    assert shown["test r2"] == ["–", "0.8", "0.8", "–"]


def test_what_is_not_there_yet_is_left_empty() -> None:
    figures = {"validation_loss": 0.5, "test_loss": 0.4, "test_score": 0.8}
    best = {"study": "x", "number": 1, "searched": ["dropout"], "params": PARAMS, **figures}
    out = io.StringIO()
    none = {"score": "accuracy", "baseline": None, "default": None}
    answer.show(best | none, Console(file=out, width=100))
    shown = [line.split() for line in out.getvalue().splitlines() if line]
    assert shown[-1] == ["test", "accuracy", "80.00%", "–", "–", "–"]


def test_what_makes_a_shape_has_a_row_where_it_is_searched() -> None:
    shape: dict[str, Any] = {"optimizer": "sgd", "batch_size": 64, "model.hidden": [256, 32]}
    searched = ["optimizer", "batch_size", "model.hidden", "dropout"]
    figures = {"validation_loss": 0.5, "test_loss": 0.4, "test_score": 0.8}
    best = {"study": "x", "number": 3, "searched": searched, "score": "accuracy", **figures}
    out = io.StringIO()
    console = Console(file=out, width=100)
    params = {"params": PARAMS | shape}
    other = params | figures
    answer.show(best | params | {"baseline": other, "default": other}, console)
    shown = {line.split("  ")[0]: line.split() for line in out.getvalue().splitlines() if line}
    assert shown["optimizer"][1:] == ["sgd"] * 3
    assert shown["batch size"][2:] == ["64"] * 3
    assert shown["model.hidden"][1:] == ["[256,", "32]"] * 3
