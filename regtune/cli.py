"""The command line: ``regtune …``."""

import json
import os
import signal
import socket
import sys
import time
from contextlib import closing
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from regtune import answer, database, gpus, progress, workers
from regtune.client import Client, Document, Refused, ServiceUnreachable, Verb, is_live
from regtune.crew import Crew
from regtune.errors import DatabaseUnavailable, InvalidSpec, RegtuneError
from regtune.settings import Settings
from regtune.spec import StudySpec, parse_text

FAILED = 1
USAGE = 2
UNREACHABLE = 3
NOT_FOUND = 4
INTERRUPTED = 128 + signal.SIGINT

_EXIT_CODES = """
Exit codes: 0 all went well · 1 refused, or the study failed · 2 the command, a setting or the
study's file is wrong · 3 the service or the database cannot be reached · 4 there is no such study,
or no best trial yet · 130 ended by Ctrl-C.
"""

app = typer.Typer(
    name="regtune",
    help="Finds how strongly to regularize a neural network.",
    epilog=_EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
db = typer.Typer(no_args_is_help=True, help="The database's schema.")
app.add_typer(db, name="db")

_out = Console()
_err = Console(stderr=True)

Name = Annotated[str, typer.Argument(metavar="NAME", help="The study's name.")]
AsJson = Annotated[bool, typer.Option("--json", help="Write JSON, for scripts.")]
Watch = Annotated[bool, typer.Option("--watch", help="Then show how it goes, until it is over.")]


def main() -> None:
    """Run the command line; what is expected to go wrong ends in one line and an exit code."""
    try:
        app()
    except RegtuneError as error:
        _err.print(f"regtune: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(_exit_code(error))
"""

"""
