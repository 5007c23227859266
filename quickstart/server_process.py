"""Starts the server for the quickstart, and ends it."""

import contextlib
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
_TAIL_LINES = 15


class ServerFailed(Exception):
    """The server did not come up; the message says why."""


def _home() -> Path:
    """Return the data directory as a full path, since the server's working directory is not ours."""
    chosen = Path(os.environ.get("PEFT_STUDIO_HOME") or _ROOT / ".studio")
    try:
        return chosen.expanduser().absolute()
    except RuntimeError:
        raise SystemExit(f"quickstart: PEFT_STUDIO_HOME={chosen}: this machine knows no such home folder") from None


class Server:
    """The server at an address. It is there already, or it is started here in a process group of its own."""

    def __init__(self, host: str, port: int) -> None:
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self._host, self._port = host, port
        self.home = _home()
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
            OSError: The log cannot be written, or the process not started.
        """
        answer = self._health()
        if answer is not None:
            if not answer:
                raise ServerFailed(f"{self.url} is taken by another program; choose another port with PORT= or --port")
            return 0.0
        started = time.monotonic()
        self._process = self._spawn()
        while not self._health():
            if (words := self.why_ended()) is not None:
                raise ServerFailed(words)
            if time.monotonic() - started > _READY_LIMIT_S:
                raise ServerFailed(f"the server did not answer within {_READY_LIMIT_S:g} s:\n{self._tail()}")
            time.sleep(0.05)
        return time.monotonic() - started

    def _spawn(self) -> subprocess.Popen[bytes]:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {
            "PEFT_STUDIO_HOME": str(self.home),
            "PEFT_STUDIO_HOST": self._host,
            "PEFT_STUDIO_PORT": str(self._port),
        }
        with self._log.open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "main.py"],
                cwd=_ROOT / "backend",
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a terminal's Ctrl-C is for the client, which then ends the server
            )

    def _health(self) -> bool | None:
        """Return whether the program that answers is this kind of server; None if none answers."""
        try:
            response = httpx.get(f"{self.url}/health", timeout=5, trust_env=False)
        except httpx.ConnectError:
            return None
        except httpx.HTTPError:
            return False
        try:
            return response.status_code == 200 and response.json() == {"status": "ok"}
        except ValueError:
            return False

    def why_ended(self) -> str | None:
        """Return how our server ended, with the last lines of its log; None if it runs or is not ours."""
        if self._process is None or self._process.poll() is None:
            return None
        return f"the server ended with exit code {self._process.returncode}:\n{self._tail()}"

    def _tail(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines()
        return "\n".join([*lines[-_TAIL_LINES:], f"(all of it: {self._log})"])

    def stop(self) -> None:
        """End the server if it is ours, and everything that it started. A second Ctrl-C ends the wait."""
        process, self._process = self._process, None
        if process is None:
            return
        try:
            process.terminate()
            process.wait(_STOP_LIMIT_S)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            pass  # then by force
        finally:
            # The rest of the group. An empty group is an error of lookup, or of permission on macOS.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
