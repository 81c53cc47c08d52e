"""Studies over REST: post, list, look at, pause, resume, stop, cancel, change, delete."""

from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.orm import Session

from regtune import shapes, standing, studies
from regtune.spec import StudyChange, StudySpec, read_shape
from regtune.standing import Standing
from regtune.studies import Outline, Study, Verb
from service import admission, cursors, records
from service.bodies import (
    JSON_TYPES,
    MERGE_PATCH,
    YAML_TYPES,
    parse_change_of_study,
    parse_study,
)
from service.documents import Document, Measure, Params, StudyState, TrialResult
from service.edge import Actor, Body, Context, InContext, InTransaction, StudyName

router = APIRouter(prefix="/v1/studies", tags=["studies"])

_SPEC_BODY = {
    "requestBody": {
        "required": True,
        "description": "The study, as JSON or YAML.",
        "content": {
            media_type: {"schema": {"$ref": "#/components/schemas/StudySpec"}}
            for media_type in JSON_TYPES + YAML_TYPES
        },
    }
}


def _schema_of_change() -> dict[str, Any]:
    """Return the schema of a change in one piece: nothing else of the API refers to its parts."""
    schema = StudyChange.model_json_schema()
    schema["properties"]["budget"] |= schema.pop("$defs")["BudgetChange"]
    del schema["properties"]["budget"]["$ref"]
    return schema


_CHANGE_BODY = {
    "requestBody": {
        "required": True,
        "description": "What is to change, as JSON, YAML or a JSON merge patch (RFC 7396).",
        "content": {
            media_type: {"schema": _schema_of_change()}
            for media_type in (*JSON_TYPES, MERGE_PATCH, *YAML_TYPES)
        },
    }
}


class Counts(Document):
    """How many trials are in which state."""

    waiting: int = Field(description="For a worker to train them.", examples=[8])
    running: int = Field(description="Being trained.", examples=[16])
    complete: int = Field(description="Trained to their end.", examples=[14])
    pruned: int = Field(description="Stopped early, or diverged.", examples=[1])
    failed: int = Field(description="Ended by an error.", examples=[0])
    cancelled: int = Field(description="Ended by request.", examples=[0])


class ModelDetail(Document):
    """A study's model, as the first worker that built it found it."""

    parameters: int = Field(description="How many numbers it learns.", examples=[9_738])
    penalized: list[str] = Field(
        description="The parameters that weight decay and L1 act on.",
        examples=[["layers.0.weight", "layers.4.weight"]],
    )
    spared: list[str] = Field(
        description="The parameters that they leave alone.",
        examples=[["layers.0.bias", "layers.1.weight", "layers.1.bias", "layers.4.bias"]],
    )
    dropout_sites: list[str] = Field(
        description="The places at which dropout acts.", examples=[["layers.3"]]
    )
    vectorized: bool = Field(
        description="Whether trials train as one batched model, or one after the other.",
        examples=[True],
    )
    steps_per_epoch: int = Field(description="Steps in one epoch of a trial.", examples=[36])
    training_rows: int = Field(
        description="Rows that a trial is trained on; of one member, where it has several.",
        examples=[1_149],
    )
    score: str = Field(
        description="What validation and test score are; of all but log_loss and rmse, more is "
        "better. `own` is the task's, which alone knows.",
        examples=["accuracy"],
    )
    data_hash: str | None = Field(
        description="Hash of the data set's rows. A worker whose rows differ trains no trial of "
        "the study. Null for a study from before it was kept.",
        examples=["sha256:9f2c41d7"],
    )


class ShapeDetail(Document):
    """One of the shapes that a study searches."""

    params: Params = Field(
        description="What makes it: optimizer, batch size and settings of the model, as far as "
        "they are searched.",
        examples=[{"batch_size": 64, "model.hidden": [256]}],
    )
    model: ModelDetail = Field(description="Its model, as the first worker that built it found it.")


class StudySummary(Document):
    """A study in a list."""

    name: str = Field(description="Its unique name.", examples=["digits"])
    state: StudyState = Field(
        description="active, paused and stopping studies may still change.", examples=["active"]
    )
    reason: str | None = Field(
        description="Why it is stopping or has ended.", examples=["all 40 trials have ended"]
    )
    created_at: datetime = Field(
        description="When it was posted.", examples=["2026-03-01T12:00:00.000000Z"]
    )
    finished_at: datetime | None = Field(
        description="When it ended.", examples=["2026-03-01T12:00:41.250000Z"]
    )
    priority: int = Field(description="Its weight among the studies, as it is now.", examples=[1])
    budget_trials: int = Field(
        description="Most trials that it may have, as it is now.", examples=[40]
    )
    budget_seconds: float | None = Field(
        description="Seconds that it may take, as it is now; null for no such limit.",
        examples=[None],
    )
    budget_trial_epochs: int | None = Field(
        description="Epochs that its trials may train together, as it is now; null for no such "
        "limit.",
        examples=[None],
    )
    trial_epochs: int = Field(
        description="Epochs that its trials have trained together; one that was trained again "
        "after a lost lease counts once.",
        examples=[412],
    )
    counts: Counts = Field(description="Its trials by state.")
    progress: float = Field(
        description="Share of the budget that is used up, of trials, seconds or trial-epochs, "
        "whichever is most; from 0 to 1.",
        examples=[0.375],
    )
    best_validation_loss: Measure = Field(
        description="Lowest validation loss so far; null before the first complete trial.",
        examples=[0.0731],
    )


class StudyPage(Document):
    """Some studies, newest first."""

    items: list[StudySummary] = Field(description="The studies.")
    next: str | None = Field(
        description="The `cursor` of the next page; null on the last one.", examples=["Mjc"]
    )


class StudyDetail(StudySummary):
    """A study and how it stands."""

    spec: StudySpec = Field(
        description="What was posted, every default filled in. Budget and priority may have been "
        "changed since; how they are now stands beside it.",
        examples=[
            {
                "name": "digits",
                "task": {"dataset": "digits", "model": "mlp"},
                "budget": {"trials": 40},
            }
        ],
    )
    model: ModelDetail | None = Field(
        description="What is known of its model; null until a worker has built it. Where the "
        "study searches shapes, that of the one that was built first."
    )
    shapes: list[ShapeDetail] = Field(
        description="The shapes that workers have built, where the study searches optimizer, "
        "batch size or settings of the model; else none."
    )
    eta_seconds: float | None = Field(
        description="Seconds until the budget is used up, at the pace of the latest 20 trials; "
        "null while that cannot be known.",
        examples=[25.0],
    )
    best: TrialResult | None = Field(
        description="The trial with the lowest validation loss so far; null before the first "
        "complete one."
    )
    baseline: TrialResult | None = Field(
        description="The trial with everything off; null until it is complete."
    )
    default: TrialResult | None = Field(
        description="The trial with common strengths; null until it is complete."
    )
    warning: str | None = Field(
        description="Why nothing happens, if no living worker offers the study's task on a device "
        "as it requires, or all that do have refused it because their data differ or "
        "they lack room, a file or a package for them.",
        examples=["no worker is alive; the study waits for one (start it with `regtune worker`)"],
    )


class StudiesQuery(BaseModel):
    """Which studies to list."""

    model_config = ConfigDict(extra="forbid")

    state: StudyState | None = Field(
        None, description="Only studies in this state.", examples=["active"]
    )
    limit: int = Field(50, ge=1, le=500, description="Most studies on a page.", examples=[50])
    cursor: str | None = Field(None, description="The `next` of the page before.", examples=["Mjc"])


@router.post("", status_code=201, openapi_extra=_SPEC_BODY, responses={200: {"model": StudyDetail}})
def post_study(
    request: Request,
    response: Response,
    body: Body,
    session: InTransaction,
    context: InContext,
    actor: Actor,
) -> StudyDetail:
    """Post a study: 201 if it is new, 200 if the same one is there already."""
    spec = parse_study(body, request.headers.get("content-type", ""))
    admission.check(session, spec, context.installed, context.settings.lease_seconds)
    study, is_new = studies.create(session, spec, actor)
    response.status_code = 201 if is_new else 200
    response.headers["Location"] = f"/v1/studies/{study.name}"
    return _detail(session, study, context)


@router.get("")
def list_studies(query: Annotated[StudiesQuery, Query()], session: InTransaction) -> StudyPage:
    """List studies, newest first."""
    before = _read_cursor(query.cursor) if query.cursor is not None else None
    found = studies.page(session, state=query.state, before=before, limit=query.limit + 1)
    page = found[: query.limit]
    standings = standing.of_each(session, [study.study_id for study in page])
    return StudyPage(
        items=[
            StudySummary(**_summary(study, standings[study.study_id]))
            for study in page
            if study.study_id in standings
        ],
        next=cursors.write(str(page[-1].study_id)) if len(found) > len(page) else None,
    )


@router.get("/{name}")
def get_study(name: StudyName, session: InTransaction, context: InContext) -> StudyDetail:
    """Look at a study: its spec, how far it is, and its best trial so far."""
    return _detail(session, studies.find(session, name), context)


@router.post("/{name}/pause")
def pause_study(
    name: StudyName, session: InTransaction, context: InContext, actor: Actor
) -> StudyDetail:
    """Start no more trials and keep the budget; running ones finish."""
    return _act(name, "pause", session, context, actor)


@router.post("/{name}/resume")
def resume_study(
    name: StudyName, session: InTransaction, context: InContext, actor: Actor
) -> StudyDetail:
    """Go on with a paused study."""
    return _act(name, "resume", session, context, actor)


@router.post("/{name}/stop")
def stop_study(
    name: StudyName, session: InTransaction, context: InContext, actor: Actor
) -> StudyDetail:
    """Let running trials finish, start no more, and end the study."""
    return _act(name, "stop", session, context, actor)


@router.post("/{name}/cancel")
def cancel_study(
    name: StudyName, session: InTransaction, context: InContext, actor: Actor
) -> StudyDetail:
    """Stop running trials now, and end the study."""
    return _act(name, "cancel", session, context, actor)


@router.patch("/{name}", openapi_extra=_CHANGE_BODY)
def change_study(
    request: Request,
    name: StudyName,
    body: Body,
    session: InTransaction,
    context: InContext,
    actor: Actor,
) -> StudyDetail:
    """Change budget and priority of a live study; what is left out stays."""
    change = parse_change_of_study(body, request.headers.get("content-type", ""))
    admission.check_change(studies.find(session, name), change)
    return _detail(session, studies.change(session, name, change, actor), context)


@router.delete("/{name}", status_code=204)
def delete_study(name: StudyName, session: InTransaction, actor: Actor) -> None:
    """Delete a study that is over, with all its trials; its history stays."""
    studies.delete(session, name, actor)


def _act(name: str, verb: Verb, session: Session, context: Context, actor: str) -> StudyDetail:
    return _detail(session, studies.act(session, name, verb, actor), context)


def _detail(session: Session, study: Study, context: Context) -> StudyDetail:
    stands = standing.of(session, study.study_id)
    notable = records.notable(session, study)
    known = shapes.known(session, study.study_id) if study.spec.search.shaping() else {}
    alive_seconds = context.settings.lease_seconds
    return StudyDetail(
        **_summary(study, stands),
        spec=study.spec,
        model=ModelDetail.model_validate(study.model) if study.model else None,
        shapes=[
            ShapeDetail(params=read_shape(shape), model=ModelDetail.model_validate(facts))
            for shape, facts in known.items()
        ],
        eta_seconds=records.eta_seconds(session, study, stands),
        best=TrialResult.maybe(notable.best),
        baseline=TrialResult.maybe(notable.baseline),
        default=TrialResult.maybe(notable.default),
        warning=admission.warning(session, study, alive_seconds) if study.live else None,
    )


def _summary(study: Outline, stands: Standing) -> dict[str, Any]:
    return {
        "name": study.name,
        "state": study.state,
        "reason": study.reason,
        "created_at": study.created_at,
        "finished_at": study.finished_at,
        "priority": study.priority,
        "budget_trials": study.budget_trials,
        "budget_seconds": study.budget_seconds,
        "budget_trial_epochs": study.budget_trial_epochs,
        "trial_epochs": stands.trial_epochs,
        "counts": Counts.model_validate(stands),
        "progress": records.progress(study, stands),
        "best_validation_loss": stands.best_value,
    }


def _read_cursor(cursor: str) -> int:
    (study_id,) = cursors.read(cursor, 1)
    return cursors.whole(cursor, study_id, 2**31)
