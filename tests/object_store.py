"""An object store that speaks S3, as a process of its own."""

import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import httpx

from tests.waiting import free_port, wait_until

BUCKET = "bucket"


@dataclass(frozen=True)
class ObjectStore:
    """A store with one bucket; it forgets everything once its process ends."""

    process: subprocess.Popen[bytes]
    port: int

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> Mapping[str, str]:
        """What its clients must know, under the names that all of Amazon's tools use."""
        return {
            "AWS_ENDPOINT_URL": self.address,
            "AWS_ACCESS_KEY_ID": "anyone",
            "AWS_SECRET_ACCESS_KEY": "anything",
            "AWS_DEFAULT_REGION": "us-east-1",
        }


@contextmanager
def object_store() -> Iterator[ObjectStore]:
    """A store that runs for as long as the block lasts, unless it is stopped before."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    store = ObjectStore(process, port)
    try:
        wait_until(lambda: process.poll() is not None or _answers(store))
        httpx.put(f"{store.address}/{BUCKET}").raise_for_status()
        yield store
    finally:
        process.kill()
        process.wait()


def _answers(store: ObjectStore) -> bool:
    try:
        return httpx.get(store.address).is_success
    except httpx.TransportError:
        return False
