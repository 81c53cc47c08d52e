"""What is heard on a channel of the database."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sqlalchemy import Engine, text

from regtune import database

_MARK = 77


@contextmanager
def heard_on(engine: Engine, url: str, channel: str) -> Iterator[Callable[[], set[int]]]:
    """What says of which studies was heard since it was last asked; nothing is waited for in vain.

    A mark of its own comes behind all that was told before.
    """
    with database.Listener(url, channel) as listener:
        listener.wait(0)

        def so_far() -> set[int]:
            with engine.begin() as connection:
                connection.execute(text(f"NOTIFY {channel}, '{_MARK}'"))
            known: set[int] = set()
            while _MARK not in known:
                known |= listener.wait(30)
            return known - {_MARK}

        yield so_far
