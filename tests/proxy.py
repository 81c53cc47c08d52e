"""A network between clients and a database, which may be slow, fall silent, or be cut."""

import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

_SLICE_SECONDS = 0.02


class Proxy:
    """Listens on a port of this machine and passes on to a server's Unix socket."""

    def __init__(self, server: Path) -> None:
        self._server = str(server)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self.delay = 0.0
        """Seconds by which each answer is late."""
        self.silent = False
        """Whether nothing is passed on, and nobody told."""
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def port(self) -> int:
        port: int = self._listener.getsockname()[1]
        return port

    def cut(self) -> None:
        """Cut every connection that there is."""
        for pair in list(self._pairs):
            self._close(pair)

    def close(self) -> None:
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            upstream = socket.socket(socket.AF_UNIX)
            try:
                upstream.connect(self._server)
            except OSError:
                client.close()
                continue
            pair = client, upstream
            self._pairs.add(pair)
            for source, target, late in ((client, upstream, False), (upstream, client, True)):
                threading.Thread(
                    target=self._pass_on, args=(pair, source, target, late), daemon=True
                ).start()

    def _pass_on(
        self,
        pair: tuple[socket.socket, socket.socket],
        source: socket.socket,
        target: socket.socket,
        late: bool,
    ) -> None:
        with suppress(OSError):
            while data := source.recv(65_536):
                if late and self.delay:
                    time.sleep(self.delay)
                while self.silent:
                    time.sleep(_SLICE_SECONDS)
                target.sendall(data)
        self._close(pair)

    def _close(self, pair: tuple[socket.socket, socket.socket]) -> None:
        self._pairs.discard(pair)
        for end in pair:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
