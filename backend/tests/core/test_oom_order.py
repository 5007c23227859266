"""Which process the kernel ends first when memory runs out, by the kernel's own account."""

import subprocess
import sys
from pathlib import Path

import pytest

from core.oom_order import EndedBefore, mark

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="oom_score_adj is Linux's")


def _score(pid: int | str) -> int:
    return int(Path(f"/proc/{pid}/oom_score").read_text())


def test_a_small_process_is_ended_before_this_large_one_and_may_be_marked_with_less_later() -> None:
    process = subprocess.Popen(["sleep", "600"])
    try:
        mark(process.pid, EndedBefore.EVERYTHING)
        first = _score(process.pid)
        mark(process.pid, EndedBefore.SERVER)
        assert first > _score(process.pid) > _score("self")
    finally:
        process.kill()
        process.wait()


def test_a_process_that_has_ended_is_no_error() -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    mark(process.pid, EndedBefore.SERVER)
