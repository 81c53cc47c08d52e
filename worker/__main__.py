"""``python -m worker``: one worker process on one device; ``regtune worker`` starts it."""

import argparse
import gc
import os
import sys

from regtune import database, logs
from regtune.errors import DatabaseUnavailable, RegtuneError
from regtune.settings import Settings
from worker.devices import find_device
from worker.loop import Worker
from worker.shutdown import Shutdown
from worker.training.compiling import keep_compiled_in, load_compiler_if_used


def main(arguments: list[str] | None = None) -> int:
    """Run a worker until it is told to stop; return the exit code.

    That is 3 without a database, 2 if the options or settings are wrong.
    """
    options = _parser().parse_args(arguments)
    settings = Settings()
    if options.lanes is not None:
        settings = settings.model_copy(update={"lanes": options.lanes})
    logs.configure(settings)
    keep_compiled_in(settings.data_dir / "compiled")
    load_compiler_if_used()
    shutdown = Shutdown()
    shutdown.install()
    # What is imported stays: to go through it each time that a stack is dropped takes 0.2 s.
    gc.freeze()
    try:
        url = database.address(_required(settings.database_url))
        Worker(url, settings, find_device(options.device), options.name, shutdown).run()
    except RegtuneError as error:
        print(f"regtune worker: {error}", file=sys.stderr)  # noqa: T201 - a program's last word
        return 3 if isinstance(error, DatabaseUnavailable) else 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="regtune worker", description=__doc__)
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, …; default: auto")
    parser.add_argument("--lanes", type=_positive, help="trials to train at once")
    parser.add_argument("--name", help="unique name; default: host and process id")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _required(url: str | None) -> str:
    if not url:
        raise DatabaseUnavailable("set REGTUNE_DATABASE_URL to the database that the service uses")
    return url


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # A thread may be compiling: the interpreter's own end would cut it off in the midst of C++,
    # and crash.
    os._exit(code)
