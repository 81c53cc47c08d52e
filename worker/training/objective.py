"""What training minimizes, and the score that is shown beside it.

All is made of functions of tensors, so that it maps over lanes and can be recorded. Rows come in
batches, so a score comes from sums over rows, T of them; what is no sum, such as the root of an
RMSE, is left to the end. A score that compares rows with one another gets them all at the end.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from regtune.errors import InvalidData
from regtune.spec import CLASSIFICATION_SCORES, REGRESSION_SCORES, ScoreName
from regtune.task import RowFunction
from worker.training.regularizers import smoothed_cross_entropy


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy of logits ``(B, C)`` and labels ``(B,)``.

    With ``weights_C`` a row counts as much as its class weighs. The mean is over rows, not over
    weights, so that batches of different classes add up to one objective.
    """

    weights_C: Tensor | None = None

    def of_rows(self, output_BC: Tensor, y_B: Tensor) -> Tensor:
        """Return each row's loss: ``(B,)``."""
        return self._weighted(cross_entropy(output_BC, y_B, reduction="none"), y_B)

    def of_batch(self, output_BC: Tensor, y_B: Tensor, smoothing: Tensor | None) -> Tensor:
        """Return the mean loss of a batch, with labels smoothed where ``smoothing`` is given."""
        if smoothing is None and self.weights_C is None:
            return cross_entropy(output_BC, y_B)  # one kernel, where the others are two
        return self.of_training_rows(output_BC, y_B, smoothing).mean()

    def of_training_rows(self, output_BC: Tensor, y_B: Tensor, smoothing: Tensor | None) -> Tensor:
        """Return each row's loss, ``(B,)``, with labels smoothed where ``smoothing`` is given."""
        if smoothing is None:
            return self.of_rows(output_BC, y_B)
        return self._weighted(smoothed_cross_entropy(output_BC, y_B, smoothing), y_B)

    def to(self, device: torch.device) -> "CrossEntropy":
        """Return the same with its weights on ``device``."""
        return CrossEntropy(None if self.weights_C is None else self.weights_C.to(device))

    def _weighted(self, loss_B: Tensor, y_B: Tensor) -> Tensor:
        return loss_B if self.weights_C is None else loss_B * self.weights_C[y_B].to(loss_B)


@dataclass(frozen=True)
class LossOfRows:
    """A loss that is a function of output and target of each row, ``(B,)``; knows no smoothing."""

    function: RowFunction

    def of_rows(self, output: Tensor, y_B: Tensor) -> Tensor:
        """Return each row's loss: ``(B,)``."""
        return _one_each(self.function(output, y_B), len(y_B), "loss")

    def of_batch(self, output: Tensor, y_B: Tensor, smoothing: Tensor | None) -> Tensor:
        """Return the mean loss of a batch."""
        return self.of_rows(output, y_B).mean()

    def of_training_rows(self, output: Tensor, y_B: Tensor, smoothing: Tensor | None) -> Tensor:
        """Return each row's loss: ``(B,)``."""
        return self.of_rows(output, y_B)

    def to(self, device: torch.device) -> "LossOfRows":
        """Return itself: it holds no tensors."""
        return self


@dataclass(frozen=True)
class Score:
    """A score: T sums over rows, and what makes one number of them.

    ``of_rows`` returns ``(B,)`` for each of them. ``total`` takes the sums ``(T, K)`` and the
    numbers of rows ``(K,)``, and returns ``(K,)``.
    """

    name: str
    terms: int
    of_rows: Callable[[Tensor, Tensor], Sequence[Tensor]]
    total: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class RankScore:
    """A score of how rows are ranked.

    ``of_rows`` returns what each is ranked by, ``(B,)``. ``total`` takes that of all rows, their
    targets, and weights that are 0 for a row that does not count, and returns ``(K,)``; the first
    is ``(K, R)``, and the others broadcast with it.
    """

    name: str
    of_rows: RowFunction
    total: Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Objective:
    """A loss and a score."""

    loss: CrossEntropy | LossOfRows
    score: Score | RankScore

    @property
    def terms(self) -> int:
        """How many sums it measures: the loss's, and the score's."""
        return 1 + (self.score.terms if isinstance(self.score, Score) else 0)

    def to(self, device: torch.device) -> "Objective":
        """Return the same on ``device``."""
        return replace(self, loss=self.loss.to(device))

    def measure(self, output: Tensor, y_B: Tensor, weight_B: Tensor) -> Tensor:
        """Return the sums ``(T,)`` over rows of weight 1; those of weight 0 do not count.

        Where the score ranks, what each row is ranked by follows: ``(T + B,)``.
        """
        rows = [self.loss.of_rows(output, y_B)]
        if isinstance(self.score, Score):
            rows += self.score.of_rows(output, y_B)
        sums_T = torch.stack([(term_B * weight_B).sum() for term_B in rows])
        if isinstance(self.score, Score):
            return sums_T
        return torch.cat([sums_T, self.score.of_rows(output, y_B)])

    def figures(
        self,
        total_TK: Tensor,
        rows_K: Tensor,
        ranked_KR: Tensor,
        targets: Callable[[], Tensor],
        weight: Tensor,
    ) -> Tensor:
        """Return each lane's mean loss and score, ``(K, 2)``, from the sums over its rows.

        ``ranked_KR`` is what they are ranked by, R = 0 of them where nothing is. ``targets``
        returns theirs, which are ``(R,)`` for all lanes or ``(K, R)``, as their weights are.
        """
        if isinstance(self.score, Score):
            score_K = self.score.total(total_TK[1:], rows_K)
        else:
            score_K = self.score.total(ranked_KR, targets(), weight)
        return torch.stack([total_TK[0] / rows_K, score_K], dim=1)


def mean_score(name: str, function: RowFunction) -> Score:
    """Return the score that is the mean over rows of what ``function`` says of them."""
    return Score(
        name,
        1,
        lambda output, y_B: [_one_each(function(output, y_B), len(y_B), "score")],
        lambda sum_1K, rows_K: sum_1K[0] / rows_K,
    )


def classification(
    classes: int, score: ScoreName | None = None, weights_C: Tensor | None = None
) -> Objective:
    """Return cross-entropy, its classes weighted or not, and a score; by default the accuracy.

    Raises InvalidData for a score that classes do not have.
    """
    loss = CrossEntropy(weights_C)
    match score or "accuracy":
        case "accuracy":
            return Objective(loss, mean_score("accuracy", _hit))
        case "balanced_accuracy":
            return Objective(loss, _balanced_accuracy(classes))
        case "log_loss":
            return Objective(loss, mean_score("log_loss", CrossEntropy().of_rows))
        case "auroc" if classes == 2:
            return Objective(loss, RankScore("auroc", _log_odds, _auroc))
        case "auroc":
            raise InvalidData(f"task.score: auroc is for two classes, but there are {classes}")
    raise InvalidData(_wrong_score(score, "a classification", CLASSIFICATION_SCORES))


def regression(score: ScoreName | None = None, unit: float = 1.0, center: float = 0.0) -> Objective:
    """Return squared error of outputs ``(B, 1)``, and a score; by default R².

    Targets are measured in ``unit``, and so is the loss; an RMSE is told in the target's own. They
    lie about ``center``: the sums of R² would cancel if that were far from zero.
    Raises InvalidData for a score that numbers do not have.
    """
    loss = LossOfRows(_squared_error)
    match score or "r2":
        case "r2":
            return Objective(loss, Score("r2", 3, partial(_moments, center), _r2))
        case "rmse":
            return Objective(
                loss,
                Score(
                    "rmse",
                    1,
                    lambda output_B1, y_B: [_squared_error(output_B1, y_B)],
                    lambda sum_1K, rows_K: unit * (sum_1K[0] / rows_K).sqrt(),
                ),
            )
    raise InvalidData(_wrong_score(score, "a regression", REGRESSION_SCORES))


def _one_each(value_B: Tensor, rows: int, what: str) -> Tensor:
    """Return what a function of rows has returned; raise InvalidData unless it is one for each."""
    if value_B.shape != (rows,):
        raise InvalidData(
            f"{what}() must return one number for each of {rows} rows, and so the shape ({rows},), "
            f"but it has returned the shape {tuple(value_B.shape)}"
        )
    return value_B


def _hit(output_BC: Tensor, y_B: Tensor) -> Tensor:
    return output_BC.argmax(1) == y_B


def _balanced_accuracy(classes: int) -> Score:
    """Return the mean of the classes' shares of hits; a class without rows does not count."""

    def of_rows(output_BC: Tensor, y_B: Tensor) -> Sequence[Tensor]:
        member_CB = one_hot(y_B, classes).T
        return [*(member_CB * _hit(output_BC, y_B)), *member_CB]

    def total(sums: Tensor, rows_K: Tensor) -> Tensor:
        hits_CK, rows_CK = sums[:classes], sums[classes:]
        return (hits_CK / rows_CK.clamp(min=1)).sum(0) / (rows_CK > 0).sum(0)

    return Score("balanced_accuracy", 2 * classes, of_rows, total)


def _log_odds(output_B2: Tensor, y_B: Tensor) -> Tensor:
    return output_B2[:, 1] - output_B2[:, 0]


def _auroc(log_odds_KR: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """Return the chance that a row of class 1 is ranked above one of class 0, ties counting half.

    Mann and Whitney's U over the number of such pairs. Ranks are doubled, so that ties have whole
    ones and their sum is exact.
    """
    counts = (weight > 0).expand_as(log_odds_KR)
    log_odds_KR = log_odds_KR.masked_fill(~counts, torch.inf)
    ascending_KR = log_odds_KR.sort().values
    below_KR = torch.searchsorted(ascending_KR, log_odds_KR)
    not_above_KR = torch.searchsorted(ascending_KR, log_odds_KR, right=True)
    positive_KR = counts & (y == 1)
    positives_K, negatives_K = positive_KR.sum(1), (counts & (y == 0)).sum(1)
    rank_sum_K = ((below_KR + not_above_KR + 1) * positive_KR).sum(1)
    u_K = rank_sum_K - positives_K * (positives_K + 1)
    return u_K.to(log_odds_KR) / (2 * positives_K * negatives_K)


def _squared_error(output_B1: Tensor, y_B: Tensor) -> Tensor:
    return (output_B1[:, 0] - y_B).square()


def _moments(center: float, output_B1: Tensor, y_B: Tensor) -> Sequence[Tensor]:
    from_center_B = y_B - center
    return [_squared_error(output_B1, y_B), from_center_B, from_center_B.square()]


def _r2(sums_3K: Tensor, rows_K: Tensor) -> Tensor:
    error_K, sum_K, squares_K = sums_3K
    r2_K: Tensor = 1 - error_K / (squares_K - sum_K.square() / rows_K)
    return r2_K


def _wrong_score(score: str | None, what: str, known: Sequence[str]) -> str:
    return f"task.score: {what} has no {score}; known for it: {', '.join(known)}"
