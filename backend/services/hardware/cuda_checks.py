"""Runs the torch side of the CUDA validation in a process of its own, so that a crash becomes a failed check."""

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from core import oom_order
from core.environment import without_secrets
from core.oom_order import EndedBefore

_BACKEND = Path(__file__).resolve().parents[2]
_LIMIT_S = 180.0  # importing Unsloth alone takes 10 s, and a first CUDA context several
_TAIL_LINES = 5
_TAIL_BYTES = 8192
RESULT_FD_VARIABLE = "PEFT_STUDIO_RESULT_FD"
# The checks import what an engine imports. Like an engine, they make no requests.
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
}


@dataclass(frozen=True)
class CudaCheck:
    """One check: what was found, and what to do about it."""

    name: str
    status: Literal["pass", "fail", "warn", "skip"]
    detail: str
    fix: str | None


def run_cuda_checks(
    command: tuple[str, ...] = ("-m", "engine.cuda_checks"), limit_s: float = _LIMIT_S
) -> list[CudaCheck]:
    """Run the checks. If the process dies or hangs, that is a failed check.

    The result is one line of JSON on a separate pipe, apart from what the libraries print.

    Args:
        command: What the interpreter runs.
        limit_s: Seconds until the process, and whatever it started, is killed.
    """
    deadline_s = time.monotonic() + limit_s
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryFile() as log:
        read, write = os.pipe()
        try:
            process = _start(command, write, scratch, log)
        except OSError as error:
            os.close(read)
            return [_failed(f"The checks do not start: {error}.", "Free memory, or raise the process limit.")]
        finally:
            os.close(write)
        oom_order.mark(process.pid, EndedBefore.SERVER)
        with os.fdopen(read, "rb", buffering=0) as results:
            document = _read_line(results.fileno(), deadline_s)
        code = _wait(process, deadline_s)
        return [*_parse(document), *_ending(code, document, limit_s, log)]


def _start(command: tuple[str, ...], write: int, scratch: str, log: IO[bytes]) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=_BACKEND,
        env={
            **without_secrets(os.environ),
            **_ENVIRONMENT,
            "PEFT_STUDIO_PARENT_PID": str(os.getpid()),
            "UNSLOTH_COMPILE_LOCATION": scratch,
            RESULT_FD_VARIABLE: str(write),
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=log,  # a file: a pipe would stay open as long as any process that the checks started
        pass_fds=(write,),
        start_new_session=True,  # so that those processes can be killed with it
    )


def _read_line(descriptor: int, deadline_s: float) -> bytes:
    """Return what was written up to the first newline, the pipe's end or the deadline."""
    received = b""
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while b"\n" not in received:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0 or not selector.select(left_s):
                break
            part = os.read(descriptor, 65536)
            if not part:
                break
            received += part
    return received


def _wait(process: "subprocess.Popen[bytes]", deadline_s: float) -> int | None:
    """Return the exit code, or None after killing what had not ended by the deadline."""
    try:
        return process.wait(max(0.0, deadline_s - time.monotonic()))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


def _parse(document: bytes) -> list[CudaCheck]:
    if not document.endswith(b"\n"):
        return []  # the process ended, or was killed, before the document did
    return [CudaCheck(**check) for check in json.loads(document)]


def _ending(code: int | None, document: bytes, limit_s: float, log: IO[bytes]) -> list[CudaCheck]:
    """Return a failed check unless the process ended as it should, with its document written."""
    whole = document.endswith(b"\n")
    if code == 0 and whole:
        return []
    if code is None:
        how, fix = f"did not end within {limit_s:g} s", "Look for Xid errors in `dmesg`; restart the driver."
    elif code < 0:
        how, fix = f"ended with signal {-code} ({_signal_name(-code)})", "Reinstall torch for this driver."
    else:
        how, fix = f"ended with exit code {code}", "Reinstall torch for this driver."
    how += ", after their results" if whole else ", before their results"
    tail = _tail(log)
    return [_failed(f"The checks {how}." + (f" Last lines: {tail}" if tail else ""), fix)]


def _failed(detail: str, fix: str) -> CudaCheck:
    return CudaCheck("torch", "fail", detail, fix)


def _signal_name(number: int) -> str:
    return next((known.name for known in signal.Signals if known.value == number), "unknown")


def _tail(log: IO[bytes]) -> str:
    size = log.seek(0, os.SEEK_END)
    log.seek(max(0, size - _TAIL_BYTES))
    lines = log.read().decode("utf-8", "replace").splitlines()
    return " | ".join([line.strip() for line in lines if line.strip()][-_TAIL_LINES:])
