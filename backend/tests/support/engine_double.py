"""An engine without a process, and what starts it in the place of EngineProcess."""

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from services.engines.process import EngineProcess, EventHandler


class EngineDouble(EngineProcess):
    """Does whatever it is told at once, or when the test lets it.

    Args:
        on_exit: As EngineProcess takes it; a test calls it to say that the process has ended.
        held_bytes: What it holds until it is closed.

    Attributes:
        ended: Whether it was closed.
        takes_long: Whether commands wait for `answer`.
    """

    def __init__(self, on_exit: Callable[[], None] | None, held_bytes: int) -> None:
        self.on_exit: Callable[[], None] = on_exit or (lambda: None)
        self.held_bytes, self.ended, self.takes_long = held_bytes, False, False
        self._unanswered: list[Future[dict[str, Any]]] = []

    @property
    def pid(self) -> int:
        return 1

    @property
    def has_pending(self) -> bool:
        return bool(self._unanswered)

    def resident_bytes(self) -> int:
        return 0 if self.ended else self.held_bytes

    def log_tail(self) -> list[str]:
        return []

    def request(
        self, make: Callable[[str], Any], on_event: EventHandler | None = None
    ) -> tuple[str, "Future[dict[str, Any]]"]:
        make("request")
        future: Future[dict[str, Any]] = Future()
        self._unanswered.append(future)
        if not self.takes_long:
            self.answer()
        return "request", future

    def answer(self) -> None:
        """Finish every command that is running."""
        unanswered, self._unanswered = self._unanswered, []
        for future in unanswered:
            future.set_result({"total_parameters": 1, "memory_bytes": self.held_bytes, "load_s": 0.1})

    def close(self, timeout_s: float = 10.0) -> None:
        self.ended = True


class EngineDoubles:
    """Stands where the class EngineProcess does, and keeps what it starts.

    Attributes:
        held_bytes: What each holds.
        started: Every one, the oldest first.
        others_at_start: For each, how many others lived when it was started.
    """

    def __init__(self, held_bytes: int = 1) -> None:
        self.held_bytes = held_bytes
        self.started: list[EngineDouble] = []
        self.others_at_start: list[int] = []

    def __call__(self, log_path: Path, on_exit: Callable[[], None] | None = None, **options: object) -> EngineDouble:
        self.others_at_start.append(len(self.alive))
        self.started.append(EngineDouble(on_exit, self.held_bytes))
        return self.started[-1]

    @property
    def alive(self) -> list[EngineDouble]:
        return [engine for engine in self.started if not engine.ended]
