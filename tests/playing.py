"""Studies of Optuna, played step by step as hypothesis thinks them up."""

from collections.abc import Iterable, Iterator

import numpy as np
import optuna
from optuna.trial import TrialState

Step = tuple[int, float | str]
"""A lane, and what happens to its trial: it reports a loss, or it ends."""

ENDS = {"prune": TrialState.PRUNED, "fail": TrialState.FAIL}


def played(steps: Iterable[Step]) -> Iterator[optuna.Study]:
    """Yield a study after each of its steps. A lane asks for a trial when it has none."""
    study = optuna.create_study()
    running: dict[int, optuna.Trial] = {}
    for lane, event in steps:
        if lane not in running:
            running[lane] = study.ask()
        trial = running[lane]
        reported = study.trials[trial.number].intermediate_values
        if event == "complete":
            study.tell(running.pop(lane), min(filter(np.isfinite, reported.values()), default=1.0))
        elif event in ENDS:
            study.tell(running.pop(lane), state=ENDS[str(event)])
        else:
            trial.report(float(event), len(reported) + 1)
        yield study


def running(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """The trials of a study that may be pruned."""
    return study.get_trials(states=[TrialState.RUNNING])
