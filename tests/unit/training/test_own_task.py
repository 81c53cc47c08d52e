"""Tasks of a user's own: data, model, loss and score in one class."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, poisson_nll_loss

from regtune.errors import InvalidData, InvalidSpec, NotFound
from regtune.spec import NamedTask, Training, Validation
from regtune.task import Data, Storage, make_task, settings_schema
from tests.unit.training.conftest import losses, overlapping_blobs, train, trial
from worker.training.engine import KNOBS, Engine
from worker.training.model import UnsupportedModel

WITHOUT_SMOOTHING = KNOBS - {"label_smoothing"}


def rows(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of events, at a rate that depends on the inputs."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(count, 4)).astype(np.float32)
    return x, random.poisson(np.exp(0.5 * x[:, 0] + 1)).astype(np.float32)


@dataclass
class Counts:
    """A regression of counts, with a loss and a score of its own."""

    width: int = 8
    frozen: bool = False

    def data(self, storage: Storage) -> Data:
        return Data(*rows(90, seed=1), *rows(40, seed=2), classes=None)

    def model(self, input_shape: tuple[int, ...], outputs: int) -> nn.Module:
        model = nn.Sequential(
            nn.Linear(*input_shape, self.width), nn.ReLU(), nn.Dropout(), nn.Linear(self.width, 1)
        )
        model[0].requires_grad_(not self.frozen)
        return model

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        return poisson_nll_loss(output[:, 0], y, reduction="none")

    def score(self, output: Tensor, y: Tensor) -> Tensor:
        return (output[:, 0].exp() - y).abs()


class Classes:
    """A classification that measures what is usual."""

    def data(self, storage: Storage) -> Data:
        return Data(*overlapping_blobs(76, seed=1), *overlapping_blobs(40, seed=2), classes=3)

    def model(self, input_shape: tuple[int, ...], outputs: int) -> nn.Module:
        return nn.Linear(*input_shape, outputs)


class Words:
    """Token ids, one label for each token of a row, and a padding that does not count."""

    ROWS, LENGTH, VOCABULARY = 60, 5, 2**17

    def data(self, storage: Storage) -> Data:
        random = np.random.default_rng(0)
        x = random.integers(self.VOCABULARY - 7, self.VOCABULARY, (self.ROWS, self.LENGTH))
        y = x % 2
        return Data(x[:40], y[:40], x[40:], y[40:], classes=None, standardize=False)

    def model(self, input_shape: tuple[int, ...], outputs: int) -> nn.Module:
        return Tagger(self.VOCABULARY)

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(output.transpose(1, 2), y, reduction="none").mean(1)

    def score(self, output: Tensor, y: Tensor) -> Tensor:
        return (output.argmax(2) == y).double().mean(1)


class Tagger(nn.Module):
    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 3)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embedding(x.long()))


class ByNumber(Classes):
    """As attention in other libraries: a dropout module that is never called, only read."""

    def model(self, input_shape: tuple[int, ...], outputs: int) -> nn.Module:
        return ReadsItsRate(*input_shape, outputs)


class ReadsItsRate(nn.Linear):
    def __init__(self, features: int, outputs: int) -> None:
        super().__init__(features, outputs)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        rate = self.dropout.p if self.training else 0.0
        y = super().forward(x)
        return nn.functional.dropout(y, rate) if rate else y


class Reserved(Classes):
    def __init__(self, score: float = 1.0) -> None:
        self.limit = score


class OneLoss(Classes):
    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(output, y)


class OneScore(Classes):
    def score(self, output: Tensor, y: Tensor) -> Tensor:
        return (output.argmax(1) == y).sum()


class NoScore(Counts):
    score = None  # type: ignore[assignment]


class NoData(Classes):
    def data(self, storage: Storage) -> Any:
        return overlapping_blobs(76, seed=1)


class Constant(Classes):
    def model(self, input_shape: tuple[int, ...], outputs: int) -> nn.Module:
        return nn.Linear(*input_shape, outputs).requires_grad_(False)


@pytest.fixture
def make(tmp_path) -> Callable[..., Engine]:
    def engine(
        own: type, knobs: frozenset[str] = WITHOUT_SMOOTHING, folds: int | None = None, **task: Any
    ) -> Engine:
        return Engine(
            task=NamedTask(name="own", **task),
            training=Training(batch_size=16, max_epochs=12, learning_rate=0.01, seed=3),
            validation=Validation(folds=folds) if folds else Validation(),
            storage=Storage(tmp_path),
            device=torch.device("cpu"),
            max_lanes=8,
            own_tasks={"own": f"{__name__}:{own.__name__}"},
            knobs=knobs,
            dtype=torch.float64,
            threads=1,
            compiles=False,
        )

    return engine


def test_its_own_loss_and_score_are_measured_on_targets_as_they_are(make):
    engine = make(Counts)
    engine.join([trial(0)])
    (epoch,) = engine.train_epoch()
    (result,) = engine.results([0])
    assert engine.score == "own"
    model = Counts().model((4,), 1).double()
    model.load_state_dict({name: p[0] for name, p in engine._tensors.parameters.items()})
    model.eval()
    x, y = (torch.from_numpy(part).double() for part in rows(40, seed=2))
    x_train = torch.from_numpy(rows(90, seed=1)[0]).double()
    training = x_train[torch.from_numpy(engine._epochs._splits[0].training)]
    x = (x - training.mean(0)) / training.std(0, correction=0)
    with torch.no_grad():
        output = model(x)
    assert result.test_loss == pytest.approx(Counts().loss(output, y).mean().item(), rel=1e-6)
    assert result.test_score == pytest.approx(Counts().score(output, y).mean().item(), rel=1e-6)
    assert epoch.validation_loss != pytest.approx(epoch.validation_score)


def test_a_study_may_ask_for_a_built_in_score_instead(make):
    assert make(Classes).score == "accuracy"
    assert make(Classes, score="log_loss").score == "log_loss"
    assert make(Counts, score="rmse").score == "rmse"


def test_a_lane_among_others_gives_what_it_gives_alone(make):
    alone = make(Counts, folds=2)
    alone.join([trial(1, weight_decay=0.1, dropout=0.3)])
    together = make(Counts, folds=2)
    together.join([trial(0), trial(1, weight_decay=0.1, dropout=0.3), trial(2, l1_lambda=0.01)])
    expected, shared = losses(train(alone, 4)[1]), losses(train(together, 4)[1])
    torch.testing.assert_close(shared, expected, rtol=1e-9, atol=1e-12)
    assert expected[-1, 1] < expected[0, 1]


def test_settings_reach_the_model(make):
    assert make(Counts, width=5).parameters == 4 * 5 + 5 + 5 + 1


def test_ids_and_targets_of_any_shape_reach_model_and_loss_as_they_are(make):
    engine = make(
        Words, knobs=frozenset({"weight_decay", "dropout"})
    )  # what perturbs inputs is off
    engine.join([trial(0, learning_rate=0.1)])
    curve = train(engine, 10)[0]
    assert curve[-1].validation_score > 0.9  # rows mixed up, or ids rounded, tell nothing of parity


def test_what_is_frozen_stays_as_it_is_and_costs_no_decay(make):
    engine = make(Counts, frozen=True)
    assert engine.model.penalized == ("3.weight",)
    assert engine.parameters == 8 + 1
    engine.join([trial(0, weight_decay=1.0, l1_lambda=0.1), trial(1)])
    before = engine._tensors.buffers["0.weight"].clone()
    train(engine, 2)
    assert torch.equal(engine._tensors.buffers["0.weight"], before)
    assert not torch.equal(*engine._tensors.parameters["3.weight"])


@pytest.mark.parametrize(
    ("own", "changes", "says"),
    [
        (OneLoss, {}, r"loss\(\) must return one number for each of 4 rows.* the shape \(\)"),
        (OneScore, {}, r"score\(\) must return one number for each of 4 rows.* the shape \(\)"),
        (NoScore, {}, r"a loss\(\) of its own and no classes needs a score\(\)"),
        (NoData, {}, r"data\(\) must return a regtune.task.Data, not tuple"),
        (Counts, {"class_weights": "balanced"}, "class_weights weigh .* a loss of its own"),
        (Counts, {"knobs": KNOBS}, "label_smoothing smooths .* a loss of its own"),
        (Counts, {"score": "accuracy"}, "a regression has no accuracy"),
    ],
)
def test_what_a_task_does_wrong_is_said(make, own, changes, says):
    with pytest.raises(InvalidData, match=says):
        make(own, **changes)


def test_a_rate_that_a_model_reads_is_the_lanes(make):
    engine = make(ByNumber)
    assert engine.model.sites == ("dropout",)
    engine.join([trial(0, dropout=0.5), trial(1), trial(2, dropout=0.5)])
    dropping, plain, twin = train(engine, 2).values()
    assert not torch.equal(losses(dropping), losses(plain))
    torch.testing.assert_close(losses(dropping), losses(twin))


def test_a_setting_may_not_bear_the_name_of_a_field(make):
    with pytest.raises(InvalidSpec, match=r"task\.score: the task has an argument of this name"):
        make(Reserved)


def test_a_model_that_learns_nothing_is_refused(make):
    with pytest.raises(UnsupportedModel, match="no parameter that needs a gradient"):
        make(Constant)


def test_an_unknown_task_is_told_which_there_are(make):
    with pytest.raises(NotFound, match=r"'own'.*installed: \['other'\]"):
        Engine(
            task=NamedTask(name="own"),
            training=Training(),
            validation=Validation(),
            storage=Storage(None),
            device=torch.device("cpu"),
            max_lanes=1,
            own_tasks={"other": f"{__name__}:Counts"},
        )


class Plain:
    def __init__(self, depth: Annotated[int, Field(ge=1)], norm: Literal["a", "b"] = "a") -> None:
        self.depth, self.norm = depth, norm


class Modelled(BaseModel):
    depth: Annotated[int, Field(ge=1)]
    norm: Literal["a", "b"] = "a"


@pytest.mark.parametrize("factory", [Plain, Modelled])
def test_the_arguments_of_a_task_are_its_settings(factory):
    task = make_task(factory, {"depth": 3})
    assert (task.depth, task.norm) == (3, "a")
    with pytest.raises(InvalidSpec) as refused:
        make_task(factory, {"norm": "c", "width": 1})
    assert [error.field for error in refused.value.errors] == [
        "task.depth",
        "task.norm",
        "task.width",
    ]
    assert settings_schema(Counts).model_fields["width"].default == 8
