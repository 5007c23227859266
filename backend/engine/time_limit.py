"""A time limit for code of others that may never end."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from engine.errors import BadModel


@contextmanager
def cpu_limit(limit_s: float, message: str) -> Iterator[None]:
    """End the block once it has taken too much processor time. A busy machine does not shorten the limit.

    The limit works by a signal, which reaches only the main thread. An engine carries out its commands there. On other
    threads there is no limit.

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
