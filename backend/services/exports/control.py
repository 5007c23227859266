"""The progress of a running export, and how it is stopped."""

import threading
from collections.abc import Callable
from dataclasses import dataclass

from core.clock import Clock
from core.errors import Conflict

_POLL_S = 0.2


class ExportStopped(Conflict):
    """The export was cancelled, or the server ends."""

    slug, title = "export-stopped", "Export stopped"


@dataclass(frozen=True)
class ExportProgress:
    """How far an export is; None where it cannot be known.

    Attributes:
        fraction: Of the stage, 0..1.
        eta_s: Seconds until the end of the stage, estimated from the time that it has taken so far.
    """

    stage: str
    fraction: float | None
    eta_s: float | None


class ExportControl:
    """One run of an export. `stop` may come from any thread."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._on_stop: Callable[[], None] | None = None
        self._stage_began_s = clock.monotonic()
        self._stopped = threading.Event()
        self.cancelled = False
        self.progress = ExportProgress("starting", None, None)

    def report(self, stage: str, fraction: float | None) -> None:
        """Record progress."""
        now_s = self._clock.monotonic()
        if stage != self.progress.stage:
            self._stage_began_s = now_s
        eta_s = (now_s - self._stage_began_s) / fraction * (1 - fraction) if fraction else None
        self.progress = ExportProgress(stage, fraction, eta_s)

    def check(self) -> None:
        """Raise ExportStopped once somebody has stopped it."""
        if self._stopped.is_set():
            raise ExportStopped("The export was stopped.")

    def wait(self, seconds: float) -> None:
        """Wait, or raise ExportStopped as soon as somebody stops it."""
        self._stopped.wait(seconds)
        self.check()

    def wait_for(self, stage: str, fraction: float | None) -> None:
        """Record what is waited for, and wait a moment; raise ExportStopped as soon as somebody stops the export."""
        self.report(stage, fraction)
        self.wait(_POLL_S)

    def call_on_stop(self, tell: Callable[[], None]) -> None:
        """Have a function called when the export is stopped, or at once if it is already."""
        with self._lock:
            self._on_stop = tell
            stopped = self._stopped.is_set()
        if stopped:
            tell()

    def cancel(self) -> None:
        """Stop the export for a client. It is not taken up again, as it is when the server ends."""
        self.cancelled = True
        self.stop()

    def stop(self) -> None:
        """Stop the export."""
        with self._lock:
            self._stopped.set()
            tell = self._on_stop
        if tell is not None:
            tell()
