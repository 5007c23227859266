"""Wakes waiting coroutines from any thread. It carries no data, so a slow listener loses nothing."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Broadcast:
    """Listeners by topic. Each holds one asyncio.Event on its own loop; a notification sets it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listeners: dict[str, set[tuple[asyncio.AbstractEventLoop, asyncio.Event]]] = {}

    @contextmanager
    def listening(self, topic: str) -> Iterator[asyncio.Event]:
        """Register an event that every notification of the topic sets, for the length of the block.

        Clear it before reading what is new, so that a notification in between is not lost.
        """
        listener = (asyncio.get_running_loop(), asyncio.Event())
        with self._lock:
            self._listeners.setdefault(topic, set()).add(listener)
        try:
            yield listener[1]
        finally:
            with self._lock:
                self._listeners[topic].discard(listener)
                if not self._listeners[topic]:
                    del self._listeners[topic]

    def notify(self, topic: str) -> None:
        """Wake the topic's listeners. May be called from any thread."""
        with self._lock:
            listeners = list(self._listeners.get(topic, ()))
        for loop, event in listeners:
            try:
                loop.call_soon_threadsafe(event.set)
            except RuntimeError:
                continue  # the listener's loop has closed, so nobody listens
