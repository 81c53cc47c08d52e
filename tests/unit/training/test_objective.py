from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn import metrics
from torch import Tensor
from torch.func import grad, vmap
from torch.nn.functional import cross_entropy

from regtune.errors import InvalidData
from worker.training.objective import Objective, classification, regression

LANES, ROWS, CLASSES = 3, 40, 4


def draw(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits of some lanes and one set of labels; the last class is rare, and one never occurs."""
    generator = torch.Generator().manual_seed(seed)
    logits_KBC = torch.randn(LANES, ROWS, CLASSES, dtype=torch.float64, generator=generator)
    return logits_KBC, torch.tensor([0, 0, 0, 1, 2] * 8)


def measured(objective: Objective, output_KBC: Tensor, y_B: Tensor, batch: int = 7) -> Tensor:
    """Figures from padded batches, as an epoch measures them: ``(K, 2)``."""
    total_TK = torch.zeros(objective.terms, len(output_KBC), dtype=torch.float64)
    index = torch.arange(-(-len(y_B) // batch) * batch)
    weight_R = (index < len(y_B)).double()
    index %= len(y_B)
    ranked = []
    for rows, weight_B in zip(index.split(batch), weight_R.split(batch), strict=True):
        figures = vmap(objective.measure, (0, None, None))(output_KBC[:, rows], y_B[rows], weight_B)
        total_TK += figures[:, : objective.terms].T
        ranked.append(figures[:, objective.terms :])
    rows_K = torch.full((len(output_KBC),), float(len(y_B)))
    ranked_KR = torch.cat(ranked, dim=1)
    return objective.figures(total_TK, rows_K, ranked_KR, lambda: y_B[index], weight_R)


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("accuracy", lambda y, p: metrics.accuracy_score(y, p.argmax(1))),
        ("balanced_accuracy", lambda y, p: metrics.balanced_accuracy_score(y, p.argmax(1))),
        ("log_loss", lambda y, p: metrics.log_loss(y, p, labels=range(CLASSES))),
    ],
)
def test_scores_of_classes_are_scikit_learns(name: str, theirs: Callable[..., float]):
    logits_KBC, y_B = draw()
    figures_K2 = measured(classification(CLASSES, name), logits_KBC, y_B)
    for lane, logits_BC in enumerate(logits_KBC):
        assert figures_K2[lane, 0] == pytest.approx(float(cross_entropy(logits_BC, y_B)))
        expected = theirs(y_B.numpy(), logits_BC.softmax(1).numpy())
        assert figures_K2[lane, 1] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [("r2", metrics.r2_score), ("rmse", metrics.root_mean_squared_error)],
)
def test_scores_of_numbers_are_scikit_learns_in_the_targets_own_unit(
    name: str, theirs: Callable[..., float]
):
    generator = torch.Generator().manual_seed(1)
    output_KB1 = torch.randn(LANES, ROWS, 1, dtype=torch.float64, generator=generator)
    y_B = torch.randn(ROWS, dtype=torch.float64, generator=generator)
    figures_K2 = measured(regression(name, unit=50.0), output_KB1, y_B)
    for lane, output_B1 in enumerate(output_KB1):
        predicted = output_B1[:, 0]
        assert figures_K2[lane, 0] == pytest.approx(float((predicted - y_B).square().mean()))
        expected = theirs(100 + 50 * y_B.numpy(), 100 + 50 * predicted.numpy())
        assert figures_K2[lane, 1] == pytest.approx(expected)


@pytest.mark.parametrize("decimals", [9, 0])
def test_the_area_under_the_curve_is_scikit_learns_ties_included(decimals: int):
    generator = torch.Generator().manual_seed(2)
    logits_KBC = torch.randn(LANES, ROWS, 2, dtype=torch.float64, generator=generator)
    logits_KBC = logits_KBC.round(decimals=decimals)
    y_B = (torch.rand(ROWS, generator=generator) < 0.3).long()
    figures_K2 = measured(classification(2, "auroc"), logits_KBC, y_B)
    for lane, logits_BC in enumerate(logits_KBC):
        expected = metrics.roc_auc_score(y_B.numpy(), (logits_BC[:, 1] - logits_BC[:, 0]).numpy())
        assert figures_K2[lane, 1].item() == pytest.approx(expected, abs=1e-12)
        assert figures_K2[lane, 0] == pytest.approx(float(cross_entropy(logits_BC, y_B)))


def test_lanes_may_be_ranked_on_rows_of_their_own():
    objective = classification(2, "auroc")
    generator = torch.Generator().manual_seed(3)
    ranked_KR = torch.randn(LANES, ROWS, dtype=torch.float64, generator=generator)
    y_KR = torch.randint(2, (LANES, ROWS), generator=generator)
    weight_KR = (torch.arange(ROWS) < torch.tensor([[ROWS], [30], [20]])).double()
    rows_K = weight_KR.sum(1)
    total_1K = torch.zeros(1, LANES)
    figures_K2 = objective.figures(total_1K, rows_K, ranked_KR, lambda: y_KR, weight_KR)
    for lane, rows in enumerate(rows_K.int().tolist()):
        expected = metrics.roc_auc_score(y_KR[lane, :rows], ranked_KR[lane, :rows])
        assert figures_K2[lane, 1].item() == pytest.approx(expected, abs=1e-12)


def test_the_area_under_the_curve_is_for_two_classes():
    with pytest.raises(InvalidData, match="auroc is for two classes, but there are 3"):
        classification(3, "auroc")


def test_weighted_classes_count_as_often_as_they_weigh():
    """The loss is that of rows that are repeated, and batches add up to it."""
    logits_KBC, y_B = draw()
    weights_C = torch.tensor([1.0, 2.0, 3.0, 5.0]).double()
    objective = classification(CLASSES, weights_C=weights_C)
    copies = weights_C[y_B].long()
    expected = cross_entropy(
        logits_KBC[0].repeat_interleave(copies, 0), y_B.repeat_interleave(copies), reduction="sum"
    )
    figures_K2 = measured(objective, logits_KBC, y_B)
    assert figures_K2[0, 0] == pytest.approx(float(expected) / ROWS)
    assert figures_K2[0, 1] == pytest.approx(
        float((logits_KBC[0].argmax(1) == y_B).double().mean())
    )

    def training_loss(logits_BC: Tensor) -> Tensor:
        return objective.loss.of_batch(logits_BC, y_B, None)

    per_class = cross_entropy(logits_KBC[0], y_B, weight=weights_C, reduction="sum") / ROWS
    assert training_loss(logits_KBC[0]).item() == pytest.approx(per_class.item())
    gradient = grad(training_loss)(logits_KBC[0])
    plain = grad(lambda logits: cross_entropy(logits, y_B))(logits_KBC[0])
    torch.testing.assert_close(gradient, plain * weights_C[y_B][:, None])


def test_smoothing_and_weights_go_together():
    logits_KBC, y_B = draw()
    weights_C = torch.tensor([1.0, 2.0, 3.0, 5.0]).double()
    ours = classification(CLASSES, weights_C=weights_C).loss.of_batch(
        logits_KBC[0], y_B, torch.tensor(0.1).double()
    )
    rows = cross_entropy(logits_KBC[0], y_B, label_smoothing=0.1, reduction="none")
    assert ours.item() == pytest.approx((rows * weights_C[y_B]).mean().item())


@pytest.mark.parametrize(
    ("make", "wrong", "known"),
    [
        (
            lambda score: classification(2, score),
            "rmse",
            "accuracy, balanced_accuracy, log_loss, auroc",
        ),
        (regression, "accuracy", "r2, rmse"),
    ],
)
def test_a_score_of_the_other_kind_is_refused(
    make: Callable[[str], Objective], wrong: str, known: str
):
    with pytest.raises(InvalidData, match=f"has no {wrong}; known for it: {known}"):
        make(wrong)


def test_r2_of_targets_far_from_zero_is_scikit_learns():
    """In float32, with sums of squares that agree in their first eight digits."""
    generator = torch.Generator().manual_seed(1)
    y_B = 1e6 + 100 * torch.randn(ROWS, generator=generator)
    output_KB1 = (y_B + 30 * torch.randn(LANES, ROWS, generator=generator))[..., None]
    figures_K2 = measured(regression("r2", center=float(y_B.mean())), output_KB1, y_B)
    for lane, output_B1 in enumerate(output_KB1):
        expected = metrics.r2_score(y_B.numpy(), output_B1[:, 0].numpy())
        assert figures_K2[lane, 1] == pytest.approx(expected, abs=1e-3)


def test_r2_of_one_who_says_the_mean_is_zero():
    y_B = torch.tensor([1.0, 2.0, 4.0]).double()
    mean = torch.full((1, 3, 1), float(np.mean([1, 2, 4]))).double()
    assert measured(regression(), mean, y_B)[0, 1] == pytest.approx(0, abs=1e-12)
