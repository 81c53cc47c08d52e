"""Studies: create, find, list, pause, resume, stop, cancel, delete.

Every change locks the study's row first, so that two clients at once, or a scheduler that appends
meanwhile, see each other's outcome. Functions take a session and never commit.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import Row, insert, select, text, update
from sqlalchemy.orm import Session

from regtune import events, tables
from regtune.database import NEWS, WORK
from regtune.errors import NotFound, StudyActive, StudyDiffers, StudyOver
from regtune.spec import StudySpec

Verb = Literal["pause", "resume", "stop", "cancel"]


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a study's model only when it has been built.

    ``parameters`` counts its numbers. ``penalized`` names the parameters that weight decay and L1
    act on, ``spared`` the others. ``vectorized`` says that its lanes train as one batched model,
    not one after the other. ``training_rows`` are those of one member, and ``steps_per_epoch`` its
    steps through them.
    """

    parameters: int
    penalized: Sequence[str]
    spared: Sequence[str]
    dropout_sites: Sequence[str]
    vectorized: bool
    steps_per_epoch: int
    training_rows: int


@dataclass(frozen=True)
class Study:
    """A study as it stands; ``model`` is None until a worker has built it."""

    study_id: int
    name: str
    spec: StudySpec
    model: ModelFacts | None
    state: str
    reason: str | None
    priority: int
    budget_trials: int
    budget_seconds: float | None
    appended: int
    created_at: datetime
    finished_at: datetime | None

    @property
    def live(self) -> bool:
        """Whether it may still change by itself."""
        return self.state in tables.LIVE_STUDY_STATES

    def decay_timescale_epochs(self, params: Mapping[str, float]) -> float | None:
        """Return over how many epochs AdamW's decay acts on a trial's weights, 1 / (η·λ₂·steps).

        None without decay, in other optimizers, and until a worker has built the model. Wang &
        Aitchison 2024, arXiv 2405.13698: it transfers between set-ups, where λ₂ does not.
        """
        if self.spec.training.optimizer != "adamw" or self.model is None:
            return None
        # A trial of a study from before the learning rate could be searched does not name it.
        learning_rate = params.get("learning_rate", self.spec.training.learning_rate)
        share_per_epoch = learning_rate * params["weight_decay"] * self.model.steps_per_epoch
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
        )
    )
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


def has_more(session: Session, study_id: int) -> bool:
    """Say whether a study has trials that no worker has begun, or may still get some."""
    return bool(session.execute(text(_HAS_MORE), {"study_id": study_id}).scalar())


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


def page(session: Session, *, state: str | None, before: int | None, limit: int) -> Sequence[Study]:
    """Return up to ``limit`` studies, newest first, of a state and older than id ``before``."""
    query = select(tables.studies).order_by(tables.studies.c.study_id.desc()).limit(limit)
    if state is not None:
        query = query.where(tables.studies.c.state == state)
    if before is not None:
        query = query.where(tables.studies.c.study_id < before)
    return [_study(row) for row in session.execute(query)]


def lock(session: Session, study_id: int) -> Study:
    """Lock a study's row until the transaction ends; return it; raise NotFound."""
    row = session.execute(
        select(tables.studies).where(tables.studies.c.study_id == study_id).with_for_update()
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
    elif verb == "stop":
        withdraw_waiting(session, study.study_id, "the study was stopped")
        _set_state(session, study.study_id, "stopping", "stopped by request")
        if not _has_running(session, study.study_id):
            end(session, study.study_id, "stopped", "stopped by request", actor)
    else:
        cancel_open(session, study.study_id, "the study was cancelled")
        end(session, study.study_id, "cancelled", "cancelled by request", actor)
    _tell(session, study.study_id, f"study_{verb}", actor)
    return find(session, name)


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


def withdraw_waiting(session: Session, study_id: int, reason: str) -> int:
    """Cancel the trials that no worker has leased; return how many."""
    return _cancel_trials(session, study_id, ("waiting",), reason)


def cancel_open(session: Session, study_id: int, reason: str) -> int:
    """Cancel the trials that have not ended, running ones too; return how many."""
    return _cancel_trials(session, study_id, ("waiting", "running"), reason)


def delete(session: Session, name: str) -> None:
    """Delete a study and all its records; raise StudyActive while it is not over."""
    study = lock(session, find(session, name).study_id)
    if study.live:
        raise StudyActive(f"the study is {study.state}; stop or cancel it before deleting it")
    for statement in _DELETIONS:
        session.execute(text(statement), {"study_id": study.study_id})


def _study(row: Row[Any]) -> Study:
    spec = StudySpec.model_validate(row.spec)
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


def _tell(session: Session, study_id: int, kind: str, actor: str) -> None:
    events.record(session, study_id, kind, actor)
    events.notify(session, NEWS, study_id)
    events.notify(session, WORK, study_id)


def _cancel_trials(session: Session, study_id: int, states: tuple[str, ...], reason: str) -> int:
    """Cancel trials in these states; a running one loses its lease, so its worker drops it.

    Optuna has no such state; its closest one is FAIL.
    """
    return len(
        session.execute(
            text(_CANCEL), {"study_id": study_id, "states": list(states), "reason": reason}
        ).all()
    )


_HAS_MORE = """
SELECT s.state = 'active' AND (s.appended < s.budget_trials OR EXISTS (
    SELECT FROM regtune.trials t WHERE t.study_id = s.study_id AND t.state = 'waiting'))
FROM regtune.studies s WHERE s.study_id = :study_id
"""

_CANCEL = """
WITH picked AS (
    SELECT trial_id FROM regtune.trials
    WHERE study_id = :study_id AND state = ANY(:states)
    ORDER BY trial_id FOR UPDATE
), cancelled AS (
    UPDATE regtune.trials t
    SET state = 'cancelled', reason = :reason, token = NULL, lease_expires_at = NULL,
        finished_at = now()
    FROM picked WHERE t.trial_id = picked.trial_id
    RETURNING t.trial_id, t.number
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
    SELECT :study_id, number, 'trial_cancelled', 'service',
           json_build_object('reason', cast(:reason AS text))
    FROM cancelled
)
SELECT trial_id FROM cancelled
"""

_OF_TRIALS = "(SELECT trial_id FROM public.trials WHERE study_id = :study_id)"

_DELETIONS = (
    f"DELETE FROM regtune.epochs WHERE trial_id IN {_OF_TRIALS}",
    "DELETE FROM regtune.trials WHERE study_id = :study_id",
    "DELETE FROM regtune.studies WHERE study_id = :study_id",
    "DELETE FROM regtune.events WHERE study_id = :study_id",
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
