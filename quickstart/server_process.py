"""Starts the server for the quickstart, and ends it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx

_ROOT = Path(__file__).resolve().parent.parent
_READY_LIMIT_S = 60.0
_STOP_LIMIT_S = 20.0


class ServerFailed(Exception):
    """The server did not come up; the message says why."""


class Server:
    """The server at an address: one that is there already, or one of our own in a process group of its own."""

    def __init__(self, host: str, port: int) -> None:
        self.url = f"http://{host}:{port}"
        self._host, self._port = host, port
        self.home = Path(os.environ.get("PEFT_STUDIO_HOME") or _ROOT / ".studio")
        self._log = self.home / "logs" / "quickstart-server.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def is_ours(self) -> bool:
        """Whether this object started it."""
        return self._process is not None

    def start(self) -> float:
        """Make sure that a server answers.

        Returns:
            Seconds from the process's start to its first answer; 0 for one that was there.

        Raises:
            ServerFailed: Something else has the port, or the server ended.
        """
        answer = self._health()
        if answer is not None:
            if not answer:
                raise ServerFailed(f"{self.url} is taken by another program; choose another with PORT=...")
            return 0.0
        self._log.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {
            "PEFT_STUDIO_HOME": str(self.home),
            "PEFT_STUDIO_HOST": self._host,
            "PEFT_STUDIO_PORT": str(self._port),
        }
        started = time.monotonic()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "main.py"],
                cwd=_ROOT / "backend",
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        while not self._health():
            if self._process.poll() is not None:
                tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])
                raise ServerFailed(f"the server ended with exit code {self._process.returncode}:\n{tail}")
            if time.monotonic() - started > _READY_LIMIT_S:
                raise ServerFailed(f"the server did not answer within {_READY_LIMIT_S:g} s; see {self._log}")
            time.sleep(0.05)
        return time.monotonic() - started

    def _health(self) -> bool | None:
        """Return whether it is our kind of server that answers, or None if nothing does."""
        try:
            response = httpx.get(f"{self.url}/health", timeout=5)
        except httpx.ConnectError:
            return None
        except httpx.HTTPError:
            return False
        return response.status_code == 200 and response.text.replace(" ", "") == '{"status":"ok"}'

    def stop(self) -> None:
        """End the server if it is ours, and everything it started."""
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self._process = None
