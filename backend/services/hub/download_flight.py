"""One download that several threads may wait for: its progress, and whether anyone still waits."""

import contextvars
import threading
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any, TypeVar

from core.clock import Clock
from core.errors import Conflict
from domain.hub.tree import RepoFile

T = TypeVar("T")
_POLL_S = 0.1  # how often a waiting caller looks at the progress
_SPEED_WINDOW_S = 10.0
_SAMPLE_S = 0.1  # arrivals within it count as one


class DownloadCancelled(Conflict):
    """Everyone who waited for the download has left."""

    slug, title = "download-cancelled", "Download cancelled"


@dataclass(frozen=True)
class Progress:
    """The progress of a download. `bytes_per_s` covers the last ten seconds; None before anything has arrived."""

    done_bytes: int
    total_bytes: int
    bytes_per_s: float | None


class Flight:
    """One download that several threads may wait for."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._done: dict[str, int] = {}
        self._arrived: deque[tuple[float, int]] = deque()
        self.total_bytes: int | None = None
        self.waiting = 0
        self.stopped = threading.Event()
        self.future: Future[Any] = Future()

    def check(self) -> None:
        """Raise DownloadCancelled once nobody waits."""
        if self.stopped.is_set():
            raise DownloadCancelled("Nobody waits for the download any more.")

    def has(self, file: RepoFile, size_bytes: int, arrived_bytes: int = 0) -> None:
        """Record how much of a file is on this machine, and how much of it has just arrived."""
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
        """Return the progress; None until the total is known."""
        if self.total_bytes is None:
            return None
        now = self._clock.monotonic()
        with self._lock:
            recent = [(at, size) for at, size in self._arrived if now - at <= _SPEED_WINDOW_S]
            span_s = now - recent[0][0] if recent else _SPEED_WINDOW_S
            speed = sum(size for _, size in recent) / span_s if span_s > 0 and self._arrived else None
            return Progress(sum(self._done.values()), self.total_bytes, speed)


class Flights:
    """The downloads under way. Threads that ask for the same thing share one.

    Args:
        clock: Measures speeds.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._flights: dict[Hashable, Flight] = {}

    def join(
        self,
        key: Hashable,
        name: str,
        work: Callable[[Flight], T],
        on_progress: Callable[[Progress], None],
        cancelled: Callable[[], bool],
    ) -> T:
        """Return the result of the work. It runs on its own thread, and every caller with the same key waits for it.

        Args:
            key: Identifies the work.
            name: What is downloaded, in messages to people.
            work: Does it. It is not called if work with the same key is under way.
            on_progress: Called on this thread about ten times a second.
            cancelled: Called as often. The work itself is stopped when the last waiting caller has left.

        Raises:
            DownloadCancelled: `cancelled` said so.
            Exception: Whatever the work raises.
        """
        flight = self._enter(key, work)
        try:
            while True:
                done, _ = wait([flight.future], timeout=_POLL_S)
                if (progress := flight.progress()) is not None:
                    on_progress(progress)
                if done:
                    result: T = flight.future.result()
                    return result
                if cancelled():
                    raise DownloadCancelled(f"The download of {name} was cancelled.")
        finally:
            self._leave(key, flight)

    def _enter(self, key: Hashable, work: Callable[[Flight], Any]) -> Flight:
        with self._lock:
            flight = self._flights.get(key)
            if flight is None:
                flight = self._flights[key] = Flight(self._clock)
                # The context carries the request's token. The thread is a daemon: a Hub that hangs must not keep the
                # process from ending; what has arrived is resumed.
                run = contextvars.copy_context().run
                threading.Thread(target=run, args=(_fly, flight, work), name="download", daemon=True).start()
            flight.waiting += 1
            return flight

    def _leave(self, key: Hashable, flight: Flight) -> None:
        with self._lock:
            flight.waiting -= 1
            if flight.waiting == 0:
                flight.stopped.set()
                if self._flights.get(key) is flight:
                    del self._flights[key]


def _fly(flight: Flight, work: Callable[[Flight], Any]) -> None:
    try:
        flight.future.set_result(work(flight))
    except BaseException as error:  # noqa: BLE001 - it is raised again where the result is waited for
        flight.future.set_exception(error)
