"""Who uses a base, and since when nobody does."""

from datetime import datetime

from core.clock import Clock


class BaseUse:
    """The uses of one base. The base's own lock protects them.

    Attributes:
        last_at: When it was last used; None before it is loaded.
        last_s: The same on the monotonic clock. Before it is loaded: when it was asked for.
        for_client: Whether a client has asked for it or used it, and not only jobs.
        awaited: How many callers wait for it: to load, to be left by another, or between two of their commands.
    """

    def __init__(self, clock: Clock, *, for_client: bool) -> None:
        self._clock = clock
        self.last_at: datetime | None = None
        self.last_s = clock.monotonic()
        self.for_client = for_client
        self.awaited = 0

    def now(self, *, for_client: bool = False) -> None:
        """Record that it is used now.

        Args:
            for_client: Whether a client uses it, and not a job. It is then kept for the client.
        """
        self.last_at, self.last_s = self._clock.now(), self._clock.monotonic()
        self.for_client = self.for_client or for_client

    def over_for(self, idle_s: float, unkept_s: float | None) -> bool:
        """Whether nobody waits for it, and nothing has used it for a time.

        Args:
            idle_s: The time.
            unkept_s: The time for a base that no client has asked for or used; `idle_s` if None.
        """
        wanted_s = idle_s if unkept_s is None or self.for_client else unkept_s
        return not self.awaited and self._clock.monotonic() - self.last_s >= wanted_s
