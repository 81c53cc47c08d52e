"""Workers over REST."""

from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field

from regtune import workers
from service.documents import Document
from service.edge import InContext, InTransaction

router = APIRouter(prefix="/v1/workers", tags=["workers"])


class WorkerDetail(Document):
    """A worker as it last said of itself."""

    name: str = Field(
        description="Its name; a new one under the same name replaces it.", examples=["gpu-7-3141"]
    )
    host: str = Field(description="The machine that it runs on.", examples=["gpu-7"])
    pid: int = Field(description="Its process there.", examples=[3141])
    device: str = Field(description="What it trains on.", examples=["cuda:0"])
    lanes: int = Field(description="How many trials it trains at once.", examples=[64])
    wanted_lanes: int = Field(description="Lanes that would take a trial now.", examples=[3])
    datasets: list[str] = Field(
        description="The data sets that it has installed.",
        examples=[["digits", "fashion_mnist", "mnist"]],
    )
    models: list[str] = Field(description="The models that it has installed.", examples=[["mlp"]])
    study: str | None = Field(description="The study that it trains now.", examples=["digits"])
    started_at: datetime = Field(
        description="When it started.", examples=["2026-03-01T11:58:00.000000Z"]
    )
    heartbeat_at: datetime = Field(
        description="When it was last heard of.", examples=["2026-03-01T12:00:05.000000Z"]
    )
    alive: bool = Field(
        description="Whether that was not long ago, and it has not said goodbye.", examples=[True]
    )


class WorkerPage(Document):
    """All workers that have ever been, living ones first."""

    items: list[WorkerDetail] = Field(description="The workers.")
    next: None = Field(None, description="Always null: there is one page.", examples=[None])


class WorkersQuery(BaseModel):
    """Which workers to list."""

    model_config = ConfigDict(extra="forbid")

    alive: bool | None = Field(
        None, description="Only those that are alive, or those that are not.", examples=[True]
    )


@router.get("")
def list_workers(
    query: Annotated[WorkersQuery, Query()], session: InTransaction, context: InContext
) -> WorkerPage:
    """List the workers."""
    return WorkerPage(
        items=[
            WorkerDetail.model_validate(worker)
            for worker in workers.everyone(session, context.settings.lease_seconds)
            if query.alive is None or worker.alive == query.alive
        ]
    )
