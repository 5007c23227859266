"""A connection that a client cannot hold by sending, or by reading, nothing.

uvicorn waits for ever for the rest of a request, for as many headers as come, and for a reader that does not read.
"""

import asyncio
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from core.settings import get_settings

MAX_HEAD_BYTES = 64 * 2**10  # a request's line and headers; nginx takes 32 KiB, Node.js 16
_SLOW_READER_S = 60.0  # nginx's send_timeout
_LOOKS = 8  # how often a silent client is looked for; each look lets what waits in the socket be read first
_MIN_BYTES_A_SECOND = 500  # of a request; less is as good as silence. Apache's MinRate in mod_reqtimeout's default


class Connection(HttpToolsProtocol):
    """uvicorn's connection. It is closed when a client is silent in the middle of a request or of an answer.

    Silence is counted in looks and not in seconds: a server that has no processor time looks more rarely, and does not
    blame its clients. What the client sends while the server itself does not read counts for it.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._look_s = get_settings().slow_request_s / _LOOKS
        self._in_head, self._in_request = True, True  # a client that connects owes a request
        self._head_bytes = 0
        self._arrived_bytes, self._silent_looks = 0, 0
        self._unread_bytes, self._unread_looks = 0, 0
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to look."""
        super().connection_made(transport)
        self._look_later()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop looking."""
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count what comes, and refuse headers without an end."""
        self._arrived_bytes += len(data)
        super().data_received(data)
        if self._in_head and self._in_request and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self.transport.write(
                    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
                )
                self.transport.close()

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._in_head, self._in_request, self._head_bytes = True, True, 0

    def on_headers_complete(self) -> None:
        """Its body follows."""
        self._in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """It is whole."""
        self._in_request = False
        super().on_message_complete()

    def _look_later(self) -> None:
        self._timer = self.loop.call_later(self._look_s, self._look)

    def _look(self) -> None:
        if self._is_slow_sender():
            self.logger.info("A client was silent in the middle of its request.")
            self.transport.abort()
        elif self._is_slow_reader():
            self.logger.info("A client did not read its answer.")
            self.transport.abort()
        else:
            self._look_later()

    def _is_slow_sender(self) -> bool:
        arrived, self._arrived_bytes = self._arrived_bytes, 0
        asked_to_wait = self.cycle is not None and self.cycle.waiting_for_100_continue and not self._in_head
        came = arrived >= _MIN_BYTES_A_SECOND * self._look_s
        if came or not self._in_request or self.flow.read_paused or asked_to_wait:
            self._silent_looks = 0
        else:
            self._silent_looks += 1
        return self._silent_looks >= _LOOKS

    def _is_slow_reader(self) -> bool:
        before, self._unread_bytes = self._unread_bytes, self.transport.get_write_buffer_size()
        if 0 < before <= self._unread_bytes:
            self._unread_looks += 1
        else:
            self._unread_looks = 0
        return self._unread_looks * self._look_s >= _SLOW_READER_S
