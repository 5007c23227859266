"""Gives tasks to processes that stay, one for each engine, as imports cost more than a task; within limits of time."""

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from gpu_check import BACKEND, ROOT

# What a task may leave on the GPU before its process ends: more of it would be counted in the next one's peak.
KEPT_BYTES = 64 * 2**20
OUT_OF_TIME = "the time for the whole check was over"

Answer = dict[str, Any]


class Worker:
    """A process that does one task after another: `python -m gpu_check.worker ENGINE`."""

    def __init__(self, engine: str, folder: Path, log: Path) -> None:
        """Start it. Its imports begin at once, so that they pass while others work."""
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT / "bench"), str(BACKEND)]),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "UNSLOTH_DISABLE_STATISTICS": "1",
            "UNSLOTH_COMPILE_LOCATION": str(folder / "compiled"),
        }
        self.log = log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "gpu_check.worker", engine],
                cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output,
            )  # fmt: skip
        self._lines: queue.Queue[bytes | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def do(self, task: Mapping[str, Any], limit_s: float) -> Answer | None:
        """Do a task.

        Returns:
            Its answer, with `error` where it failed; None where it took longer than the limit. In both cases the
            process may have ended: see `alive`.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(task).encode() + b"\n")
            self._process.stdin.flush()
            line = self._lines.get(timeout=limit_s)
        except queue.Empty:
            self.end()
            return None
        except OSError:  # it ended while it had nothing to do
            line = None
        if line is None:
            return {"error": f"the process ended with exit code {self._process.wait()}"}
        answer = json.loads(line)
        if not isinstance(answer, dict):
            raise ValueError(f"{task['id']}: no answer but {line!r}")
        if "error" in answer or (answer.get("kept_bytes") or 0) > KEPT_BYTES:
            self.end()  # what failed may hold memory, or have left a library half patched
        return answer

    @property
    def alive(self) -> bool:
        """Whether it can take another task."""
        return self._process.poll() is None

    def end(self) -> None:
        """End it at once, if it has not ended."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None and not pipe.closed:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue  # what was left to write has no reader any more


class Workers:
    """The processes of a check, one for each engine, and the time that is left to it."""

    def __init__(self, folder: Path, *, task_limit_s: float, deadline: float | None) -> None:
        """Start none yet.

        Args:
            folder: Where their logs go.
            task_limit_s: How long a task may take.
            deadline: A `time.monotonic()` after which no task begins, and the one that runs is ended.
        """
        self._folder, self._task_limit_s, self._deadline = folder, task_limit_s, deadline
        self._workers: dict[str, Worker] = {}

    def __enter__(self) -> "Workers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers.values():
            worker.end()

    def start(self, engine: str) -> Worker:
        """Return an engine's process, which begins its imports if it is new."""
        worker = self._workers.get(engine)
        if worker is None or not worker.alive:
            self._folder.mkdir(parents=True, exist_ok=True)
            worker = self._workers[engine] = Worker(engine, self._folder, self._folder / f"{engine}.log")
        return worker

    @property
    def left_s(self) -> float:
        """Seconds until the deadline; infinite without one."""
        return float("inf") if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def do(self, task: Mapping[str, Any]) -> Answer:
        """Do a task in its engine's process.

        Returns:
            The answer, with `error` where it failed or took too long, or with `left_out` where the time was over.
        """
        left = self.left_s
        if left <= 0:
            return {"left_out": OUT_OF_TIME}
        print(f"{task['id']} …", file=sys.stderr, flush=True)
        worker, began = self.start(process_of(task)), time.monotonic()
        answer = worker.do(task, min(self._task_limit_s, left))
        if answer is None:
            if left < self._task_limit_s:
                return {"left_out": OUT_OF_TIME}
            answer = {"error": f"it took longer than {self._task_limit_s:g} s"}
        if "error" in answer:
            tail = worker.log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
            print(f"{answer['error']}; the last lines:\n" + "\n".join(tail), file=sys.stderr, flush=True)
        return answer | {"took_s": time.monotonic() - began}


def process_of(task: Mapping[str, Any]) -> str:
    """Return the engine in whose process a task is done. What compares with an engine is done by plain transformers."""
    return "unsloth" if task["kind"] == "prove" and task["engine"] == "unsloth" else "transformers"
