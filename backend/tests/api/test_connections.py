"""Connections that clients hold by sending or reading nothing, and clients that ask too much at once."""

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from api.connection import MAX_HEAD_BYTES
from tests.support.server import StudioServer, start_server, wait_until
from tests.support.untouched import untouched

LIMIT = 40
HALVES = {
    "nothing": b"",
    "half a line": b"GET /heal",
    "half of the headers": b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX-A: ",
    "half of a JSON body": b"POST /api/peft/configure HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    b"Content-Length: 100\r\n\r\n{",
    "half of a chunk": b"POST /api/peft/configure HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n5\r\n{",
    "half of an upload": b"POST /api/datasets HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    b"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 1000\r\n\r\n--b\r\n"
    b'Content-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n{"mess',
    "the rest after a whole request": b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\nGET /hea",
}


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory, model_dirs: Path) -> Iterator[StudioServer]:
    """A server that waits a second for the rest of a request, and answers 40 requests of a client at a time."""
    environment = {"PEFT_STUDIO_SLOW_REQUEST_S": "1", "PEFT_STUDIO_MAX_REQUESTS_PER_CLIENT": str(LIMIT)}
    with start_server(tmp_path_factory.mktemp("home"), model_dirs, **environment) as server:
        yield server


def _open(studio: StudioServer, sent: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", studio.port), timeout=600)
    connection.sendall(sent)
    return connection


def _ends(connection: socket.socket) -> bool:
    """Read what comes until the server closes; a connection that it leaves open is a time-out of the socket."""
    with connection:
        try:
            while connection.recv(65536):
                pass
        except ConnectionResetError:
            pass
    return True


def _sockets(studio: StudioServer) -> int:
    """Count the server's sockets, connections that it has not closed yet among them."""
    count = 0
    for link in Path(f"/proc/{studio.pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed in this moment
            count += os.readlink(link).startswith("socket:")
    return count


def _half_sent(studio: StudioServer, of_each: int) -> None:
    with untouched(studio):
        opened = [_open(studio, sent) for _ in range(of_each) for sent in HALVES.values()]
        assert all(_ends(connection) for connection in opened)


def test_half_sent_requests_are_closed_and_leave_nothing(impatient: StudioServer) -> None:
    _half_sent(impatient, of_each=3)
    assert impatient.http.get("/health").status_code == 200


@pytest.mark.slow
def test_200_half_sent_requests_are_closed_with_the_default_settings(studio: StudioServer) -> None:
    _half_sent(studio, of_each=29)


def test_a_client_that_sends_slowly_and_steadily_is_heard(impatient: StudioServer) -> None:
    """What counts is silence, not how long a request takes: 15 pieces, with less than a second between any two."""
    body = b" " * 15_000 + b"{}"
    connection = _open(
        impatient,
        b"POST /api/peft/configure HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body),
    )
    for begin in range(0, len(body), 1000):
        connection.sendall(body[begin : begin + 1000])
    assert connection.recv(65536).startswith(b"HTTP/1.1 200")
    connection.close()


def test_headers_without_an_end_are_refused(impatient: StudioServer) -> None:
    connection = _open(impatient, b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX-A: " + b"a" * (2 * MAX_HEAD_BYTES))
    assert connection.recv(65536).startswith(b"HTTP/1.1 431")
    assert _ends(connection)


def test_one_client_has_so_many_requests_at_once_and_is_told_when_to_come_again(impatient: StudioServer) -> None:
    http = impatient.http
    with untouched(impatient), ExitStack() as streams:
        for _ in range(LIMIT):
            streams.enter_context(http.stream("GET", "/api/hardware/stream", timeout=600))
        refused = http.get("/api/peft/use-cases")
        assert (refused.status_code, refused.json()["type"]) == (429, "/problems/too-many-requests")
        assert refused.headers["retry-after"] == "1"
        error = http.get("/v1/models").json()["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "too_many_requests")
        assert http.get("/health").status_code == 200
        # The same refusals as ever come before this one: a foreign page learns nothing of it.
        assert http.get("/v1/models", headers={"Origin": "http://evil.example"}).status_code == 403
    wait_until(lambda: http.get("/api/peft/use-cases").status_code == 200)


def _vanish(studio: StudioServer, times: int) -> None:
    """Readers of a stream that go away without a word; the server has no connection and no file of theirs left."""
    http = studio.http
    assert http.get("/health").status_code == 200  # over the connection that `http` keeps
    before = _sockets(studio)
    for path in ("/api/hardware/stream", "/home/stream"):
        for _ in range(times // 2):
            request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()
            with _open(studio, request) as connection:
                assert connection.recv(1000).startswith(b"HTTP/1.1 200")
    wait_until(lambda: _sockets(studio) <= before)
    wait_until(lambda: http.get("/api/peft/use-cases").status_code == 200)  # none counts as under way


def test_readers_of_streams_that_vanish_are_let_go(impatient: StudioServer) -> None:
    _vanish(impatient, 2 * LIMIT)


@pytest.mark.slow
def test_1000_readers_of_streams_that_vanish_are_let_go(studio: StudioServer) -> None:
    _vanish(studio, 1000)
