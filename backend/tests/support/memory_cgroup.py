"""A memory limit of the kernel's own, around processes that are running."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

_ROOT = Path("/sys/fs/cgroup")


class MemoryCgroup:
    """A cgroup, of either version."""

    def __init__(self, folder: Path, *, unified: bool) -> None:
        self._folder, self._unified = folder, unified

    def take(self, pid: int) -> None:
        """Move a process into it. What it uses so far stays charged to where it was."""
        (self._folder / "cgroup.procs").write_text(str(pid))

    @contextmanager
    def around(self) -> Iterator[None]:
        """Put this process into it for the length of the block: what is started there belongs to it from the start."""
        own = os.getpid()
        self.take(own)
        try:
            yield
        finally:
            (self._folder.parent / "cgroup.procs").write_text(str(own))

    def limit(self, size_bytes: int) -> None:
        """Let its processes take so much, with no swap besides; beyond, the kernel kills the largest of them."""
        names = ("memory.max",) if self._unified else ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes")
        for name in names:
            if (self._folder / name).exists():
                (self._folder / name).write_text(str(size_bytes))
        if self._unified and (self._folder / "memory.swap.max").exists():
            (self._folder / "memory.swap.max").write_text("0")

    def used_bytes(self) -> int:
        """Return what is charged to it."""
        return int((self._folder / ("memory.current" if self._unified else "memory.usage_in_bytes")).read_text())

    def release(self) -> None:
        """Remove it; processes that are left go to the root."""
        for pid in (self._folder / "cgroup.procs").read_text().split():
            with suppress(OSError):  # it ended
                (self._folder.parent / "cgroup.procs").write_text(pid)
        with suppress(OSError):  # a process is still ending; an empty group is no harm
            self._folder.rmdir()


@contextmanager
def memory_cgroup() -> Iterator[MemoryCgroup]:
    """Make a cgroup for the length of the block."""
    unified = (_ROOT / "cgroup.controllers").exists()
    if os.getuid() != 0 or not (unified or (_ROOT / "memory").is_dir()):
        pytest.skip("a memory limit takes root and cgroups")
    folder = (_ROOT if unified else _ROOT / "memory") / f"peft-studio-{uuid.uuid4().hex[:8]}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup can be made: {error}")
    group = MemoryCgroup(folder, unified=unified)
    try:
        if not (folder / ("memory.max" if unified else "memory.limit_in_bytes")).exists():
            pytest.skip("the memory controller is not handed down to new cgroups")
        yield group
    finally:
        group.release()
