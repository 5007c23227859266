"""The container's health check, as the program that the container engine starts."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from lock_requirements import ROOT


@contextmanager
def _server(status: int) -> Iterator[int]:
    """Serve /health with a status; give the port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()
            self.wfile.write(b"the body")

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def _ask(port: int, host: str) -> subprocess.CompletedProcess[str]:
    # A proxy is set that nobody answers at: it must not be asked.
    proxy = {"http_proxy": "http://127.0.0.1:1", "HTTP_PROXY": "http://127.0.0.1:1"}
    environment = os.environ | proxy | {"PEFT_STUDIO_HOST": host, "PEFT_STUDIO_PORT": str(port)}
    command = [sys.executable, str(ROOT / "container/health.py")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1", "localhost", ""])
def test_a_server_that_answers_is_healthy(host: str) -> None:
    with _server(200) as port:
        answer = _ask(port, host)
    assert (answer.returncode, answer.stdout) == (0, "the body\n")


def test_a_server_that_answers_with_an_error_is_not() -> None:
    with _server(503) as port:
        answer = _ask(port, "0.0.0.0")
    assert (answer.returncode, answer.stdout) == (1, "the body\n")


def test_no_server_is_not_healthy_and_the_reason_is_said() -> None:
    with _server(200) as port:
        pass
    answer = _ask(port, "0.0.0.0")
    assert answer.returncode == 1
    assert f"127.0.0.1:{port}" in answer.stdout
    assert "refused" in answer.stdout
    assert answer.stderr == ""
