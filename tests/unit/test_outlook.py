import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial

from regtune.spec import StudySpec
from service.scheduler.extrapolation import extrapolate
from service.scheduler.mirror import Mirror
from service.scheduler.outlook import EXPECTED_SHARE, OutlookStorage
from service.scheduler.suggestion import distributions, make_sampler
from tests.builders import spec

EPOCHS = 16
CURVES = {
    20: [1.0, 0.5, 0.3, 0.2, 0.15, 0.12],
    21: [1.0, 0.9, 0.8, 0.75, 0.72, 0.70],
    22: [1.0, 0.2],
}
"""Of running trials by number; the last one's is too short to tell."""


def study(sampler: str = "tpe") -> StudySpec:
    return spec(
        budget={"trials": 60}, training={"max_epochs": EPOCHS}, sampler=sampler, pruner="median"
    )


def begun(sampler: str = "tpe", *, curves: bool = True) -> tuple[Mirror, list[FrozenTrial]]:
    """Return a mirror with twenty trials that have ended and three that run, and its trials."""
    mirror = Mirror(study(sampler))
    trials = []
    for number in range(20 + len(CURVES)):
        made = mirror.suggest(1)[0]
        value, curve = 1.0 + abs(made.suggested["dropout"] - 0.3), dict[int, float]()
        if number < 20:
            mirror.tell(number, TrialState.COMPLETE, value)
        elif curves:
            curve = dict(enumerate(CURVES[number], 1))
            mirror.report(number, list(curve.items()))
        trials.append(
            create_trial(
                state=TrialState.COMPLETE if number < 20 else TrialState.RUNNING,
                value=value if number < 20 else None,
                params=dict(made.suggested),
                distributions=dict(made.distributions),
                system_attrs=dict(made.system_attrs),
                intermediate_values=curve,
            )
        )
    return mirror, trials


def expected(curve: list[float]) -> float:
    prospect = extrapolate(dict(enumerate(curve, 1)), EPOCHS, noise_margin=0.0)
    assert prospect is not None
    return min(curve) - EXPECTED_SHARE * (min(curve) - prospect)


def stored(curves: dict[int, list[float]]) -> tuple[OutlookStorage, int, list[FrozenTrial]]:
    storage = OutlookStorage(EPOCHS)
    plain = optuna.create_study(storage=storage)
    plain.add_trial(create_trial(value=0.4))
    for curve in curves.values():
        trial = plain.ask()
        for epoch, loss in enumerate(curve, 1):
            trial.report(loss, epoch)
    study_id = storage.get_study_id_from_name(plain.study_name)
    return storage, study_id, storage.get_all_trials(study_id)


def test_running_trials_are_shown_as_they_may_end_where_their_curves_tell() -> None:
    storage, study_id, before = stored(CURVES)
    with storage.looking_ahead():
        seen = storage.get_all_trials(study_id, deepcopy=False)
        complete = storage.get_all_trials(study_id, states=(TrialState.COMPLETE,))
    done, running = TrialState.COMPLETE, TrialState.RUNNING
    assert [trial.state for trial in seen] == [done, done, done, running]
    assert [trial.value for trial in seen[1:3]] == [expected(CURVES[20]), expected(CURVES[21])]
    assert complete == seen[:3]
    assert storage.get_all_trials(study_id) == before


def test_a_trial_is_seen_anew_after_each_of_its_epochs_and_not_after_its_end() -> None:
    storage, study_id, _ = stored({20: CURVES[20]})
    trial_id = storage.get_trial_id_from_study_id_trial_number(study_id, 1)
    values = []
    for epoch, loss in ((7, 0.11), (8, 0.02)):
        storage.set_trial_intermediate_value(trial_id, epoch, loss)
        with storage.looking_ahead():
            values.append(storage.get_all_trials(study_id)[1].value)
    longer = [*CURVES[20], 0.11]
    assert values == [expected(longer), expected([*longer, 0.02])]
    storage.set_trial_state_values(trial_id, TrialState.PRUNED)
    with storage.looking_ahead():
        assert storage.get_all_trials(study_id)[1].state is TrialState.PRUNED


def test_tpe_suggests_what_it_would_if_running_trials_had_ended_as_expected() -> None:
    mirror, trials = begun()
    plain = optuna.create_study()
    for number, trial in enumerate(trials):
        curve = CURVES.get(number, [])
        ended = len(curve) > 2
        plain.add_trial(
            create_trial(
                state=TrialState.COMPLETE if ended else trial.state,
                value=expected(curve) if ended else trial.value,
                params=trial.params,
                distributions=trial.distributions,
            )
        )
    plain.sampler = make_sampler(study(), 23)
    assert mirror.suggest(1)[0].suggested == plain.ask(distributions(study())).params


@pytest.mark.parametrize(("sampler", "looks"), [("tpe", True), ("cmaes", False)])
def test_cma_es_which_counts_what_has_ended_looks_at_no_running_trial(
    sampler: str, looks: bool
) -> None:
    seen, unseen = (begun(sampler, curves=curves)[0].suggest(1)[0] for curves in (True, False))
    assert (seen.suggested != unseen.suggested) is looks


def test_a_mirror_that_was_rebuilt_suggests_the_same() -> None:
    (mirror, trials), rebuilt = begun(), Mirror(study())
    rebuilt.restore(trials)
    assert rebuilt.suggest(2) == mirror.suggest(2)


def test_a_verdict_falls_on_what_has_been_reached_and_not_on_what_is_expected() -> None:
    """The pruner looks once a suggestion has been made."""
    mirror = Mirror(spec(training={"max_epochs": EPOCHS}, budget={"trials": 60}))
    mirror.suggest(4)
    leading = [1.0, 0.6, 0.4, 0.2]
    assert expected(leading) < 0.15
    mirror.report(2, [*enumerate(leading, 1)])
    mirror.suggest(1)
    assert mirror.report(3, [*enumerate([0.15] * 4, 1)]) is None
    assert mirror.report(4, [*enumerate([0.16] * 4, 1)]) == 4
