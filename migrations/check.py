"""``python -m migrations.check``: do the migrations lead to the tables in the code?"""

import sys
import tempfile
from pathlib import Path

from regtune import database
from regtune.embedded import EmbeddedServer


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="regtune-") as folder:
        server = EmbeddedServer(Path(folder))
        try:
            url = server.start()
            database.upgrade(url)
            differences = database.compare(url)
        finally:
            server.stop()
    for difference in differences:
        sys.stderr.write(f"{difference}\n")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
