"""``python -m service``: runs the service."""

import sys

from regtune import logs
from regtune.errors import DatabaseUnavailable, RegtuneError
from regtune.settings import Settings
from service.app import serve


def main() -> None:
    """Run the service; if it cannot start, end with one line and 1, or 3 without a database."""
    settings = Settings()
    logs.configure(settings)
    try:
        serve(settings)
    except RegtuneError as error:
        print(f"regtune service: {error}", file=sys.stderr)  # noqa: T201 - a program's last word
        sys.exit(3 if isinstance(error, DatabaseUnavailable) else 1)


if __name__ == "__main__":
    main()
