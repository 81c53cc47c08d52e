"""Is the service there, and can it work? For supervisors and load balancers."""

from typing import Literal

import structlog
from fastapi import APIRouter
from pydantic import Field
from starlette.concurrency import run_in_threadpool

from regtune import database
from regtune.errors import DatabaseUnavailable
from service.documents import Document
from service.edge import InContext

log = structlog.get_logger()

PROBES = ("/healthz", "/readyz")

router = APIRouter(tags=["health"])


class Health(Document):
    """A good answer; a bad one is a problem document."""

    status: Literal["ok"] = Field("ok", description="Always ok.", examples=["ok"])


@router.get("/healthz")
async def get_health() -> Health:
    """Say that the process lives, whatever its database does."""
    return Health()


@router.get("/readyz")
async def get_readiness(context: InContext) -> Health:
    """Say that the database is reachable and its schemas are known; else 503."""
    async with context.turn():
        try:
            await run_in_threadpool(database.check, context.engine)
        except DatabaseUnavailable as error:  # whoever asks need not know where the database is
            log.warning("database_lost", error=str(error))
            raise DatabaseUnavailable("the database cannot be reached") from None
    return Health()
