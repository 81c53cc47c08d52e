"""Studies: create, find, list, pause, resume, stop, cancel, change, delete.

Every change locks the study's row first, so that two clients at once, or a scheduler that appends
meanwhile, see each other's outcome. Functions take a session and never commit.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, Literal

from sqlalchemy import Row, insert, select, text, update
from sqlalchemy.orm import Session

from regtune import events, shares, standing, tables
from regtune.database import NEWS, WORK
from regtune.errors import BudgetSpent, NotFound, StudyActive, StudyDiffers, StudyOver
from regtune.spec import StudyChange, StudySpec, changed, read_spec
from regtune.spec.training import steps_per_epoch

Verb = Literal["pause", "resume", "stop", "cancel"]


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a study's model only when it has been built.

    ``parameters`` counts its numbers. ``penalized`` names the parameters that weight decay and L1
    act on, ``spared`` the others. ``vectorized`` says that its lanes train as one batched model,
    not one after the other. ``training_rows`` are those of one member, and ``steps_per_epoch`` its
    steps through them. ``score`` names what is shown beside the loss, and ``data_hash`` is the
    content hash of the data set.
    """

    parameters: int
    penalized: Sequence[str]
    spared: Sequence[str]
    dropout_sites: Sequence[str]
    vectorized: bool
    steps_per_epoch: int
    training_rows: int
    score: str = "accuracy"
    data_hash: str | None = None


@dataclass(frozen=True)
class Born:
    """A study of some database, told from those of others by when it was created."""

    study_id: int
    created_at: datetime


@dataclass(frozen=True)
class Outline:
    """A study as it stands, as far as can be told whatever version of regtune has posted it."""

    study_id: int
    name: str
    state: str
    reason: str | None
    priority: int
    budget_trials: int
    budget_seconds: float | None
    budget_trial_epochs: int | None
    appended: int
    created_at: datetime
    finished_at: datetime | None

    @property
    def live(self) -> bool:
        """Whether it may still change by itself."""
        return self.state in tables.LIVE_STUDY_STATES


@dataclass(frozen=True)
class Study(Outline):
    """A study as it stands; ``model`` is None until a worker has built it.

    Where the study searches shapes, it is that of the one that was built first.
    """

    spec: StudySpec
    model: ModelFacts | None

    def decay_timescale_epochs(self, params: Mapping[str, Any]) -> float | None:
        """Return over how many epochs decay acts on a trial's weights, 1 / (η·λ₂·steps).

        None without decay, where it is coupled, and until a worker has built the model. Wang &
        Aitchison 2024, arXiv 2405.13698: it transfers between set-ups, where λ₂ does not.
        """
        training = self.spec.training
        decay = training.decay_of(params.get("optimizer", training.optimizer))
        if decay == "coupled" or self.model is None:
            return None
        # A trial of a study from before the learning rate could be searched does not name it.
        learning_rate = params.get("learning_rate", training.learning_rate)
        steps = self.model.steps_per_epoch
        if "batch_size" in params:
            steps = steps_per_epoch(self.model.training_rows, params["batch_size"])
        share_per_epoch = learning_rate * params["weight_decay"] * steps
        return 1 / share_per_epoch if share_per_epoch > 0 else None


def create(session: Session, spec: StudySpec, actor: str) -> tuple[Study, bool]:
    """Create a study, or find the same one; return it and whether it is new.

    Raise StudyDiffers if the name stands for something else already.
    """
    study_id = session.execute(
        text(
            "INSERT INTO public.studies (study_name) VALUES (:name)"
            " ON CONFLICT (study_name) DO NOTHING RETURNING study_id"
        ),
        {"name": spec.name},
    ).scalar()
    if study_id is None:
        return _the_same(session, spec), False
    _write_optuna_study(session, study_id, spec)
    session.execute(
        insert(tables.studies).values(
            study_id=study_id,
            name=spec.name,
            spec=spec.canonical(),
            state="active",
            priority=spec.priority,
            budget_trials=spec.budget.trials,
            budget_seconds=spec.budget.seconds,
            budget_trial_epochs=spec.budget.trial_epochs,
        )
    )
    shares.enter(session, study_id)
    _tell(session, study_id, "study_created", actor)
    return find(session, spec.name), True


def _the_same(session: Session, spec: StudySpec) -> Study:
    try:
        study = find(session, spec.name)
    except NotFound:
        raise StudyDiffers(
            f"Optuna's tables hold a study {spec.name!r} that is not regtune's; take another name"
        ) from None
    if study.spec.canonical() != spec.canonical():
        raise StudyDiffers(f"a study {spec.name!r} exists already, with another spec")
    return study


def _write_optuna_study(session: Session, study_id: int, spec: StudySpec) -> None:
    session.execute(
        text(
            "INSERT INTO public.study_directions (study_id, direction, objective)"
            " VALUES (:study_id, 'MINIMIZE', 0)"
        ),
        {"study_id": study_id},
    )
    session.execute(
        text(
            "INSERT INTO public.study_user_attributes (study_id, key, value_json)"
            " VALUES (:study_id, 'regtune', :spec)"
        ),
        {"study_id": study_id, "spec": spec.model_dump_json()},
    )


def find(session: Session, name: str) -> Study:
    """Return the study of a name; raise NotFound."""
    row = session.execute(select(tables.studies).where(tables.studies.c.name == name)).one_or_none()
    if row is None:
        raise NotFound(f"there is no study {name!r}")
    return _study(row)


def by_id(session: Session, study_id: int) -> Study:
    """Return the study of an id; raise NotFound."""
    row = session.execute(
        select(tables.studies).where(tables.studies.c.study_id == study_id)
    ).one_or_none()
    if row is None:
        raise NotFound("the study has been deleted")
    return _study(row)


def over(session: Session, candidates: Collection[Born]) -> set[Born]:
    """Return those that are this database's own, and are over or have been deleted."""
    return {one for one in candidates if session.execute(_IS_OVER, asdict(one)).scalar()}


def trials_over(session: Session, study: Born, trial_ids: Collection[int]) -> set[int]:
    """Return those of a study's trials that have ended; none if it is another database's."""
    found = session.execute(_TRIALS_OVER, {**asdict(study), "trial_ids": list(trial_ids)})
    return set(found.scalars())


def room(session: Session, study: Study) -> int:
    """Return how many more trials a study may have, by trials and by trial-epochs.

    An open trial may yet take all of its ``max_epochs``, so that much is promised to it.
    """
    by_trials = study.budget_trials - study.appended
    if study.budget_trial_epochs is None:
        return by_trials
    max_epochs = study.spec.training.max_epochs
    promised = standing.of(session, study.study_id).promised_epochs(max_epochs)
    return min(by_trials, (study.budget_trial_epochs - promised) // max_epochs)


def describe_model(session: Session, study_id: int, facts: ModelFacts) -> None:
    """Write down what a worker found out about a study's model; the first one's word stands.

    It locks the study's row, so it comes before whatever locks trials in the same transaction.
    """
    session.execute(
        text(
            "UPDATE regtune.studies SET model = cast(:facts AS jsonb)"
            " WHERE study_id = :study_id AND model IS NULL"
        ),
        {"study_id": study_id, "facts": json.dumps(asdict(facts))},
    )


def live_ids(session: Session) -> Sequence[int]:
    """Return the ids of the studies that may still change by themselves, oldest first."""
    return session.scalars(
        select(tables.studies.c.study_id)
        .where(tables.studies.c.state.in_(tables.LIVE_STUDY_STATES))
        .order_by(tables.studies.c.study_id)
    ).all()


def page(
    session: Session, *, state: str | None, before: int | None, limit: int
) -> Sequence[Outline]:
    """Return up to ``limit`` studies, newest first, of a state and older than id ``before``."""
    told = [tables.studies.c[name] for name in Outline.__dataclass_fields__]
    query = select(*told).order_by(tables.studies.c.study_id.desc()).limit(limit)
    if state is not None:
        query = query.where(tables.studies.c.state == state)
    if before is not None:
        query = query.where(tables.studies.c.study_id < before)
    return [Outline(**row._mapping) for row in session.execute(query)]


def lock(session: Session, study_id: int) -> Study:
    """Lock a study's row until the transaction ends; return it; raise NotFound."""
    # FOR NO KEY UPDATE: a transaction that updates a trial twice, as a worker's does that records
    # and finishes it, has its foreign key checked, which takes KEY SHARE of the study after the
    # trial. Against FOR UPDATE that would be a deadlock.
    row = session.execute(
        select(tables.studies)
        .where(tables.studies.c.study_id == study_id)
        .with_for_update(key_share=True)
    ).one_or_none()
    if row is None:
        raise NotFound("the study has been deleted")
    return _study(row)


def act(session: Session, name: str, verb: Verb, actor: str) -> Study:
    """Pause, resume, stop or cancel a study; return how it stands then.

    Doing the same again changes nothing. Raise StudyOver for what an ended study cannot do.

    - pause: start no more trials, keep the budget; running ones finish.
    - resume: go on.
    - stop: let running trials finish, start no more.
    - cancel: stop them now; their workers' leases end with this transaction.
    """
    study = lock(session, find(session, name).study_id)
    if _is_done_already(study, verb):
        return study
    if not study.live:
        raise StudyOver(f"the study is {study.state}; {verb} comes too late")
    if verb in ("pause", "resume"):
        if study.state == "stopping":
            raise StudyOver(f"the study is stopping; {verb} comes too late")
        _set_state(session, study.study_id, "paused" if verb == "pause" else "active", None)
        if verb == "resume":
            shares.enter(session, study.study_id)
    _tell(session, study.study_id, f"study_{verb}", actor)
    if verb == "stop":
        _set_state(session, study.study_id, "stopping", "stopped by request")
        withdraw_waiting(session, study.study_id, "the study was stopped", actor)
        if not _has_running(session, study.study_id):
            end(session, study.study_id, "stopped", "stopped by request", actor)
    elif verb == "cancel":
        cancel_open(session, study.study_id, "the study was cancelled", actor)
        end(session, study.study_id, "cancelled", "cancelled by request", actor)
    return by_id(session, study.study_id)


def _is_done_already(study: Study, verb: Verb) -> bool:
    return (
        study.state
        in {
            "pause": ("paused",),
            "resume": ("active",),
            "stop": ("stopping", "stopped"),
            "cancel": ("cancelled",),
        }[verb]
    )


def change(session: Session, name: str, change: StudyChange, actor: str) -> Study:
    """Change budget and priority of a live study; return how it stands then.

    The spec stays what was posted, so that posting it again finds the study. A change that changes
    nothing is none. Raise StudyOver for a study that adds no more trials, BudgetSpent for a limit
    below what is used up or promised to open trials, InvalidSpec for what the spec forbids.
    """
    study = lock(session, find(session, name).study_id)
    old = _limits(study)
    asked = change.given
    new = {**old, **asked.get("budget", {}), "priority": asked.get("priority", study.priority)}
    if new == old:
        return study
    if study.state not in ("active", "paused"):
        raise StudyOver(f"the study is {study.state}; a change comes too late")
    changed(study.spec, {"budget": {key: new[key] for key in _BUDGET}, "priority": new["priority"]})
    _check_not_spent(session, study, old, new)
    session.execute(
        update(tables.studies)
        .where(tables.studies.c.study_id == study.study_id)
        .values(priority=new["priority"], **{f"budget_{key}": new[key] for key in _BUDGET})
    )
    difference = {key: {"from": old[key], "to": new[key]} for key in old if old[key] != new[key]}
    _tell(session, study.study_id, "study_changed", actor, difference)
    return by_id(session, study.study_id)


_BUDGET = ("trials", "seconds", "trial_epochs")


def _limits(study: Study) -> dict[str, Any]:
    return {
        "trials": study.budget_trials,
        "seconds": study.budget_seconds,
        "trial_epochs": study.budget_trial_epochs,
        "priority": study.priority,
    }


def _check_not_spent(
    session: Session, study: Study, old: Mapping[str, Any], new: Mapping[str, Any]
) -> None:
    """Raise BudgetSpent for a limit that is new and below what can be kept."""
    if new["trials"] < study.appended:
        raise BudgetSpent(
            f"budget.trials cannot be {new['trials']}: there are {study.appended} trials already; "
            "to start no more, stop the study"
        )
    if new["seconds"] not in (None, old["seconds"]):
        spent = standing.of(session, study.study_id).seconds_spent or 0.0
        if new["seconds"] <= spent:
            raise BudgetSpent(
                f"budget.seconds cannot be {new['seconds']:g}: {spent:.1f} seconds have passed "
                "since the first lease; to start no more trials, stop the study"
            )
    if new["trial_epochs"] not in (None, old["trial_epochs"]):
        stands = standing.of(session, study.study_id)
        promised = stands.promised_epochs(study.spec.training.max_epochs)
        if new["trial_epochs"] < promised:
            raise BudgetSpent(
                f"budget.trial_epochs cannot be {new['trial_epochs']}: with what open trials may "
                f"still train, {promised} are used up; to start no more trials, stop the study"
            )


def end(session: Session, study_id: int, state: str, reason: str, actor: str) -> None:
    """Let a study end: completed, stopped, cancelled or failed, and why."""
    _set_state(session, study_id, state, reason)
    session.execute(
        update(tables.studies)
        .where(tables.studies.c.study_id == study_id)
        .values(finished_at=text("now()"))
    )
    events.record(session, study_id, "study_ended", actor, detail={"state": state, "why": reason})
    events.notify(session, NEWS, study_id)


def fail(session: Session, study_id: int, reason: str, actor: str) -> None:
    """Let a live study end as failed, open trials and all; one that is over stays as it is."""
    if lock(session, study_id).live:
        cancel_open(session, study_id, reason, actor)
        end(session, study_id, "failed", reason, actor)


def withdraw_waiting(session: Session, study_id: int, reason: str, actor: str) -> int:
    """Cancel the trials that no worker has leased; return how many."""
    return _cancel_trials(session, study_id, ("waiting",), reason, actor)


def cancel_open(session: Session, study_id: int, reason: str, actor: str) -> int:
    """Cancel the trials that have not ended, running ones too; return how many."""
    return _cancel_trials(session, study_id, ("waiting", "running"), reason, actor)


def delete(session: Session, name: str, actor: str) -> None:
    """Delete a study and its trials; what was done to the study itself stays in its history.

    Deleting it again changes nothing. Raise StudyActive while it is not over, NotFound for a name
    that no study has ever had.
    """
    try:
        study = lock(session, find(session, name).study_id)
    except NotFound:
        if events.was_deleted(session, name):
            return
        raise
    if study.live:
        raise StudyActive(f"the study is {study.state}; stop or cancel it before deleting it")
    for statement in _DELETIONS:
        session.execute(text(statement), {"study_id": study.study_id})
    events.record_deletion(session, study.study_id, name, actor)
    events.notify(session, NEWS, study.study_id)


@lru_cache(maxsize=1024)
def _spec(text: str) -> StudySpec:
    """Return a spec as it was stored; a scheduler looks at the same one many times a second."""
    return read_spec(json.loads(text))


def _study(row: Row[Any]) -> Study:
    spec = _spec(json.dumps(row.spec))
    model = ModelFacts(**row.model) if row.model else None
    return Study(**{**row._mapping, "spec": spec, "model": model})


def _set_state(session: Session, study_id: int, state: str, reason: str | None) -> None:
    session.execute(
        update(tables.studies)
        .where(tables.studies.c.study_id == study_id)
        .values(state=state, reason=reason)
    )


def _has_running(session: Session, study_id: int) -> bool:
    return bool(
        session.execute(
            text(
                "SELECT EXISTS (SELECT FROM regtune.trials"
                " WHERE study_id = :study_id AND state = 'running')"
            ),
            {"study_id": study_id},
        ).scalar()
    )


def _tell(
    session: Session,
    study_id: int,
    kind: str,
    actor: str,
    detail: Mapping[str, Any] | None = None,
) -> None:
    events.record(session, study_id, kind, actor, detail=detail)
    events.notify(session, NEWS, study_id)
    events.notify(session, WORK, study_id)


def _cancel_trials(
    session: Session, study_id: int, states: tuple[str, ...], reason: str, actor: str
) -> int:
    """Cancel trials in these states; a running one loses its lease, so its worker drops it.

    Optuna has no such state; its closest one is FAIL.
    """
    return len(
        session.execute(
            _CANCEL,
            {"study_id": study_id, "states": list(states), "reason": reason, "actor": actor},
        ).all()
    )


# What was done to a study stays on record when it is deleted, its making at its very moment too.
_IS_OVER = text(f"""
SELECT EXISTS (SELECT FROM regtune.studies
               WHERE study_id = :study_id AND created_at = :created_at
                 AND NOT {tables.IS_LIVE})
    OR (EXISTS (SELECT FROM regtune.events WHERE study_id = :study_id AND kind = 'study_deleted')
        AND EXISTS (SELECT FROM regtune.events WHERE study_id = :study_id
                    AND kind = 'study_created' AND at = :created_at))
""")

_TRIALS_OVER = text("""
SELECT trial_id FROM regtune.trials JOIN regtune.studies s USING (study_id)
WHERE study_id = :study_id AND s.created_at = :created_at AND trial_id = ANY(:trial_ids)
  AND trials.state NOT IN ('waiting', 'running')
""")

_CANCEL = text("""
WITH picked AS (
    SELECT trial_id, epochs, started_at, CASE state WHEN 'running' THEN share * greatest(
        0, extract(epoch FROM now() - leased_at)::float) ELSE 0 END AS seconds
    FROM regtune.trials
    WHERE study_id = :study_id AND state = ANY(:states)
    ORDER BY trial_id FOR UPDATE
), cancelled AS (
    UPDATE regtune.trials t
    SET state = 'cancelled', reason = :reason, token = NULL, lease_expires_at = NULL,
        stop_request = NULL,
        worker_seconds = t.worker_seconds + coalesce(picked.seconds, 0),
        finished_at = now()
    FROM picked WHERE t.trial_id = picked.trial_id
    RETURNING t.trial_id, t.number
), charged AS (
    INSERT INTO regtune.charges (study_id, seconds, complete, pruned, failed, cancelled, epochs,
                                 started_at)
    SELECT :study_id, sum(coalesce(seconds, 0)), 0, 0, 0, count(*), sum(epochs), min(started_at)
    FROM picked HAVING count(*) > 0
), public_trials AS (
    UPDATE public.trials o
    SET state = 'FAIL', datetime_complete = now() AT TIME ZONE 'utc',
        -- Optuna refuses an ended trial that never started.
        datetime_start = coalesce(o.datetime_start, now() AT TIME ZONE 'utc')
    FROM cancelled WHERE o.trial_id = cancelled.trial_id
), attributes AS (
    INSERT INTO public.trial_user_attributes (trial_id, key, value_json)
    SELECT trial_id, 'reason', to_json(cast(:reason AS text)) FROM cancelled
), told AS (
    INSERT INTO regtune.events (study_id, number, kind, actor, detail)
    SELECT :study_id, number, 'trial_cancelled', :actor,
           json_build_object('reason', cast(:reason AS text))
    FROM cancelled ORDER BY number
)
SELECT trial_id FROM cancelled
""")

_OF_TRIALS = "(SELECT trial_id FROM public.trials WHERE study_id = :study_id)"

_DELETIONS = (
    f"DELETE FROM regtune.epochs WHERE trial_id IN {_OF_TRIALS}",
    "DELETE FROM regtune.trials WHERE study_id = :study_id",
    "DELETE FROM regtune.shares WHERE study_id = :study_id",  # before its charges, as settled
    "DELETE FROM regtune.charges WHERE study_id = :study_id",
    "DELETE FROM regtune.shapes WHERE study_id = :study_id",
    "DELETE FROM regtune.studies WHERE study_id = :study_id",
    "DELETE FROM regtune.events WHERE study_id = :study_id AND number IS NOT NULL",
    *(
        f"DELETE FROM public.{table} WHERE trial_id IN {_OF_TRIALS}"
        for table in (
            "trial_heartbeats",
            "trial_intermediate_values",
            "trial_values",
            "trial_params",
            "trial_user_attributes",
            "trial_system_attributes",
        )
    ),
    *(
        f"DELETE FROM public.{table} WHERE study_id = :study_id"
        for table in (
            "trials",
            "study_user_attributes",
            "study_system_attributes",
            "study_directions",
            "studies",
        )
    ),
)
