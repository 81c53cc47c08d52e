"""Published results of regularized perceptrons, searched for again with regtune.

Each arm allows some techniques and no others. Its study searches their strengths; then the best
ones are trained again with other seeds, and the mean test score over those is what is reported,
with its standard error. Choosing is by validation loss; test rows are looked at once a training.
Every arm, the plain one too, is tested at the weights of its best epoch, where Kadra et al. take
the last.

- fashion: Fashion-MNIST, all 70 000 rows split 60/20/20, a perceptron of 9 × 512; balanced
  accuracy. A. Kadra et al., Well-tuned Simple Nets Excel on Tabular Datasets, NeurIPS 2021,
  arXiv 2106.11189, table 2 and appendix.
- adult: UCI's Adult, its training file split 60/20/20, the same perceptron and source; the loss
  weighs both classes alike, as in the authors' program.
- mnist: 3 × 1024 rectified linear units; error. N. Srivastava et al., Dropout, JMLR 15 (2014),
  table 2.

    python benchmarks/published.py --data-dir DIR                # scaled down, for two cores
    python benchmarks/published.py --data-dir DIR --full         # as published, for a GPU
    python benchmarks/published.py --data-dir DIR --problem adult --trials 8 --seeds 2

``DIR`` holds what torchvision has downloaded, and Adult's training file as ``adult.csv``.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.study import running_site
from regtune.client import Client

OFF = {"weight_decay": 0.0, "dropout": 0.0, "l1_lambda": 0.0}
DECAY = {"weight_decay": {"low": 1e-4, "high": 3.0, "log": True, "or_zero": True}}
DROPOUT = {"dropout": {"low": 0.0, "high": 0.8}}
INPUT_DROPOUT = {"input_dropout": {"low": 0.0, "high": 0.4}}
MAX_NORM = {"max_norm": {"low": 0.5, "high": 5.0, "log": True, "or_zero": True}}
COCKTAIL = {
    **DECAY,
    **DROPOUT,
    "l1_lambda": {"low": 1e-4, "high": 0.3, "log": True, "or_zero": True},
    "label_smoothing": {"low": 0.0, "high": 0.2},
    "mixup": {"low": 0.0, "high": 1.0},
}
ADULT_COLUMNS = [
    *("age", "workclass", "fnlwgt", "education", "education_num", "marital_status", "occupation"),
    *("relationship", "race", "sex", "capital_gain", "capital_loss", "hours_per_week", "country"),
    "income",
]


@dataclass(frozen=True)
class Arm:
    """What may be used; ``published`` is the score that was reported, in per cent."""

    name: str
    published: float
    search: Mapping[str, Any]
    training: Mapping[str, Any]
    norm: str = "none"


@dataclass(frozen=True)
class Problem:
    """Data and network of the publication, and what is taken of them on two cores."""

    name: str
    source: str
    task: Mapping[str, Any]
    score: str
    training: Mapping[str, Any]
    fraction: float
    hidden: Sequence[int]
    small_hidden: Sequence[int]
    arms: Sequence[Arm]

    @property
    def measure(self) -> str:
        """What is shown: errors where the publication shows errors."""
        return "error" if self.score == "accuracy" else self.score.replace("_", " ")


@dataclass(frozen=True)
class Scale:
    """How much of everything."""

    trials: int
    epochs: int
    seeds: int
    full: bool


@dataclass(frozen=True)
class Result:
    """What came out of an arm, in per cent; ``params`` are the best strengths."""

    problem: str
    arm: str
    published: float
    mean: float
    error: float | None
    seeds: Sequence[float]
    params: Mapping[str, float]
    seconds: float


FULL = Scale(trials=100, epochs=105, seeds=5, full=True)
SMALL = Scale(trials=16, epochs=20, seeds=3, full=False)

KADRA = "Kadra et al. 2021"
COSINE = {"optimizer": "adamw", "schedule": "cosine", "batch_size": 128}


def of_kadra(
    plain: float, dropout: float, cocktail: float, decay: float | None = None
) -> tuple[Arm, ...]:
    """Return the arms with what was published for each; decay alone was not for all data."""
    return (
        Arm("plain", plain, {}, {}),
        *([] if decay is None else [Arm("weight decay", decay, DECAY, {})]),
        Arm("dropout", dropout, DROPOUT, {}),
        Arm("cocktail", cocktail, COCKTAIL, {"averaging": "swa"}, norm="batch"),
    )


PROBLEMS = {
    "fashion": Problem(
        "fashion",
        KADRA,
        {"name": "fashion_60_20_20"},
        "balanced_accuracy",
        COSINE,
        fraction=0.25,
        hidden=[512] * 9,
        small_hidden=[128] * 9,
        arms=of_kadra(plain=90.46, decay=90.70, dropout=90.51, cocktail=91.95),
    ),
    "adult": Problem(
        "adult",
        KADRA,
        {
            "dataset": "table",
            "model": "mlp",
            "class_weights": "balanced",
            "data": {"path": "adult.csv", "target": "income", "columns": ADULT_COLUMNS},
        },
        "balanced_accuracy",
        COSINE,
        fraction=0.25,
        hidden=[512] * 9,
        small_hidden=[128] * 9,
        arms=of_kadra(plain=76.89, dropout=78.52, cocktail=82.44),
    ),
    "mnist": Problem(
        "mnist",
        "Srivastava et al. 2014",
        {"dataset": "mnist", "model": "mlp"},
        "accuracy",
        {"optimizer": "sgd", "momentum": 0.95, "schedule": "cosine", "batch_size": 128},
        fraction=1 / 6,
        hidden=[1024] * 3,
        small_hidden=[256] * 3,
        arms=(
            Arm("L2", 1.62, {"weight_decay": {"low": 1e-6, "high": 1e-2, "log": True}}, {}),
            Arm("dropout", 1.25, {**DROPOUT, **INPUT_DROPOUT}, {}),
            Arm("dropout and max-norm", 1.05, {**DROPOUT, **INPUT_DROPOUT, **MAX_NORM}, {}),
        ),
    ),
}


def main() -> None:
    """Run the studies of all arms, one after the other; print and write what came out."""
    arguments = parse_arguments()
    scale = FULL if arguments.full else SMALL
    scale = replace(
        scale,
        **{
            name: getattr(arguments, name)
            for name in ("trials", "epochs", "seeds")
            if getattr(arguments, name) is not None
        },
    )
    os.environ["REGTUNE_DATA_DIR"] = str(arguments.data_dir.resolve())
    os.environ["REGTUNE_TASKS"] = "fashion_60_20_20=benchmarks.fashion:FashionSplitAnew"
    results: list[Result] = []
    with (
        tempfile.TemporaryDirectory(prefix="regtune-published-") as home,
        running_site(Path(home)) as site,
        Client(site.url) as api,
    ):
        for name in arguments.problem:
            for arm in PROBLEMS[name].arms:
                if arguments.arm and arm.name not in arguments.arm:
                    continue
                results.append(run(api, PROBLEMS[name], arm, scale))
                report(results[-1])
                write(arguments.json, scale, results)
    print_table(results, scale)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, default=Path(".regtune/data"))
    parser.add_argument("--problem", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS))
    arms = sorted({arm.name for problem in PROBLEMS.values() for arm in problem.arms})
    parser.add_argument("--arm", nargs="+", choices=arms, help="only these; default: all")
    parser.add_argument("--full", action="store_true", help="network, epochs and trials at length")
    parser.add_argument("--trials", type=int, help="of each arm; default: 16, full 100")
    parser.add_argument("--epochs", type=int, help="of each trial; default: 20, full 105")
    parser.add_argument("--seeds", type=int, help="that the best is trained with; default: 3, 5")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    return parser.parse_args()


def run(api: Client, problem: Problem, arm: Arm, scale: Scale) -> Result:
    """Search an arm's strengths, then train the best ones again with other seeds."""
    started = perf_counter()
    name = f"{problem.name}-{arm.name.replace(' ', '-')}"
    params: dict[str, float] = {}
    if arm.search:
        searched = study_of(problem, arm, scale, name, arm.search, seed=0, trials=scale.trials)
        best = answer(api, searched)
        params = {key: best["params"][key] for key in arm.search}
    again = [
        study_of(problem, arm, scale, f"{name}-{seed}", params, seed, trials=1)
        for seed in range(1, scale.seeds + 1)
    ]
    scores = [shown(problem, answer(api, spec)["test_score"]) for spec in again]
    return Result(
        problem=problem.name,
        arm=arm.name,
        published=arm.published,
        mean=fmean(scores),
        error=stdev(scores) / sqrt(len(scores)) if len(scores) > 1 else None,
        seeds=scores,
        params=params,
        seconds=perf_counter() - started,
    )


def study_of(
    problem: Problem,
    arm: Arm,
    scale: Scale,
    name: str,
    search: Mapping[str, Any],
    seed: int,
    trials: int,
) -> Mapping[str, Any]:
    """Return a study over these strengths; all others are off."""
    hidden = problem.hidden if scale.full else problem.small_hidden
    return {
        "name": name,
        "task": {**problem.task, "score": problem.score, "hidden": hidden, "norm": arm.norm},
        "training": {
            **problem.training,
            **arm.training,
            "max_epochs": scale.epochs,
            "seed": seed,
        },
        "validation": {"fraction": problem.fraction},
        "search": {**OFF, **search, "patience": [scale.epochs]},
        "budget": {"trials": trials},
    }


def answer(api: Client, spec: Mapping[str, Any]) -> Mapping[str, Any]:
    """Let a study run to its end; return its best trial."""
    api.submit(spec)
    study = api.wait(spec["name"])
    if study["state"] != "completed":
        raise SystemExit(f"study {spec['name']} ended {study['state']}: {study.get('reason')}")
    return api.best(spec["name"])


def shown(problem: Problem, score: float) -> float:
    """Return a score in per cent, or the error where the publication shows errors."""
    return 100 * (1 - score if problem.measure == "error" else score)


def report(result: Result) -> None:
    """Say at once what came out of an arm."""
    print(f"{result.problem} {result.arm}: {told(result)} in {result.seconds:.0f} s", flush=True)


def told(result: Result) -> str:
    """Return mean and standard error."""
    return f"{result.mean:.2f}" + (f" ± {result.error:.2f}" if result.error is not None else "")


def print_table(results: Sequence[Result], scale: Scale) -> None:
    """Print all arms beside what was published."""
    table = Table(title="Test scores in per cent, mean ± standard error over seeds")
    for column in ("problem", "arm", "published", "here", "seeds", "best strengths"):
        table.add_column(column)
    for result in results:
        problem = PROBLEMS[result.problem]
        table.add_row(
            f"{problem.name}, {problem.measure}",
            result.arm,
            f"{result.published:.2f} ({problem.source})",
            told(result),
            str(len(result.seeds)),
            ", ".join(f"{key} {value:.3g}" for key, value in result.params.items()),
        )
    console = Console(width=160)
    console.print(table)
    if not scale.full:
        console.print(
            "Scaled down: hidden layers of 9 × 128 and 3 × 256 instead of 9 × 512 and 3 × 1024, "
            f"{scale.epochs} epochs instead of {FULL.epochs}, {scale.trials} trials an arm."
        )


def write(path: Path | None, scale: Scale, results: Sequence[Result]) -> None:
    """Write all figures so far where they are wanted."""
    if path:
        figures = {"scale": asdict(scale), "results": [asdict(result) for result in results]}
        path.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
