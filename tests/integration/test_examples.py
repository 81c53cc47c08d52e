"""The studies in examples/, shortened, on small files of the kind that they name."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import CIFAR10

from regtune import studies
from regtune.database import transaction
from regtune.settings import Settings
from regtune.spec import load_yaml, parse_spec
from tests.audit import audit
from tests.builders import states, study_state
from tests.serving import app, serving
from tests.threads import run_until_over
from tests.unit.tasks.files_of_others import write_cifar, write_idx

FOLDER = Path(__file__).parents[2] / "examples"
EXAMPLES = sorted(FOLDER.glob("*.yaml"))
TRIALS = 3
RANDOM = np.random.default_rng(0)


def adult(folder: Path, _: pytest.MonkeyPatch) -> None:
    lines = [
        f"{20 + i % 50}, Private, {i}, {'HS' if i % 2 else '?'}, 9, Never, Sales, Wife, White, "
        f"Male, 0, 0, {30 + i % 20}, Peru, {'>50K' if i % 4 == 0 else '<=50K'}"
        for i in range(120)
    ]
    (folder / "adult.csv").write_text("\n".join(lines))


def houses(folder: Path, _: pytest.MonkeyPatch) -> None:
    lines = [f"{50 + i % 70},{10_000 + i % 3},{1000.5 * (50 + i % 70)}" for i in range(120)]
    (folder / "houses.csv").write_text("\n".join(["area,postcode,price", *lines]))


def flowers(folder: Path, _: pytest.MonkeyPatch) -> None:
    for name in ("rose", "tulip"):
        (folder / "flowers" / name).mkdir(parents=True)
        for number in range(10):
            pixels = RANDOM.integers(0, 256, size=(70, 66, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "flowers" / name / f"{number}.jpg")


FILES: Mapping[str, Callable[[Path, pytest.MonkeyPatch], Any]] = {
    "cifar10": lambda folder, patch: write_cifar(folder, CIFAR10, "labels", 10, patch),
    "fashion_mnist": lambda folder, _: write_idx(folder / "FashionMNIST"),
    "image_folder": flowers,
    "mnist": lambda folder, _: write_idx(folder / "MNIST"),
    "table_classification": adult,
    "table_regression": houses,
}


SMALLER: Mapping[str, dict[str, Any]] = {
    "cifar10": {"channels": [4, 8], "depth": 1},
    "image_folder": {"model": "torchvision", "architecture": "squeezenet1_1"},
}
"""Networks that take less time on two cores."""


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(path, engine, database_url, tmp_path, monkeypatch):
    FILES.get(path.stem, lambda *_: None)(tmp_path, monkeypatch)
    whole = load_yaml(path.read_text())
    assert parse_spec(whole).name == whole["name"]
    short = {"max_epochs": 2, "warmup_epochs": 0, "precision": "float32"}
    spec = parse_spec(
        {
            **whole,
            "task": {**whole["task"], **SMALLER.get(path.stem, {})},
            "training": {**whole.get("training", {}), **short},
            "budget": {"trials": TRIALS},
        }
    )
    with transaction(engine) as session:
        study, _ = studies.create(session, spec, "test")
    settings = Settings(data_dir=tmp_path, poll_seconds=0.1, lanes=TRIALS)
    run_until_over(engine, database_url, settings, study)
    assert study_state(engine, study) == "completed"
    assert set(states(engine, study)) <= {"complete", "pruned"}
    assert audit(engine) == {}


@pytest.mark.slow
def test_a_loop_of_ones_own_gets_what_the_study_got(engine, database_url, tmp_path):
    whole = load_yaml((FOLDER / "digits.yaml").read_text())
    with transaction(engine) as session:
        study, _ = studies.create(session, parse_spec({**whole, "budget": {"trials": 8}}), "test")
    run_until_over(engine, database_url, Settings(data_dir=tmp_path, poll_seconds=0.1), study)
    with serving(app(database_url)) as client:
        best = client.get("/v1/studies/digits/best").json()
        said = subprocess.run(
            [sys.executable, FOLDER / "own_loop.py"],
            env=os.environ | {"REGTUNE_URL": str(client.base_url)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    loss, epoch, accuracy = map(float, re.findall(r"[0-9.]+(?=[ ,%])", said))
    assert loss == pytest.approx(best["validation_loss"], rel=0.5)
    assert 100 * best["test_score"] == pytest.approx(accuracy, abs=3)
    assert epoch >= 5
