"""An engine without a process, and what starts it in the place of EngineProcess."""

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from pydantic import BaseModel, JsonValue

from domain.protocol import Command, E, Generate, R
from domain.results import Generated, Loaded, MemoryHeld, WarmedUp
from services.engines.process import EngineDied, EngineProcess

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
        gpu_contexts: What it answers to WarmUp.
        log_path: Where it was told to write.
        options: What else it was started with.
    """

    def __init__(self, on_exit: Callable[[], None] | None, held_bytes: int) -> None:
        self.on_exit: Callable[[], None] = on_exit or (lambda: None)
        self.held_bytes, self.ended, self.takes_long = held_bytes, False, False
        self.gpu_contexts, self.log_path = 0, Path()
        self.options: dict[str, object] = {}
        self._unanswered: list[Callable[[], None]] = []
        self._futures: list[Future[Any]] = []

    @property
    def pid(self) -> int:
        return 1

    @property
    def alive(self) -> bool:
        return not self.ended

    @property
    def begun(self) -> bool:
        return True

    @property
    def has_pending(self) -> bool:
        return bool(self._unanswered)

    def resident_bytes(self) -> int:
        return 0 if self.ended else self.held_bytes

    def private_bytes(self) -> int:
        return self.resident_bytes()

    def take_over(self, log_path: Path, on_exit: Callable[[], None] | None, silence_s: float) -> bool:
        self.log_path, self.on_exit = log_path, on_exit or (lambda: None)
        return self.alive

    def log_tail(self) -> list[str]:
        return []

    def request(self, command: Command[R, E], on_event: Callable[[E], None] | None = None) -> "Future[R]":
        future: Future[R] = Future()
        if self.ended:
            future.set_exception(EngineDied("It has ended."))
            return future
        self._futures.append(future)
        self._unanswered.append(lambda: future.set_result(command.read_result(self._result(command.result_type()))))
        if not self.takes_long:
            self.answer()
        return future

    def _result(self, wanted: type[BaseModel]) -> dict[str, JsonValue]:
        results: dict[type[BaseModel], dict[str, JsonValue]] = {
            Loaded: {"total_parameters": 1, "memory_bytes": self.held_bytes, "load_s": 0.1},
            WarmedUp: {"gpu_contexts": self.gpu_contexts},
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

    def kill(self) -> None:
        if not self.ended:
            self.ended = True
            for future in self._futures:
                if not future.done():
                    future.set_exception(EngineDied("It was killed."))
            self.on_exit()

    def close(self, timeout_s: float = 10.0) -> None:
        self.ended = True


class EngineDoubles:
    """Stands where the class EngineProcess does, and keeps what it starts.

    Attributes:
        held_bytes: What each holds.
        started: Every one, the oldest first.
        others_at_start: For each, how many others lived when it was started.
        take_long: As the attribute of each that is started from now on.
        gpu_contexts: As the attribute of each that is started from now on.
    """

    def __init__(self, held_bytes: int = 1) -> None:
        self.held_bytes = held_bytes
        self.started: list[EngineDouble] = []
        self.others_at_start: list[int] = []
        self.take_long, self.gpu_contexts = False, 0

    def __call__(self, log_path: Path, on_exit: Callable[[], None] | None = None, **options: object) -> EngineDouble:
        self.others_at_start.append(len(self.alive))
        engine = EngineDouble(on_exit, self.held_bytes)
        engine.log_path, engine.options = log_path, options
        engine.takes_long, engine.gpu_contexts = self.take_long, self.gpu_contexts
        self.started.append(engine)
        return engine

    @property
    def alive(self) -> list[EngineDouble]:
        return [engine for engine in self.started if not engine.ended]
