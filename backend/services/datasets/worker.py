"""Reads a file in a process of its own, and explains how the process ended."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector
from typing import IO, Any

from core import oom_order
from core.errors import DatasetRejected, StorageFull
from core.logging import get_logger
from core.oom_order import EndedBefore
from services.datasets.intake import IntakeRequest, IntakeResult

_BACKEND = Path(__file__).resolve().parents[2]
_TAIL_BYTES = 4096
_SILENCE_S = 0.5
# The reader needs no secret and makes no request.
_ENVIRONMENT = (
    "PATH",
    "LANG",
    "LC_ALL",
    "HOME",
    "TMPDIR",
    "SYSTEMROOT",
    "LD_LIBRARY_PATH",
    "PYTHONPATH",
    "VIRTUAL_ENV",
)
_log = get_logger(__name__)

Report = Callable[[int, int], None]
Reader = Callable[[IntakeRequest, Report], IntakeResult]


def read_in_process(request: IntakeRequest, report: Report) -> IntakeResult:
    """Do what `read_dataset` does, in a process of its own.

    Args:
        request: What to read.
        report: Called at least twice a second with the rows read and the bytes written. If it raises, the process ends.

    Raises:
        DatasetRejected: `read_dataset` says so, or the process died.
        StorageFull: There is no space for the rows.
    """
    with tempfile.TemporaryFile() as log, _start(log) as process:
        oom_order.mark(process.pid, EndedBefore.SERVER)
        final: dict[str, Any] | None = None
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("the reader has no pipes")
        try:
            process.stdin.write(json.dumps(asdict(request)).encode() + b"\n")
            process.stdin.close()
            told = (0, 0)
            for message in _messages(process.stdout):
                if message is None or "rows" in message:
                    told = (message["rows"], message["bytes"]) if message is not None else told
                    report(*told)
                else:
                    final = message
        except BrokenPipeError:
            final = None  # it died before it read the request; the reason is found below
        except BaseException:
            process.kill()
            raise
        code = process.wait()
        if final is None:
            log.seek(0, os.SEEK_END)
            log.seek(max(0, log.tell() - _TAIL_BYTES))
            tail = log.read().decode("utf-8", "replace")
            _log.error("dataset.reader_died", exit_code=code, log_tail=tail)
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            raise DatasetRejected(f"The process that read the file ended with {how}; its file is broken.", errors=[])
    return _outcome(final)


def _messages(pipe: IO[bytes]) -> Iterator[dict[str, Any] | None]:
    """Yield what the process says, and None whenever it has said nothing for a while."""
    unfinished = b""
    with DefaultSelector() as selector:
        selector.register(pipe, EVENT_READ)
        while True:
            if not selector.select(_SILENCE_S):
                yield None
                continue
            part = os.read(pipe.fileno(), 2**16)
            if not part:
                return
            *lines, unfinished = (unfinished + part).split(b"\n")
            yield from map(json.loads, lines)


def _outcome(final: dict[str, Any]) -> IntakeResult:
    if "result" in final:
        result = IntakeResult(**final["result"])
        result.answers = (result.answers[0], result.answers[1])
        return result
    kind = StorageFull if final["error"] == "StorageFull" else DatasetRejected
    raise kind(final["detail"], **final["extras"])


def _start(log: IO[bytes]) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-m", "services.datasets.intake"],
        cwd=_BACKEND,
        env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        start_new_session=True,  # a terminal's Ctrl-C is for the server
    )
