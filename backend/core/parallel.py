"""Does the same work on many items, a few at once."""

import contextvars
import threading
from collections.abc import Callable, Iterable
from queue import Empty, SimpleQueue
from typing import TypeVar

T = TypeVar("T")


def start_workers(work: Callable[[T], None], things: Iterable[T], workers: int, name: str) -> list[threading.Thread]:
    """Start threads that do the work on each item. Each thread sees the caller's context variables.

    The threads are daemons, so work that hangs does not keep the process from ending.

    Args:
        work: Takes one item. It must not raise.
        things: The items.
        workers: How many threads at most.
        name: The name of the threads.

    Returns:
        The threads, to be joined.
    """
    queue: SimpleQueue[T] = SimpleQueue()
    for thing in things:
        queue.put(thing)

    def run() -> None:
        while True:
            try:
                thing = queue.get_nowait()
            except Empty:
                return
            work(thing)

    threads = [
        threading.Thread(target=contextvars.copy_context().run, args=(run,), name=name, daemon=True)
        for _ in range(min(workers, queue.qsize()))
    ]
    for thread in threads:
        thread.start()
    return threads
