"""An end to code of others that does not come to one."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from engine.errors import BadModel


@contextmanager
def cpu_limit(limit_s: float, message: str) -> Iterator[None]:
    """End what takes too long. Processor time is counted, so that a busy machine ends nothing.

    Signals reach the main thread alone, where an engine carries out its commands; elsewhere there is no limit.

    Raises:
        BadModel: The limit was passed.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def end(_signal: int, _frame: FrameType | None) -> None:
        raise BadModel(message)

    before = signal.signal(signal.SIGVTALRM, end)
    signal.setitimer(signal.ITIMER_VIRTUAL, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
