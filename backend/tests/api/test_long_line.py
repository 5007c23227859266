"""A line of a gigabyte in an upload is refused by its number, and nobody holds it in memory."""

import threading
from collections.abc import Iterator

import psutil
import pytest

from tests.support.server import StudioServer
from tests.support.untouched import untouched

_GIB = 2**30


@pytest.mark.slow
def test_a_line_of_a_gigabyte_is_refused_by_its_number_in_bounded_memory(studio: StudioServer) -> None:
    def body() -> Iterator[bytes]:
        yield b"--x\r\nContent-Disposition: form-data; name=file; filename=a.jsonl\r\n\r\n"
        yield b'{"prompt": "a", "completion": "b"}\n{"prompt": "'
        for _ in range(_GIB // 2**20):
            yield b"x" * 2**20
        yield b'"}\n\r\n--x--\r\n'

    most, done = [0], threading.Event()

    def watch() -> None:
        server = psutil.Process(studio.pid)
        while not done.wait(0.05):
            for process in (server, *server.children(recursive=True)):
                try:
                    most[0] = max(most[0], process.memory_info().rss)
                except psutil.NoSuchProcess:
                    continue

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with untouched(studio):
            headers = {"Content-Type": "multipart/form-data; boundary=x"}
            response = studio.http.post("/api/datasets", content=body(), headers=headers, timeout=600)
    finally:
        done.set()
        watcher.join()
    assert (response.status_code, response.json()["type"]) == (422, "/problems/dataset-rejected"), response.text
    assert response.json()["errors"][0]["line"] == 2
    assert most[0] < _GIB // 2
