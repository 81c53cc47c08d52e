"""Who stops trials early. Reference points are never pruned: the answer is measured by them."""

import optuna
from optuna.pruners import BasePruner

from regtune.spec import StudySpec
from service.scheduler.extrapolation import ExtrapolationPruner
from service.scheduler.median import MedianPruner


def keeps_notes(spec: StudySpec) -> bool:
    """Say whether a pruner compares trials by what it has noted on them at each epoch.

    Such a one must be asked about every epoch, also when it is too late to stop the trial.
    """
    return spec.pruner.name in ("asha", "hyperband")


def make_pruner(spec: StudySpec) -> BasePruner:
    """Return the pruner of a study; none acts before ``spec.first_prunable_epoch``."""
    first = spec.first_prunable_epoch
    match spec.pruner.name:
        case "extrapolation":
            return ExtrapolationPruner(first, spec.training.max_epochs)
        case "median":
            return MedianPruner(spec.pruner.startup_trials, first)
        case "asha":
            return optuna.pruners.SuccessiveHalvingPruner(
                min_resource=first, reduction_factor=spec.pruner.reduction_factor
            )
        case "hyperband":
            return optuna.pruners.HyperbandPruner(
                min_resource=first,
                max_resource=spec.training.max_epochs,
                reduction_factor=spec.pruner.reduction_factor,
            )
    return optuna.pruners.NopPruner()
