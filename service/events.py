"""What happens to a study, told as it happens, as server-sent events."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from http import HTTPStatus
from typing import Annotated, Any

import structlog
from fastapi import APIRouter, Header, Query, Response
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import text
from sqlalchemy.orm import Session
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.concurrency import run_in_threadpool

from regtune import database, events, studies
from regtune.events import Event
from regtune.tables import LIVE_STUDY_STATES
from service.edge import Context, InContext, StudyName
from service.problems import invalid_query

log = structlog.get_logger()

router = APIRouter(prefix="/v1/studies/{name}", tags=["events"])

PING_SECONDS = 15
SEND_SECONDS = 60
"""A client that takes nothing for so long is gone; it may come back with its last id."""

_BREATH_SECONDS = 0.1
"""Between two reads of one stream, so that a storm of news costs ten reads a second at most."""


class EventsQuery(BaseModel):
    """Where to begin."""

    model_config = ConfigDict(extra="forbid")

    after: str = Field(
        events.START,
        description="The id of the last event that is known already. Default: from the beginning.",
        examples=["1342-57"],
    )


@router.get(
    "/events",
    response_class=EventSourceResponse,
    responses={
        200: {
            "description": "A stream that ends when the study has.",
            "content": {"text/event-stream": {}},
        },
        204: {"description": "The study has ended, and all is known: do not come back."},
    },
)
async def stream_events(
    name: StudyName,
    query: Annotated[EventsQuery, Query()],
    context: InContext,
    last_event_id: Annotated[
        str | None, Header(description="As `after`; what a browser sends when it reconnects.")
    ] = None,
) -> Response:
    """Watch a study: what has happened, then what happens, until it has ended.

    A stream may also break off before that. Whoever comes back with the last id gets the rest, and
    204 once there is none, which a browser takes as the end.

    Each event has its kind as `event`, its cursor as `id`, and as `data` a JSON object of `at`,
    `kind`, `number` (the trial's, or null), `actor` and `detail`. The kinds are those of the
    study's history.
    """
    after = _checked(query.after if last_event_id is None else last_event_id)
    async with context.turn():
        study_id, is_over = await run_in_threadpool(_find, context, name, after)
    if is_over:
        return Response(status_code=HTTPStatus.NO_CONTENT)
    return EventSourceResponse(
        _tell(context, study_id, after), ping=PING_SECONDS, send_timeout=SEND_SECONDS
    )


def _checked(cursor: str) -> str:
    try:
        events.parse_cursor(cursor)
    except ValueError:
        raise invalid_query("after", "is not the id of an event", cursor) from None
    return cursor


def _find(context: Context, name: str, after: str) -> tuple[int, bool]:
    """Return a study's id, and whether nothing is left to tell of it."""
    with database.transaction(context.engine) as session:
        study_id = studies.find(session, name).study_id
        return study_id, _is_over(session, study_id, after)


async def _tell(context: Context, study_id: int, after: str) -> AsyncIterator[ServerSentEvent]:
    with context.newsroom.watch(study_id) as watch:
        while True:
            try:
                async with context.turn():
                    batch, is_over = await run_in_threadpool(_read, context, study_id, after)
            except database.FAULTS:
                # It has begun, so it can only end; its reader comes back with its last id.
                log.warning("stream_lost_database", study_id=study_id)
                return
            for event in batch:
                after = event.cursor
                yield _as_sent(event)
            if is_over:
                return
            if not batch:
                await watch.wait(context.settings.poll_seconds)
            await asyncio.sleep(_BREATH_SECONDS)


def _read(context: Context, study_id: int, after: str) -> tuple[Sequence[Event], bool]:
    """Return the next events, and whether there will be no more."""
    with database.transaction(context.engine) as session:
        batch = events.read(session, study_id, after)
        return batch, not batch and _is_over(session, study_id, after)


def _is_over(session: Session, study_id: int, after: str) -> bool:
    """Say whether a study has ended, or is gone, and nothing is still to be told of it.

    The last events may be there and yet be withheld, while an older transaction is open.
    """
    transaction_id, event_id = events.parse_cursor(after)
    row = session.execute(
        text(_IS_OVER),
        {
            "study_id": study_id,
            "live": list(LIVE_STUDY_STATES),
            "transaction_id": str(transaction_id),
            "event_id": event_id,
        },
    )
    return bool(row.scalar())


def _as_sent(event: Event) -> ServerSentEvent:
    data: dict[str, Any] = {
        "at": event.at.isoformat(),
        "kind": event.kind,
        "number": event.number,
        "actor": event.actor,
        "detail": dict(event.detail),
    }
    return ServerSentEvent(json.dumps(data, allow_nan=False), event=event.kind, id=event.cursor)


_IS_OVER = """
SELECT NOT EXISTS (SELECT FROM regtune.studies WHERE study_id = :study_id AND state = ANY(:live))
   AND NOT EXISTS (SELECT FROM regtune.events WHERE study_id = :study_id
                   AND (transaction_id, event_id) > (cast(:transaction_id AS xid8), :event_id))
"""
