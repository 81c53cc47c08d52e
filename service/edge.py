"""What every request brings along: one transaction, the settings, and who is asking.

The transaction commits here and nowhere else, and before the answer is sent: a client that was told
201 will find its study.
"""

import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated

from anyio import CapacityLimiter, fail_after
from fastapi import Depends, Path, Request
from sqlalchemy import Engine
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from regtune import database
from regtune.errors import NotFound
from regtune.settings import Settings
from regtune.spec import NAME_PATTERN
from regtune.task import Offer
from service.bodies import read_within
from service.newsroom import Newsroom

PATIENCE_SECONDS = 30.0
"""What a request waits for a connection before it is told to come again."""


@dataclass(frozen=True)
class Context:
    """What the service shares between its requests."""

    settings: Settings
    engine: Engine
    newsroom: Newsroom
    installed: Offer
    places: CapacityLimiter
    """As many as there are connections: who has one needs no other's thread to give it back."""

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait, without a thread, until a connection of the pool is free; hold it to the end.

        Threads are few. Were all of them waiting for connections, those that have one could not
        end, since to write an answer down takes a thread as well. Raise PoolTimeout, as the pool.
        """
        try:
            with fail_after(PATIENCE_SECONDS):
                await self.places.acquire()
        except TimeoutError:
            raise PoolTimeout("too many requests at once") from None
        try:
            yield
        finally:
            self.places.release()


def _context(request: Request) -> Context:
    context: Context = request.app.state.context
    return context


InContext = Annotated[Context, Depends(_context)]


async def _turn(context: InContext) -> AsyncIterator[None]:
    async with context.turn():
        yield


def _transaction(
    context: InContext, _: Annotated[None, Depends(_turn, scope="function")]
) -> Iterator[Session]:
    with database.transaction(context.engine) as session:
        yield session


InTransaction = Annotated[Session, Depends(_transaction, scope="function")]


def _study_name(
    name: Annotated[str, Path(description="The study's name.", examples=["digits"])],
) -> str:
    if not re.fullmatch(NAME_PATTERN, name):
        raise NotFound(f"there is no study {name!a}: that is no name of one")
    return name


StudyName = Annotated[str, Depends(_study_name)]


def _actor(request: Request) -> str:
    return f"client {request.client.host}" if request.client else "client"


Actor = Annotated[str, Depends(_actor)]


async def _body(request: Request, context: InContext) -> bytes:
    return await read_within(request, context.settings.max_body_bytes)


Body = Annotated[bytes, Depends(_body)]
