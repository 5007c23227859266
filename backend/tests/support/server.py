"""A real server process, and the calls that the tests make most."""

import io
import os
import signal
import socket
import subprocess
import sys
import time
import zipfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import psutil

BACKEND = Path(__file__).resolve().parents[2]
# Prepared models are kept between runs: preparing the embedded one takes half a minute.
CACHE = Path(os.environ.get("PEFT_STUDIO_TEST_CACHE") or BACKEND.parent / ".cache")
_LIMIT_S = 600.0  # what a busy machine may take for what takes a second; nothing that goes well waits so long


def free_port() -> int:
    """Return a port that nothing listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


class StudioServer:
    """`python main.py` with a data directory and environment of its own."""

    def __init__(self, home: Path, environment: dict[str, str]) -> None:
        self.home, self.port = home, free_port()
        self._environment = (
            os.environ
            | environment
            | {
                "PEFT_STUDIO_HOME": str(home),
                "PEFT_STUDIO_PORT": str(self.port),
            }
        )
        self.log_path = home / "server.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=_LIMIT_S)

    def start(self) -> Self:
        """Start it and wait for /health."""
        self.home.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "main.py"], cwd=BACKEND, env=self._environment, stdout=log, stderr=log
            )
        deadline = time.monotonic() + _LIMIT_S
        while True:
            try:
                if self.http.get("/health").status_code == 200:
                    return self
            except httpx.TransportError:
                pass
            assert self.process.poll() is None, self.log_path.read_text()
            assert time.monotonic() < deadline, self.log_path.read_text()
            time.sleep(0.02)

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def engine(self) -> psutil.Process:
        """Return the one engine that is there, or will be shortly."""
        wait_until(lambda: len(self.engines()) == 1)
        return self.engines()[0]

    def engines(self) -> list[psutil.Process]:
        """Return the engine processes below the server, but for the one that describes models and holds none."""
        found = []
        for child in psutil.Process(self.pid).children():
            with suppress(psutil.NoSuchProcess):  # it ended in this moment
                if "engine" in (words := child.cmdline()) and words[-1] != "none":
                    found.append(child)
        return found

    def processor_s(self) -> float:
        """Return the processor time that the server has taken, without its engines."""
        used = psutil.Process(self.pid).cpu_times()
        return float(used.user + used.system)

    def kill(self) -> None:
        """kill -9."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM, and the exit code."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=_LIMIT_S)

    def __enter__(self) -> Self:
        running = self.process is not None and self.process.poll() is None
        return self if running else self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self.http.close()

    # Calls

    def load(self, model_id: str, **body: Any) -> dict[str, Any]:
        response = self.http.post("/api/peft/load-model", json={"model_id": model_id, "wait_s": _LIMIT_S, **body})
        assert response.status_code == 200, response.text
        return dict(response.json())

    def upload(self, text: str, filename: str = "data.jsonl", **form: str) -> dict[str, Any]:
        response = self.http.post("/api/datasets", files={"file": (filename, text.encode())}, data=form)
        assert response.status_code == 201, response.text
        return dict(response.json())

    def submit(self, **body: Any) -> dict[str, Any]:
        response = self.http.post("/api/training/jobs", json=body)
        assert response.status_code == 202, response.text
        return dict(response.json())

    def job(self, job_id: str) -> dict[str, Any]:
        return dict(self.http.get(f"/api/training/jobs/{job_id}").json())

    def events(self, job_id: str, last_event_id: int = 0) -> list[tuple[int, str]]:
        """Follow the job's stream to its end; return (sequence, kind)."""
        found: list[tuple[int, str]] = []
        kind = ""
        headers = {"Last-Event-ID": str(last_event_id)}
        with self.http.stream("GET", f"/api/training/jobs/{job_id}/events", headers=headers) as stream:
            for line in stream.iter_lines():
                name, _, value = line.partition(": ")
                if name == "event":
                    kind = value
                elif name == "id":
                    found.append((int(value), kind))
        return found

    def wait_for_state(self, job_id: str, *states: str, limit_s: float = _LIMIT_S) -> dict[str, Any]:
        """Wait until the job is in one of the states, and return it."""
        deadline = time.monotonic() + limit_s
        while (job := self.job(job_id))["state"] not in states:
            assert time.monotonic() < deadline, job
            time.sleep(0.05)
        return job

    def metrics(self, job_id: str) -> dict[int, float]:
        """Return the loss of each recorded step; each step may be there once."""
        rows = self.http.get(f"/api/training/jobs/{job_id}/metrics").json()["metrics"]
        losses = {row["step"]: row["loss"] for row in rows}
        assert len(losses) == len(rows), "a step is recorded twice"
        return losses

    def adapter_weights(self, adapter_id: str) -> bytes:
        """Return the weights of an adapter, through its download."""
        content = self.http.get(f"/api/adapters/{adapter_id}/download").content
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return archive.read("adapter_model.safetensors")

    def wait_for_step(self, job_id: str, step: int) -> None:
        """Read the stream until a step is reported."""
        with self.http.stream("GET", f"/api/training/jobs/{job_id}/events") as stream:
            for line in stream.iter_lines():
                if line.startswith("data:") and f'"step": {step},' in line:
                    return
        raise AssertionError(f"the job ended before step {step}: {self.job(job_id)}")

    def generate(self, loaded_id: str, content: str, adapter_id: str | None = None, **body: Any) -> dict[str, Any]:
        response = self.http.post(
            f"/api/peft/loaded-models/{loaded_id}/generate",
            json={
                "messages": [{"role": "user", "content": content}],
                "adapter_id": adapter_id,
                "temperature": 0,
                "max_new_tokens": 16,
                **body,
            },
        )
        assert response.status_code == 200, response.text
        return dict(response.json())


def start_server(home: Path, model_dirs: Path, **environment: str) -> StudioServer:
    """Start a server on a free port, with no Hub."""
    return StudioServer(
        home,
        {"PEFT_STUDIO_MODEL_DIRS": str(model_dirs), "PEFT_STUDIO_CACHE_DIR": str(CACHE), "HF_HUB_OFFLINE": "1"}
        | environment,
    )


def wait_until(condition: Any, limit_s: float = 120.0, instead: Any = None) -> None:
    """Poll a condition that another process makes true; `instead` says, if it does not, what is the case."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, instead() if instead else "the condition did not come true in time"
        time.sleep(0.05)
