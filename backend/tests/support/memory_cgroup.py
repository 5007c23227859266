"""A memory limit of the kernel's own, around processes that are running."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from tests.support.cgroup import Cgroup, cgroup


class MemoryCgroup:
    """A group that may take so much memory."""

    def __init__(self, group: Cgroup) -> None:
        self._group = group

    @contextmanager
    def around(self) -> Iterator[None]:
        """Put this process into it for the length of the block: what is started there belongs to it from the start."""
        own = os.getpid()
        self._group.take(own)
        try:
            yield
        finally:
            self._group.let_go(own)

    def limit(self, size_bytes: int) -> None:
        """Let its processes take so much, with no swap besides; beyond, the kernel kills the largest of them."""
        folder, unified = self._group.folder, self._group.unified
        names = ("memory.max",) if unified else ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes")
        for name in names:
            if (folder / name).exists():
                (folder / name).write_text(str(size_bytes))
        if unified and (folder / "memory.swap.max").exists():
            (folder / "memory.swap.max").write_text("0")

    def used_bytes(self) -> int:
        """Return what is charged to it."""
        name = "memory.current" if self._group.unified else "memory.usage_in_bytes"
        return int((self._group.folder / name).read_text())


@contextmanager
def memory_cgroup() -> Iterator[MemoryCgroup]:
    """Make a group for the length of the block."""
    with cgroup("memory", "memory.limit_in_bytes", "memory.max") as group:
        yield MemoryCgroup(group)
