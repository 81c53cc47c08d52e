"""Workers as they run: processes of their own."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def worker_process(
    url: str, name: str, lanes: int = 2, **environment: str
) -> Iterator[subprocess.Popen[bytes]]:
    """A worker on the CPU; killed in the end if it still runs.."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "worker"),
                *("--device", "cpu", "--lanes", str(lanes), "--name", name),
            ],
            env={**os.environ, "OMP_NUM_THREADS": "1", "REGTUNE_DATABASE_URL": url, **environment},
            stderr=log,
        )
        try:
            yield process
        except BaseException:
            log.seek(0)
            sys.stderr.write(log.read().decode())
            raise
        finally:
            process.kill()
            process.wait()
