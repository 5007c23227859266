"""A control group of the kernel's own, of either version, for a test that runs as root."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

_ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Cgroup:
    """One group; `unified` is version 2."""

    folder: Path
    unified: bool

    def take(self, pid: int) -> None:
        """Move a process into it."""
        (self.folder / "cgroup.procs").write_text(str(pid))

    def let_go(self, pid: int) -> None:
        """Move a process out of it, to the group that it was made in."""
        (self.folder.parent / "cgroup.procs").write_text(str(pid))


@contextmanager
def cgroup(controller: str, limit: str, unified_limit: str) -> Iterator[Cgroup]:
    """Make a group for the length of the block; processes that are left in it afterwards go to the root.

    Args:
        controller: As version 1 names its folder: `cpu` or `memory`.
        limit: A file that a group of version 1 has if the controller limits it.
        unified_limit: That of version 2.
    """
    unified = (_ROOT / "cgroup.controllers").exists()
    root = _ROOT if unified else _ROOT / controller
    if os.getuid() != 0 or not root.is_dir():
        pytest.skip(f"a limit of {controller} takes root and cgroups")
    group = Cgroup(root / f"peft-studio-{uuid.uuid4().hex[:8]}", unified)
    try:
        group.folder.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup can be made: {error}")
    try:
        if not (group.folder / (unified_limit if unified else limit)).exists():
            pytest.skip(f"the controller {controller} is not handed down to new cgroups")
        yield group
    finally:
        for pid in (group.folder / "cgroup.procs").read_text().split():
            with suppress(OSError):  # it ended
                group.let_go(int(pid))
        with suppress(OSError):  # a process is still ending; an empty group is no harm
            group.folder.rmdir()
