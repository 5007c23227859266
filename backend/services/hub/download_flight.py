"""One download, whoever waits for it: how far it is, and whether anybody still wants it."""

import threading
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from core.clock import Clock
from core.errors import Conflict
from domain.hub.tree import RepoFile

_SPEED_WINDOW_S = 10.0
_SAMPLE_S = 0.1  # arrivals within it count as one


class DownloadCancelled(Conflict):
    """Nobody waits for the download any more."""

    slug, title = "download-cancelled", "Download cancelled"


@dataclass(frozen=True)
class Progress:
    """How far a download is. `bytes_per_s` is of the last ten seconds; None before anything has arrived."""

    done_bytes: int
    total_bytes: int
    bytes_per_s: float | None


class Flight:
    """One download, whoever waits for it."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._done: dict[str, int] = {}
        self._arrived: deque[tuple[float, int]] = deque()
        self.total_bytes: int | None = None
        self.waiting = 0
        self.stopped = threading.Event()
        self.future: Future[Path] = Future()

    def check(self) -> None:
        """Raise DownloadCancelled once nobody waits."""
        if self.stopped.is_set():
            raise DownloadCancelled("Nobody waits for the download any more.")

    def has(self, file: RepoFile, size_bytes: int, arrived_bytes: int = 0) -> None:
        """Record how much of a file is here, and how much of that has just come over the wire."""
        now = self._clock.monotonic()
        with self._lock:
            self._done[file.path] = size_bytes
            if self._arrived and now - self._arrived[-1][0] < _SAMPLE_S:
                self._arrived[-1] = (self._arrived[-1][0], self._arrived[-1][1] + arrived_bytes)
            else:
                self._arrived.append((now, arrived_bytes))
            while now - self._arrived[0][0] > _SPEED_WINDOW_S:
                self._arrived.popleft()

    def progress(self) -> Progress | None:
        """Return how far it is; None until it is known how much there is."""
        if self.total_bytes is None:
            return None
        now = self._clock.monotonic()
        with self._lock:
            recent = [(at, size) for at, size in self._arrived if now - at <= _SPEED_WINDOW_S]
            span_s = now - recent[0][0] if recent else _SPEED_WINDOW_S
            speed = sum(size for _, size in recent) / span_s if span_s > 0 and self._arrived else None
            return Progress(sum(self._done.values()), self.total_bytes, speed)
