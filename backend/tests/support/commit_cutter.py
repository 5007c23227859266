"""A TCP proxy in front of PostgreSQL that cuts the connection at a COMMIT."""

import socket
import threading
from contextlib import suppress
from types import TracebackType
from typing import Literal, Self

# Before the server has the COMMIT, or after it has carried it out and before its client hears of it.
Cut = Literal["before", "after"]


class CommitCutter:
    """Passes everything on but what it is told to cut.

    Args:
        server_port: Where PostgreSQL listens.
    """

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._next: Cut | None = None
        self._away, self._then_away = False, False
        self.cuts = 0

    def cut_next(self, cut: Cut, *, then_away: bool = False) -> None:
        """Cut at the next COMMIT.

        Args:
            then_away: Whether to refuse every connection from then on.
        """
        self._next, self._then_away = cut, then_away

    def back(self) -> None:
        """Take connections again."""
        self._away = False

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                if self._away:
                    client.close()
                else:
                    _Link(self, client, socket.create_connection(("127.0.0.1", self._server_port)))

    def take_cut(self) -> Cut | None:
        """Return what is to be done to this COMMIT."""
        cut, self._next = self._next, None
        if cut is not None:
            self.cuts += 1
            self._away = self._then_away
        return cut


class _Link:
    """One connection: a thread for each direction."""

    def __init__(self, cutter: CommitCutter, client: socket.socket, server: socket.socket) -> None:
        self._cutter, self._client, self._server = cutter, client, server
        self._mute = False
        threading.Thread(target=self._to_server, daemon=True).start()
        threading.Thread(target=self._to_client, daemon=True).start()

    def _to_server(self) -> None:
        with suppress(OSError):
            while data := self._client.recv(65536):
                cut = self._cutter.take_cut() if b"COMMIT" in data else None
                if cut == "before":
                    break
                self._mute = cut == "after"
                self._server.sendall(data)
        if not self._mute:
            self._end()

    def _to_client(self) -> None:
        with suppress(OSError):
            while data := self._server.recv(65536):
                if self._mute:  # the answer to the COMMIT: it is done
                    break
                self._client.sendall(data)
        self._end()

    def _end(self) -> None:
        for end in (self._client, self._server):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
