"""A processor that a running process hardly gets: a quota of the kernel's own."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_ROOT = Path("/sys/fs/cgroup")


@contextmanager
def starved(pid: int) -> Iterator[None]:
    """Let a process have a thousandth of a processor for the length of the block. Its threads stay runnable."""
    unified = (_ROOT / "cgroup.controllers").exists()
    if os.getuid() != 0 or not (unified or (_ROOT / "cpu").is_dir()):
        pytest.skip("a quota of the processor takes root and cgroups")
    root = _ROOT if unified else _ROOT / "cpu"
    folder = root / f"peft-studio-{uuid.uuid4().hex[:8]}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup can be made: {error}")
    try:
        if not (folder / ("cpu.max" if unified else "cpu.cfs_quota_us")).exists():
            pytest.skip("the processor's controller is not handed down to new cgroups")
        if unified:
            (folder / "cpu.max").write_text("1000 1000000")
        else:
            (folder / "cpu.cfs_period_us").write_text("1000000")
            (folder / "cpu.cfs_quota_us").write_text("1000")
        (folder / "cgroup.procs").write_text(str(pid))
        yield
    finally:
        for left in (folder / "cgroup.procs").read_text().split():
            (root / "cgroup.procs").write_text(left)
        folder.rmdir()
