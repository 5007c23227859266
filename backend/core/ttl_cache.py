"""A cached value. It is computed once per time to live, however many threads ask for it at once."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Generic, TypeVar

from core.clock import Clock

T = TypeVar("T")


@dataclass(frozen=True)
class Timed(Generic[T]):
    """A value with when it was measured, how old it is and when it stops being served."""

    value: T
    measured_at: datetime
    expires_at: datetime
    age_s: float


class TtlCell(Generic[T]):
    """One cached value. Ages come from the monotonic clock, so setting the wall clock back changes nothing.

    Args:
        ttl_s: Seconds a value is served for.
        clock: Source of both times.
        compute: Makes a fresh value; its errors pass through and nothing is cached.
    """

    def __init__(self, ttl_s: float, clock: Clock, compute: Callable[[], T]) -> None:
        self._ttl_s = ttl_s
        self._clock = clock
        self._compute = compute
        self._lock = threading.Lock()
        self._held: tuple[T, datetime, float] | None = None

    def get(self, *, refresh: bool = False) -> Timed[T]:
        """Return the value, computing it if there is none, it is too old, or `refresh` asks."""
        asked_at = self._clock.monotonic()
        with self._lock:
            held = self._held
            # A computation that began after the refresh was requested satisfies it.
            stale = held is None or self._clock.monotonic() - held[2] >= self._ttl_s
            if held is None or stale or (refresh and held[2] < asked_at):
                started = self._clock.monotonic()
                held = (self._compute(), self._clock.now(), started)
                self._held = held
        value, measured_at, began = held
        return Timed(value, measured_at, measured_at + timedelta(seconds=self._ttl_s), self._clock.monotonic() - began)
