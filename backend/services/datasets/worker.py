"""Runs the reading of a file in a process of its own, and understands how it ended."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from core.errors import DatasetRejected, StorageFull
from core.logging import get_logger
from services.datasets.intake import IntakeRequest, IntakeResult

_BACKEND = Path(__file__).resolve().parents[2]
_TAIL_BYTES = 4096
# A reader needs no secret, and asks nobody for anything.
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

    Raises:
        DatasetRejected: As it says; or the process died over the file.
        StorageFull: There is no room for the rows.
    """
    with tempfile.TemporaryFile() as log, _start(log) as process:
        final: dict[str, Any] | None = None
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("the reader has no pipes")
        try:
            process.stdin.write(json.dumps(asdict(request)).encode() + b"\n")
            process.stdin.close()
            for line in process.stdout:
                message = json.loads(line)
                if "rows" in message:
                    report(message["rows"], message["bytes"])
                else:
                    final = message
        except BrokenPipeError:
            final = None  # it died before it read the request; how, is told below
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
