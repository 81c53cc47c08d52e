from math import nan

import optuna
from hypothesis import given
from hypothesis import strategies as st

from service.scheduler.median import MedianPruner
from tests.playing import Step, played, running

STARTUP, FIRST = 2, 2

losses = st.one_of(*[st.floats(0.1, 0.9)] * 5, st.just(nan))
ends = st.sampled_from(["complete", "prune", "fail"])


@given(st.lists(st.tuples(st.integers(0, 2), st.one_of(losses, losses, losses, ends)), max_size=60))
def test_it_prunes_as_optunas_does(steps: list[Step]) -> None:
    """Asked about every running trial after every step of a study of three lanes."""
    ours = MedianPruner(STARTUP, FIRST)
    theirs = optuna.pruners.MedianPruner(n_startup_trials=STARTUP, n_warmup_steps=FIRST)
    for study in played(steps):
        for trial in running(study):
            assert ours.prune(study, trial) == theirs.prune(study, trial)


def test_trials_that_had_ended_before_it_was_first_asked_count() -> None:
    study = optuna.create_study()
    for loss in (0.1, 0.2, 0.3):
        ended = optuna.create_trial(value=loss, intermediate_values={FIRST: loss})
        study.add_trial(ended)
    worse, better = study.ask(), study.ask()
    worse.report(0.25, FIRST)
    better.report(0.15, FIRST)
    pruner = MedianPruner(STARTUP, FIRST)
    assert [pruner.prune(study, study.trials[n]) for n in (3, 4)] == [True, False]


@given(st.lists(losses, min_size=20, max_size=40), st.lists(losses, max_size=3))
def test_many_that_come_at_once_are_put_in_order_as_few_are(
    many: list[float], few: list[float]
) -> None:
    """As when a replica takes over a study of very many trials."""
    study = optuna.create_study()
    pruner, theirs = (
        MedianPruner(STARTUP, FIRST),
        optuna.pruners.MedianPruner(n_startup_trials=STARTUP, n_warmup_steps=FIRST),
    )
    for some in (many, few):
        for loss in some:
            study.add_trial(optuna.trial.create_trial(value=0.5, intermediate_values={FIRST: loss}))
        asked = study.ask()
        asked.report(0.5, FIRST)
        trial = study.trials[asked.number]
        assert pruner.prune(study, trial) == theirs.prune(study, trial)
