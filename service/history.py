"""The audit trail over REST: who did what to a study, when."""

from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field

from regtune import events
from regtune.errors import NotFound
from regtune.events import Event
from service import cursors
from service.documents import Document
from service.edge import InTransaction, StudyName

router = APIRouter(prefix="/v1/studies/{name}", tags=["studies"])


class HistoryEntry(Document):
    """One thing that was done to a study, or that happened to one of its trials."""

    at: datetime = Field(description="When.", examples=["2026-03-01T12:00:00.000000Z"])
    actor: str = Field(
        description="Who: a client by its address, the scheduler, or a worker by its name.",
        examples=["client 10.0.3.7"],
    )
    kind: str = Field(
        description="What: study_created, study_pause, study_resume, study_stop, study_cancel, "
        "study_changed, study_refused (by a worker whose data differ, or that lacks what it takes "
        "to train it), study_ended or study_deleted; of a trial, trial_appended, trial_started, "
        "trial_resumed, trial_given_back, trial_complete, trial_pruned, trial_failed or "
        "trial_cancelled.",
        examples=["study_changed"],
    )
    number: int | None = Field(description="The trial, if it is about one.", examples=[None])
    detail: dict[str, Any] = Field(
        description="More of it, such as how a study ended and why, or what was changed, from "
        "what to what.",
        examples=[{"priority": {"from": 1, "to": 3}}],
    )


class HistoryPage(Document):
    """Some entries of a study's history."""

    items: list[HistoryEntry] = Field(description="The entries.")
    next: str | None = Field(
        description="The `cursor` of the next page; null on the last one.", examples=["YXNjCjU3"]
    )


class HistoryQuery(BaseModel):
    """Which entries to list, and in which order."""

    model_config = ConfigDict(extra="forbid")

    trials: bool = Field(
        False, description="Also what happened to single trials.", examples=[False]
    )
    direction: Literal["asc", "desc"] = Field(
        "asc", description="Oldest first, or newest first.", examples=["asc"]
    )
    limit: int = Field(100, ge=1, le=1000, description="Most entries on a page.", examples=[100])
    cursor: str | None = Field(
        None, description="The `next` of the page before.", examples=["YXNjCjU3"]
    )


@router.get("/history")
def get_history(
    name: StudyName, query: Annotated[HistoryQuery, Query()], session: InTransaction
) -> HistoryPage:
    """List who did what to a study, when.

    It outlives the study: after a deletion, what was done to the study itself stays, under its
    name, and a new study of that name goes on with it. What happened to trials goes with them.
    """
    after = _read_cursor(query) if query.cursor is not None else None
    found = events.history(
        session,
        name,
        trials=query.trials,
        after=after,
        up=query.direction == "asc",
        limit=query.limit + 1,
    )
    if not found and after is None:
        raise NotFound(f"there is no study {name!r}, and there was none")
    page = found[: query.limit]
    return HistoryPage(
        items=[HistoryEntry.model_validate(event) for event in page],
        next=_write_cursor(query, page[-1]) if len(found) > len(page) else None,
    )


def _write_cursor(query: HistoryQuery, last: Event) -> str:
    _, event_id = events.parse_cursor(last.cursor)
    return cursors.write(query.direction, str(event_id))


def _read_cursor(query: HistoryQuery) -> int:
    cursor = query.cursor or ""
    direction, event_id = cursors.read(cursor, 2)
    if direction != query.direction:
        raise cursors.invalid(cursor)
    return cursors.whole(cursor, event_id, 2**63)
