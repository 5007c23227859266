"""How far engines give way to other programs, and whether one that gives way to all of them can be called back."""

import os
import sys
import threading
from contextlib import suppress
from functools import cache
from pathlib import Path

LOWEST = 19


@cache
def can_be_raised(nice: int) -> bool:
    """Whether a process of this user that is at the lowest priority can be raised again.

    Root may do it, and whoever RLIMIT_NICE or CAP_SYS_NICE allows it; other users may only lower a priority. It is
    tried on a thread of its own, since Linux keeps a priority for each thread.

    Args:
        nice: How far below this process it is to be afterwards.
    """
    if sys.platform != "linux":
        return False
    raised: list[bool] = []

    def trial() -> None:
        wanted = _beside_this_process(nice)
        os.setpriority(os.PRIO_PROCESS, 0, LOWEST)
        try:
            os.setpriority(os.PRIO_PROCESS, 0, wanted)
        except PermissionError:
            return
        raised.append(True)

    thread = threading.Thread(target=trial, name="priority")
    thread.start()
    thread.join()
    return bool(raised)


def raise_to(pid: int, nice: int) -> None:
    """Raise every thread of a process. A thread that it begins has the priority of the one that began it.

    Args:
        pid: The process; nothing is done if it has ended.
        nice: How far below this process it is to be.
    """
    wanted = _beside_this_process(nice)
    seen: set[str] = set()
    while new := _threads(pid) - seen:  # until none has begun meanwhile
        for thread in new:
            with suppress(ProcessLookupError, PermissionError):
                os.setpriority(os.PRIO_PROCESS, int(thread), wanted)
        seen |= new


def _beside_this_process(nice: int) -> int:
    return min(LOWEST, os.getpriority(os.PRIO_PROCESS, os.getpid()) + nice)


def _threads(pid: int) -> set[str]:
    try:
        return {thread.name for thread in Path(f"/proc/{pid}/task").iterdir()}
    except (FileNotFoundError, ProcessLookupError):
        return set()
