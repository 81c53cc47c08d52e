"""The service as clients meet it: on a port of its own, in this process or in one of its own."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import uvicorn
from fastapi import FastAPI

from regtune.settings import Settings
from service.app import create_app
from tests.waiting import wait_until


def app(url: str, **settings: object) -> FastAPI:
    """The service without its scheduler."""
    return create_app(Settings(database_url=url, **settings), schedule=False)  # type: ignore[arg-type]


@contextmanager
def serving(app: FastAPI) -> Iterator[httpx.Client]:
    """A client of an app that is served in a thread."""
    config = uvicorn.Config(
        app, port=0, log_level="critical", timeout_graceful_shutdown=1, access_log=False
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive())
        port = server.servers[0].sockets[0].getsockname()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def service_process(url: str, port: int) -> Iterator[subprocess.Popen[str]]:
    """The service as a process, its scheduler included; killed in the end if it still runs."""
    environment = os.environ | {
        "REGTUNE_DATABASE_URL": url,
        "REGTUNE_PORT": str(port),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "service"], env=environment, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()
