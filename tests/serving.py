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
from tests.waiting import free_port, wait_until


def app(url: str, **settings: object) -> FastAPI:
    """The service without its scheduler."""
    return create_app(Settings(database_url=url, **settings), schedule=False)


@contextmanager
def serving(app: FastAPI, port: int = 0) -> Iterator[httpx.Client]:
    """A client of an app that is served in a thread."""
    config = uvicorn.Config(
        app, port=port, log_level="critical", timeout_graceful_shutdown=1, access_log=False
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


def start_service(url: str, port: int) -> subprocess.Popen[str]:
    """Start the service as a process, its scheduler included."""
    environment = os.environ | {"REGTUNE_DATABASE_URL": url, "REGTUNE_PORT": str(port)}
    return subprocess.Popen(
        [sys.executable, "-m", "service"], env=environment, stderr=subprocess.PIPE, text=True
    )


@contextmanager
def service_process(url: str) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """The service as a process, once it is ready, and a client of it; killed if it still runs."""
    port = free_port()
    process = start_service(url, port)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            wait_until(lambda: process.poll() is not None or _is_ready(client))
            yield process, client
    finally:
        process.kill()
        process.communicate()


def _is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/readyz").is_success
    except httpx.ConnectError:
        return False
