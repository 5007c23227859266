"""Which of this program's processes the kernel ends first when memory runs out.

The kernel ends the process that is worst: the memory that it holds, and its oom_score_adj in thousandths of all the
memory there is (of the container's, where that is what ran out). A child has its parent's value. Source: man 5
proc_pid_oom_score_adj.

If the server is ended, so is everything that it runs. If an engine is ended, its job fails or goes on by itself. So
the server is the last of its processes to be ended, whichever of them holds most.
"""

from enum import IntEnum
from pathlib import Path

from core.logging import get_logger

_MOST = 1000
_log = get_logger(__name__)


class EndedBefore(IntEnum):
    """How much sooner than the server a process is ended, in thousandths of the memory."""

    SERVER = 300  # it does work of its own; web browsers mark their pages alike
    EVERYTHING = 1000  # it holds nothing that anybody needs


def mark(pid: int, order: EndedBefore) -> None:
    """Have a process that this one started ended sooner than this one. It does nothing where there is no such order.

    Args:
        pid: The process; nothing is done if it has ended.
        order: How much sooner. A process that was marked may be marked again, also with less.
    """
    try:
        own = int(Path("/proc/self/oom_score_adj").read_text())
        Path(f"/proc/{pid}/oom_score_adj").write_text(str(min(_MOST, own + order)))
    except (FileNotFoundError, ProcessLookupError):
        return  # no Linux, or it has ended
    except OSError as error:  # /proc is read-only, or the process is another user's
        _log.warning("oom_order.not_marked", pid=pid, reason=str(error))
