"""Workers over REST."""

from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field

from regtune import workers
from service.documents import Document, Measure
from service.edge import InContext, InTransaction

router = APIRouter(prefix="/v1/workers", tags=["workers"])


class Capacity(Document):
    """How a worker found the number of its lanes."""

    lanes: int = Field(description="How many lanes it found.", examples=[64])
    reason: str = Field(
        description="What set that number.",
        examples=["more lanes train no more trial-epochs a second"],
    )
    bytes_per_lane: int | None = Field(
        None,
        description="The most memory that one more lane may take; null if not measured.",
        examples=[1_200_000],
    )
    trial_epochs_per_second: Measure = Field(
        None,
        description="Epochs of single trials that all lanes together train in a second; null if "
        "not measured.",
        examples=[812.5],
    )
    data: str | None = Field(
        None,
        description="Where the rows of its study are: resident on the device, or streamed to it "
        "from the host; null if it has not said.",
        examples=["resident"],
    )


class WorkerDetail(Document):
    """A worker as it last said of itself."""

    name: str = Field(
        description="Its name; a new one under the same name replaces it.", examples=["gpu-7-3141"]
    )
    host: str = Field(description="The machine that it runs on.", examples=["gpu-7"])
    pid: int = Field(description="Its process there.", examples=[3141])
    device: str = Field(description="What it trains on.", examples=["NVIDIA H100 80GB HBM3"])
    device_kind: str = Field(
        description="What kind of device that is, in PyTorch's words.", examples=["cuda"]
    )
    memory_bytes: int | None = Field(
        description="All the memory of the device, of the machine where it is a CPU; null if that "
        "is not known.",
        examples=[85_520_809_984],
    )
    lanes: int = Field(description="How many trials it trains at once.", examples=[64])
    wanted_lanes: int = Field(description="Lanes that would take a trial now.", examples=[3])
    occupancy: Measure = Field(
        description="Share of its lanes that trained, from 0 to 1, over the epochs of its study so "
        "far in which trials were waiting; null before the first such epoch.",
        examples=[0.97],
    )
    capacity: Capacity | None = Field(
        description="How the number of lanes was found; null until it has been."
    )
    datasets: list[str] = Field(
        description="The data sets that it has installed.",
        examples=[["digits", "fashion_mnist", "mnist"]],
    )
    models: list[str] = Field(description="The models that it has installed.", examples=[["mlp"]])
    tasks: list[str] = Field(
        description="The tasks that it has installed or configured.", examples=[["waves"]]
    )
    study: str | None = Field(
        description="The live study that it trains, or has built last.", examples=["digits"]
    )
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
    """All workers of the last 30 days, living ones first."""

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
            for worker in workers.everyone(
                session, context.settings.lease_seconds, alive=query.alive
            )
        ]
    )
