"""``regtune task show`` and ``regtune task check``, from the person's task to the exit code."""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog
import torch
from torch import Tensor, nn

from regtune.task import Data, Storage
from tests.unit.training.conftest import overlapping_blobs
from worker.inspection.__main__ import GOOD, NOT_FOUND, USAGE, WRONG, main


class Good:
    """Three clouds of points.

    More of it.
    """

    def __init__(self, width: int = 8, norm: bool = False) -> None:
        self.width, self.norm = width, norm

    def data(self, storage: Storage) -> Data:
        return Data(*overlapping_blobs(76, seed=1), *overlapping_blobs(40, seed=2), classes=3)

    def model(self, input_shape: tuple[int, ...], outputs: int) -> nn.Module:
        return nn.Sequential(
            nn.Linear(*input_shape, self.width),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(self.width, outputs),
        )


class OtherRowsEachTime(Good):
    def data(self, storage: Storage) -> Data:
        seed = time.perf_counter_ns()
        return Data(*overlapping_blobs(76, seed), *overlapping_blobs(40, seed=2), classes=3)


class OwnNoise(Good):
    """Draws from a generator that torch's own seed does not reach."""

    def model(self, input_shape: tuple[int, ...], outputs: int) -> nn.Module:
        return Noisy(*input_shape, outputs)


class Noisy(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * float(np.random.default_rng().normal())


class KeepsSomething(Good):
    def model(self, input_shape: tuple[int, ...], outputs: int) -> nn.Module:
        return Keeper(*input_shape, outputs)


class Keeper(nn.Linear):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * (1 + 1 / self.calls)


class FunctionalDropout(Good):
    def model(self, input_shape: tuple[int, ...], outputs: int) -> nn.Module:
        return Functional(*input_shape, outputs)


class Functional(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.2, self.training)


class Branches(Good):
    def model(self, input_shape: tuple[int, ...], outputs: int) -> nn.Module:
        return Branching(*input_shape, outputs)


class Branching(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if float(y.detach().sum()) > 0 else y * 2


class Overflows(Good):
    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        return output.sum(1) * torch.inf


class LossRaises(Good):
    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        return output[:, 7]


class NoWiderThanEight(Good):
    def model(self, input_shape: tuple[int, ...], outputs: int) -> nn.Module:
        if self.width > 8:
            raise ValueError("too wide")
        return super().model(input_shape, outputs)


class DataRaise(Good):
    def data(self, storage: Storage) -> Data:
        raise FileNotFoundError("points.csv")


@dataclass
class Layered(Good):
    widths: list[int] = field(default_factory=lambda: [8, 4])
    activation: type[nn.Module] = nn.ReLU
    width = 8


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    # It is for a process of its own: set up once, logs stay so for the tests to come.
    monkeypatch.setattr("regtune.logs.configure", lambda settings: None)
    classes = [Good, *Good.__subclasses__()]
    tasks = ",".join(f"{own.__name__}={__name__}:{own.__name__}" for own in classes)
    monkeypatch.setenv("REGTUNE_TASKS", f"{tasks},gone=no.such.module:Class")
    monkeypatch.setenv("REGTUNE_DATA_DIR", str(tmp_path))

    def call(*arguments: str) -> tuple[int, Any, str]:
        with structlog.testing.capture_logs():
            code = main([*arguments, "--json"])
        told = capsys.readouterr()
        return code, json.loads(told.out) if told.out else None, told.err

    return call


def test_a_task_is_shown_with_its_settings_data_and_model(run: Any) -> None:
    code, known, _ = run("show", "Good", "--set", "width=5")
    assert code == GOOD
    assert (known["kind"], known["summary"]) == ("task", "Three clouds of points.")
    assert known["settings"] == [
        {"name": "width", "type": "int", "required": False, "default": 8, "description": None},
        {"name": "norm", "type": "bool", "required": False, "default": False, "description": None},
    ]
    assert known["data"]["training_rows"] == 76
    assert known["data"]["input_shape"] == [6]
    assert known["model"] == {
        "parameters": 6 * 5 + 5 + 5 * 3 + 3,
        "penalized": {"0.weight": [5, 6], "3.weight": [3, 5]},
        "spared": {"0.bias": [5], "3.bias": [3]},
        "frozen": {},
        "dropout_sites": ["2"],
    }


def test_defaults_that_are_made_or_are_no_json_are_shown_as_well(run: Any) -> None:
    code, known, _ = run("show", "Layered")
    assert code == GOOD
    shown = {setting["name"]: setting["default"] for setting in known["settings"]}
    assert shown["widths"] == [8, 4]
    assert "ReLU" in shown["activation"]


def test_a_module_that_cannot_be_imported_is_told_in_a_line(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "half_written.py").write_text("class Task:\n    def data(self")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("REGTUNE_TASKS", "half=half_written:Task")
    code, known, told = run("show", "half")
    assert (code, known) == (WRONG, None)
    assert "it cannot be imported" in told


def test_a_model_is_shown_as_it_is_built_for_a_data_set(run: Any) -> None:
    code, known, _ = run(
        "show", "mlp", "--data", "wine", "--set", "hidden=[4]", "--set", "norm=none"
    )
    assert code == GOOD
    assert known["built_for"] == "wine"
    assert known["model"]["penalized"] == {"1.weight": [4, 13], "4.weight": [3, 4]}
    norm = {setting["name"]: setting for setting in known["settings"]}["norm"]
    assert (norm["type"], norm["default"]) == ("batch | layer | group | none", "batch")


def test_the_best_strength_is_shown_where_it_is_known(run: Any) -> None:
    code, known, _ = run("show", "synthetic", "--set", "rows=100", "--set", "features=20")
    assert code == GOOD
    assert known["best_decay"] == pytest.approx(2 * 20 / 80)
    example = Path(__file__).parents[2] / "examples" / "synthetic.yaml"
    assert run("show", str(example))[1]["best_decay"] == pytest.approx(0.5)
    assert run("show", "digits")[1]["best_decay"] is None


def test_a_data_set_is_shown_with_its_settings_also_if_it_cannot_be_loaded(run: Any) -> None:
    code, known, told = run("show", "table")
    assert code == USAGE
    assert "path: is required" in told
    code, known, told = run("show", "table", "--set", "path=no.csv", "--set", "target=y")
    assert code == WRONG
    assert "there is no file" in told
    assert known["settings"][0]["name"] == "path"
    assert known["settings"][0]["required"]
    assert known["data"] is None


def test_a_good_task_passes_and_says_how_it_trains(run: Any) -> None:
    code, verdict, _ = run("check", "Good", "--device", "cpu")
    assert (code, verdict["problems"], verdict["remarks"]) == (GOOD, [], [])
    assert verdict["vectorized"]
    assert verdict["reproducible"]
    assert verdict["dropout_sites"] == ["2"]
    assert (verdict["training_rows"], verdict["steps_per_epoch"], verdict["score"]) == (
        60,
        1,
        "accuracy",
    )
    assert len(verdict["validation_loss"]) == 2
    assert verdict["trial_epochs_per_second"] > 0
    assert verdict["bytes_per_lane"] > 4 * verdict["parameters"]
    assert verdict["step"]["recorded"]
    assert verdict["step"]["speedup"] > 0


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_study_is_checked_as_it_would_be_trained(run: Any, tmp_path: Path, epochs: int) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(
        "{name: s, task: {name: Good, width: 3, score: log_loss}, budget: {trials: 2},"
        f" training: {{batch_size: 10, max_epochs: {epochs}}}}}"
    )
    code, verdict, _ = run("check", str(file), "--device", "cpu")
    assert code == GOOD
    assert (verdict["steps_per_epoch"], verdict["score"]) == (6, "log_loss")


def test_every_option_of_what_makes_shapes_is_checked(run: Any, tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(
        "{name: s, task: {name: NoWiderThanEight, width: 3}, budget: {trials: 2},"
        " search: {batch_size: [10, 20], optimizer: [adamw, sgd], model: {width: [3, 5, 9]},"
        " learning_rate: {adamw: 0.001, sgd: {low: 0.01, high: 0.1, log: true}}}}"
    )
    code, verdict, _ = run("check", str(file), "--device", "cpu")
    assert code == WRONG
    assert verdict["problems"] == []
    assert (verdict["steps_per_epoch"], verdict["parameters"]) == (6, 6 * 3 + 3 + 3 * 3 + 3)
    reference = {"batch_size": 10, "optimizer": "adamw", "model.width": 3}
    found = {option["name"]: option for option in verdict["options"]}
    sgd, larger, wider, too_wide = (
        found.pop(json.dumps(reference | change, separators=(",", ":"), sort_keys=True))
        for change in (
            {"optimizer": "sgd"},
            {"batch_size": 20},
            {"model.width": 5},
            {"model.width": 9},
        )
    )
    assert found == {}
    assert (sgd["steps_per_epoch"], larger["steps_per_epoch"]) == (6, 3)
    assert wider["parameters"] == 6 * 5 + 5 + 5 * 3 + 3
    assert "ValueError: too wide (test_inspection.py, line " in too_wide["problems"][0]
    for option in (sgd, larger, wider):
        assert option["problems"] == []
        assert len(option["validation_loss"]) == 2


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("OtherRowsEachTime", "data() returned other rows at its second call"),
        ("OwnNoise", "something else of the same rows the second time"),
        ("KeepsSomething", "something else of the same rows the second time"),
        ("FunctionalDropout", "UnsupportedModel: the model draws random numbers"),
        ("Overflows", "the loss is not finite"),
        ("LossRaises", "IndexError: index 7 is out of bounds"),
        ("DataRaise", "FileNotFoundError: points.csv (test_inspection.py, line "),
        ("gone", "ModuleNotFoundError: No module named 'no'"),
    ],
)
def test_what_is_wrong_is_found_and_told(run: Any, name: str, says: str) -> None:
    code, verdict, _ = run("check", name, "--device", "cpu")
    assert code == WRONG
    assert says in verdict["problems"][0]


def test_a_model_that_vmap_refuses_is_told_why(run: Any) -> None:
    code, verdict, _ = run("check", "Branches", "--device", "cpu")
    assert code == GOOD
    assert not verdict["vectorized"]
    assert "vmap" in verdict["not_vectorized_because"]
    assert any("one after the other" in remark for remark in verdict["remarks"])
    assert any("no dropout site" in remark for remark in verdict["remarks"])


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("study.yaml", "--set", "width=3"),
        ("Good", "--model", "mlp"),
        ("digits", "--data", "digits"),
        ("mlp", "--model", "mlp"),
    ],
)
def test_an_option_that_means_nothing_here_is_refused(
    run: Any, name: str, option: str, value: str
) -> None:
    code, _, said = run("check", name, option, value)
    assert code == USAGE
    assert f"{option}: means nothing for a" in said


@pytest.mark.parametrize("setting", ["name=other", "model=cnn", "dataset=wine", "data=wine"])
def test_what_the_arguments_say_is_no_setting(run: Any, setting: str) -> None:
    code, _, said = run("check", "mlp", "--set", setting)
    assert code == USAGE
    assert f"--set {setting.partition('=')[0]}: means nothing" in said


def test_a_data_set_may_have_a_setting_of_any_name(run: Any) -> None:
    _, _, said = run("check", "wine", "--set", "name=other")
    assert "means nothing" not in said
    assert "task.data.name" in said


def test_unknown_names_and_settings_end_with_codes_of_their_own(run: Any) -> None:
    assert run("check", "nothing")[0] == NOT_FOUND
    assert run("check", "mlp", "--data", "nothing")[0] == NOT_FOUND
    assert run("check", "digits", "--model", "nothing")[0] == NOT_FOUND
    assert run("show", "mlp", "--set", "hidden")[0] == USAGE
    code, verdict, _ = run("check", "Good", "--set", "depth=3")
    assert code == WRONG
    assert "task.depth: unknown setting; known: width, norm" in verdict["problems"][0]
