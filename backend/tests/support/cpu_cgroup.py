"""A processor that a running process hardly gets: a quota of the kernel's own."""

from collections.abc import Iterator
from contextlib import contextmanager

from tests.support.cgroup import cgroup


@contextmanager
def starved(pid: int) -> Iterator[None]:
    """Let a process have a thousandth of a processor for the length of the block. Its threads stay runnable."""
    with cgroup("cpu", "cpu.cfs_quota_us", "cpu.max") as group:
        if group.unified:
            (group.folder / "cpu.max").write_text("1000 1000000")
        else:
            (group.folder / "cpu.cfs_period_us").write_text("1000000")
            (group.folder / "cpu.cfs_quota_us").write_text("1000")
        group.take(pid)
        yield
