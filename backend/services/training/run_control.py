"""How a run is stopped before its last step, and what its engine is told."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Literal

from domain import protocol
from domain.protocol import E, R
from services.engines.process import EngineProcess

_POLL_S = 0.2
# Why a run ends before its last step: a client's request, the server's end, or a database that cannot be written.
Ending = Literal["discard", "keep_checkpoints", "keep_adapter", "pause", "server_ends", "not_saved"]
# What a cancelled job keeps, as a client says it.
ENDINGS: dict[str, Ending] = {"nothing": "discard", "checkpoints": "keep_checkpoints", "adapter": "keep_adapter"}
_RANK: dict[Ending, int] = {
    "not_saved": 0,
    "server_ends": 1,
    "pause": 2,
    "keep_adapter": 3,
    "keep_checkpoints": 4,
    "discard": 5,
}
_ENGINE_MODES: dict[Ending, protocol.StopMode] = {"discard": "discard", "keep_adapter": "keep"}


class RunStopped(Exception):
    """The run is to end before its last step."""


class RunControl:
    """Stops one run. Every method may be called from any thread.

    Args:
        lock: Held while the job moves, so that a pause and the job's move to `pausing` are one step.

    Attributes:
        ending: Why the run is to end; None while it goes on.
    """

    def __init__(self, lock: threading.RLock) -> None:
        self._lock = lock
        self._stop = threading.Event()
        self._process: EngineProcess | None = None
        self._request_id: str | None = None
        self.ending: Ending | None = None

    @property
    def stopped(self) -> bool:
        """Whether the run is to end."""
        return self._stop.is_set()

    def check(self) -> None:
        """Raise RunStopped if the run is to end."""
        if self._stop.is_set():
            raise RunStopped

    def wait(self, _what: str = "", _fraction: float | None = None) -> None:
        """Wait a moment, or raise RunStopped as soon as the run is to end."""
        self._stop.wait(_POLL_S)
        self.check()

    def request(
        self, process: EngineProcess, command: protocol.Command[R, E], on_event: Callable[[E], None]
    ) -> "Future[R]":
        """Send the command that trains, unless the run is to end. A stop after this call stops the command.

        Raises:
            RunStopped: The run is to end.
        """
        with self._lock:
            self.check()
            self._process, self._request_id = process, command.request_id
            return process.request(command, on_event)

    def set(self, ending: Ending) -> None:
        """Have the run end. A cancel overrules a pause; a pause overrules the end of the server."""
        with self._lock:
            if self.ending is None or _RANK[ending] > _RANK[self.ending]:
                self.ending = ending
            self._stop.set()

    def tell_engine(self) -> None:
        """Have the engine end the command that trains, in the way that `ending` asks for."""
        with self._lock:
            process, request_id, ending = self._process, self._request_id, self.ending
        if process is not None and request_id is not None and ending is not None:
            process.stop(request_id, _ENGINE_MODES.get(ending, "pause"))

    def write_checkpoint(self) -> bool:
        """Ask the engine for a checkpoint after the step under way; False if nothing is training yet."""
        process, request_id = self._process, self._request_id
        if process is None or request_id is None:
            return False
        process.write_checkpoint(request_id)
        return True

    def log_tail(self) -> list[str]:
        """Return the engine's last lines."""
        return self._process.log_tail() if self._process is not None else []
