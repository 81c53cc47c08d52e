"""``python -m worker.inspection``: what ``regtune task show`` and ``regtune task check`` start."""

import argparse
import os
import sys
import traceback

from rich.console import Console

from regtune import logs
from regtune.errors import InvalidSpec, NotFound, RegtuneError
from regtune.settings import Settings
from worker.devices import find_device
from worker.inspection import checking, report, showing
from worker.inspection.subject import Subject, find_subject

GOOD, WRONG, USAGE, NOT_FOUND, INTERRUPTED = 0, 1, 2, 4, 130


def main(arguments: list[str] | None = None) -> int:
    """Show or check a task; return the exit code, which is that of ``regtune``."""
    options = _parser().parse_args(arguments)
    settings = Settings()
    logs.configure(settings.model_copy(update={"log_level": "error"}))
    try:
        subject = find_subject(
            options.name, options.set, settings, data=options.data, model=options.model
        )
        work = _show if options.verb == "show" else _check
        return work(subject, settings, options)
    except NotFound as error:
        return _refuse(error, NOT_FOUND)
    except InvalidSpec as error:
        return _refuse(error, USAGE)
    except RegtuneError as error:
        return _refuse(error, WRONG)
    except KeyboardInterrupt:
        return INTERRUPTED


def _show(subject: Subject, settings: Settings, options: argparse.Namespace) -> int:
    """Show what is known, also where data or model cannot be had."""
    try:
        known = showing.describe(subject, settings)
    except RegtuneError:
        raise
    except Exception as error:  # noqa: BLE001 - a module of the user's own may raise anything
        traceback.print_exc()
        return _refuse(RegtuneError(f"it cannot be imported: {error}"), WRONG)
    code = GOOD
    try:
        known = known.model_copy(update=showing.build(subject, settings))
    except Exception as error:  # noqa: BLE001 - a user's crash is data
        code = WRONG
        if not isinstance(error, RegtuneError):
            traceback.print_exc()
        _refuse(RegtuneError(f"data and model are not there: {error}"), WRONG)
    _write(known, options)
    return code


def _check(subject: Subject, settings: Settings, options: argparse.Namespace) -> int:
    verdict = checking.check(subject, settings, find_device(options.device))
    _write(verdict, options)
    return WRONG if verdict.wrong else GOOD


def _write(found: showing.Description | checking.Verdict, options: argparse.Namespace) -> None:
    if options.json:
        print(found.model_dump_json())  # noqa: T201 - this is a program
        return
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    if isinstance(found, showing.Description):
        report.show_description(found, console)
    else:
        report.show_verdict(found, console)


def _refuse(error: RegtuneError, code: int) -> int:
    print(f"regtune task: {error}", file=sys.stderr)  # noqa: T201 - a program's last word
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="regtune task", description=__doc__)
    parser.add_argument("verb", choices=("show", "check"))
    parser.add_argument("name", help="a task, data set or model, or the file of a study")
    parser.add_argument("--set", action="append", default=[], help="a setting of it, name=value")
    parser.add_argument("--data", help="the data set that a model is built for")
    parser.add_argument("--model", help="the model that is trained on a data set")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, …; default: auto")
    parser.add_argument("--json", action="store_true")
    return parser


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # A thread may be compiling: the interpreter's own end would cut it off in the midst of C++,
    # and crash.
    os._exit(code)
