"""An engine without a process, and what starts it in the place of EngineProcess."""

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from pydantic import BaseModel, JsonValue

from domain.protocol import Command, E, Generate, R
from domain.results import Generated, Loaded, MemoryHeld
from services.engines.process import EngineProcess

SHORT_ANSWER = Generate(
    messages=None, prompt="a", adapter_id=None, max_new_tokens=1, temperature=0.0, top_p=1.0, seed=None, stop=[]
)


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
        self._unanswered: list[Callable[[], None]] = []

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

    def request(self, command: Command[R, E], on_event: Callable[[E], None] | None = None) -> "Future[R]":
        future: Future[R] = Future()
        self._unanswered.append(lambda: future.set_result(command.read_result(self._result(command.result_type()))))
        if not self.takes_long:
            self.answer()
        return future

    def _result(self, wanted: type[BaseModel]) -> dict[str, JsonValue]:
        results: dict[type[BaseModel], dict[str, JsonValue]] = {
            Loaded: {"total_parameters": 1, "memory_bytes": self.held_bytes, "load_s": 0.1},
            MemoryHeld: {"memory_bytes": self.held_bytes},
            Generated: {
                "text": "b",
                "prompt_tokens": 1,
                "completion_tokens": 1,
                "finish_reason": "length",
                "elapsed_s": 0.1,
                "chat_template": None,
            },
        }
        return results[wanted]

    def answer(self) -> None:
        """Finish every command that is running."""
        unanswered, self._unanswered = self._unanswered, []
        for finish in unanswered:
            finish()

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
