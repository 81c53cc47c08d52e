"""The service: the REST API, the dashboard and the scheduler in one process."""

import gc
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext
from importlib.metadata import version

import structlog
import uvicorn
from anyio import CapacityLimiter
from fastapi import FastAPI
from fastapi_offline import FastAPIOffline

from regtune import database, task
from regtune.errors import AddressTaken, DatabaseUnavailable
from regtune.settings import Settings
from service import events, health, history, problems, studies, trials, workers
from service.dashboard import Dashboard
from service.edge import Context
from service.newsroom import Newsroom
from service.openapi import PROBLEM, describe
from service.origins import SameOrigin
from service.scheduler.loop import Scheduler

log = structlog.get_logger()

DESCRIPTION = (
    "Finds how strongly to regularize a neural network: post a study, watch it, take the answer."
)

_GRACE_SECONDS = 5
"""What a request in progress has left to end when the service stops."""

_SWITCH_SECONDS = 0.001
"""How long a sampler that thinks may keep the interpreter from a request; 0.005 is its default, and
a request gives it back several times."""


def create_app(settings: Settings, *, schedule: bool = True) -> FastAPI:
    """Return the service as an ASGI app; ``schedule`` says whether it also decides what to try.

    Nothing is connected before it starts. Raise DatabaseUnavailable without a database's address.
    """
    url = _database_url(settings)
    engine = database.connect(url, pool_size=settings.pool_size, proxied=settings.proxied)
    newsroom = Newsroom(engine)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        with _scheduling(url, settings) if schedule else nullcontext():
            yield
        newsroom.stop()
        engine.dispose()

    app = FastAPIOffline(
        title="regtune",
        description=DESCRIPTION,
        version=version("regtune"),
        redoc_url=None,
        lifespan=lifespan,
        separate_input_output_schemas=False,
        responses=PROBLEM,
    )
    app.state.context = Context(
        settings,
        engine,
        newsroom,
        task.installed(settings.tasks),
        CapacityLimiter(settings.pool_size),
    )
    problems.install(app)
    app.add_middleware(SameOrigin, address=settings.host, names=settings.hosts)
    for part in (studies, trials, history, events, workers, health):
        app.include_router(part.router)
    app.router.default = Dashboard(
        url, settings.pool_size, settings.max_body_bytes, proxied=settings.proxied
    )
    describe(app)
    return app


def serve(settings: Settings) -> None:
    """Run the service until SIGTERM or SIGINT.

    Raise DatabaseUnavailable, UnknownSchema or AddressTaken if it cannot start.
    """
    for signum in (signal.SIGTERM, signal.SIGINT):
        # Before uvicorn takes over, and again when it is done: both mean a good end.
        signal.signal(signum, lambda *_: sys.exit(0))
    sys.setswitchinterval(_SWITCH_SECONDS)
    _check_database(settings)
    with _listen(settings.host, settings.port) as listener:
        host, port = listener.getsockname()[:2]
        log.info("service_started", url=f"http://{host}:{port}")
        app = create_app(settings)
        gc.collect()
        gc.freeze()  # a request does not wait while the collector goes through what stays
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=_GRACE_SECONDS,
        )
        uvicorn.Server(config).run([listener])


@contextmanager
def _scheduling(url: str, settings: Settings) -> Iterator[None]:
    """Run the scheduler, on connections of its own: a crowd of clients must not starve it."""
    engine = database.connect(
        url,
        pool_size=1,
        program="scheduler",
        proxied=settings.proxied,
        trust_seconds=database.TRUST_SECONDS,
    )
    scheduler = Scheduler(engine, settings.direct_database_url or url, settings)
    scheduler.start()
    yield
    scheduler.stop()
    engine.dispose()


def _database_url(settings: Settings) -> str:
    if settings.database_url is None:
        raise DatabaseUnavailable("REGTUNE_DATABASE_URL is not set")
    return settings.database_url


def _check_database(settings: Settings) -> None:
    engine = database.connect(_database_url(settings), pool_size=1, proxied=settings.proxied)
    try:
        database.check(engine)
    finally:
        engine.dispose()


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        both = host == "::" and socket.has_dualstack_ipv6()
        listener = socket.create_server((host, port), family=family, dualstack_ipv6=both)
    except OSError as error:
        raise AddressTaken(f"cannot listen on {host}:{port}: {_reason(error)}") from None
    # Connections inherit it. asyncio sets it on sockets of its own making alone, and without it an
    # answer's body waits 40 ms for the client to acknowledge its head.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _reason(error: OSError) -> str:
    """Return why, without the address that ``socket.create_server`` adds in brackets."""
    return (error.strerror or str(error)).partition(" (")[0]
