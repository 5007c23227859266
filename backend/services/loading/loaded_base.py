"""One base model in one engine, from the request to the free memory."""

import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from typing import Any

from core.clock import Clock
from core.errors import ModelBusy, ModelNotReady, StudioError
from domain.peft.config import PeftConfig
from services.engines.process import EngineProcess
from services.hardware.devices import EngineName, device_name
from services.models.progress import LoadProgress


class LoadState(StrEnum):
    """Where a base is."""

    QUEUED = "queued"
    DOWNLOADING = "downloading"
    LOADING = "loading"
    READY = "ready"
    BUSY = "busy"
    FAILED = "failed"
    UNLOADING = "unloading"


@dataclass(frozen=True)
class BaseKey:
    """What makes two requests the same base in memory: everything that changes how it is loaded.

    Attributes:
        max_seq_length: Tokens that Unsloth loads it for; None for transformers, where it makes no difference.
    """

    model_id: str
    revision: str | None
    quantization: str
    precision: str
    device: str
    engine: EngineName
    max_seq_length: int | None = None

    def serves(self, config: PeftConfig) -> bool:
        """Whether a fine-tune of this configuration can run on the base."""
        same = (self.quantization, self.precision) == (config.quantization, config.precision)
        return same and (self.max_seq_length is None or config.max_seq_length <= self.max_seq_length)


@dataclass(frozen=True)
class LoadOptions:
    """How a client had a base loaded, beside what it is: what it takes to load the same again.

    Attributes:
        device: `cpu`, or a GPU's index.
    """

    engine: EngineName
    device: str | int
    force: bool
    allow_pickle: bool


class LoadedBase:
    """The state of one base. Changes come from the loader's thread and the engine's; readers see them at once."""

    def __init__(
        self,
        key: BaseKey,
        clock: Clock,
        engine_reason: str = "asked for",
        *,
        force: bool = False,
        allow_pickle: bool = False,
    ) -> None:
        self.id = uuid.uuid4().hex[:8]
        self.key, self.engine_reason = key, engine_reason
        self.options = LoadOptions(key.engine, device_name(key.device), force, allow_pickle)
        self._clock = clock
        self._lock = threading.Lock()
        self._done = threading.Event()
        self.state = LoadState.QUEUED
        self.progress = LoadProgress()
        self.process: EngineProcess | None = None
        self.loading: Future[None] | None = None
        self.error: StudioError | None = None
        self.adapters: tuple[str, ...] = ()
        self.busy_with: str | None = None
        self.total_parameters: int | None = None
        self.memory_bytes: int | None = None
        self.needed_bytes: int | None = None  # estimated for loading it
        self.load_s: float | None = None
        self.loaded_at: datetime | None = None
        self.last_used_at: datetime | None = None
        self.last_used = clock.monotonic()
        self.kept_for_client = False  # a client asked for it, or used it; what a job loads for itself is nobody's
        self._awaited = 0
        self._stage_started = clock.monotonic()

    @property
    def cancelled(self) -> bool:
        """Whether it was unloaded before it was ready."""
        return self.state is LoadState.UNLOADING

    def report(self, state: str, progress: LoadProgress) -> None:
        """Record progress of the load. What says no time left gets one by the time that it took to get this far."""
        with self._lock:
            if self.state is LoadState.UNLOADING:
                return
            if self.state.value != state:
                self._stage_started = self._clock.monotonic()
                self.state = LoadState(state)
            if progress.eta_s is None and progress.fraction and progress.downloaded_bytes is None:
                elapsed = self._clock.monotonic() - self._stage_started
                progress = replace(progress, eta_s=elapsed / progress.fraction * (1 - progress.fraction))
            self.progress = progress

    def adopt(self, process: EngineProcess) -> bool:
        """Take the engine that will hold the base; False if it was unloaded meanwhile and nobody will end it."""
        with self._lock:
            if self.state is LoadState.UNLOADING:
                return False
            self.process = process
            return True

    def ready(self, result: dict[str, Any]) -> None:
        """Record what the engine said of the loaded base."""
        with self._lock:
            self.total_parameters = result["total_parameters"]
            self.memory_bytes = result["memory_bytes"]
            self.load_s = result["load_s"]
            self.loaded_at = self.last_used_at = self._clock.now()
            self.last_used = self._clock.monotonic()
            if self.state is not LoadState.UNLOADING:
                self.state = LoadState.READY
                self.progress = replace(self.progress, fraction=1.0, bytes_per_s=None, eta_s=0.0)
        self._done.set()

    def fail(self, error: StudioError) -> None:
        """Record why there is no base."""
        with self._lock:
            if self.state is not LoadState.UNLOADING:
                self.state, self.error = LoadState.FAILED, error
            self.adapters = ()
            self.memory_bytes = None
        self._done.set()

    def finish(self, state: LoadState) -> None:
        """Set a last state."""
        with self._lock:
            self.state = state
        self._done.set()

    @property
    def settled(self) -> bool:
        """Whether the load has ended, well or not."""
        return self._done.is_set()

    @property
    def under_way(self) -> bool:
        """Whether it will still take memory for its weights."""
        return self.state in (LoadState.QUEUED, LoadState.DOWNLOADING, LoadState.LOADING)

    @property
    def resident_bytes(self) -> int:
        """Memory that it holds on its device now, as far as that can be seen; 0 before there is an engine."""
        process = self.process
        if process is None:
            return 0
        if self.key.device != "cpu":
            return self.memory_bytes or 0
        return process.resident_bytes()

    @property
    def usable(self) -> bool:
        """Whether it is loaded and its engine lives."""
        return self.state in (LoadState.READY, LoadState.BUSY)

    def join(self, *, for_client: bool) -> bool:
        """Take part in a base that is there, which is a use of it; False if there is none any more.

        Args:
            for_client: Whether a client asks for it, and not a job.
        """
        with self._lock:
            if self.state in (LoadState.FAILED, LoadState.UNLOADING):
                return False
            self.kept_for_client = self.kept_for_client or for_client
            self.last_used_at, self.last_used = self._clock.now(), self._clock.monotonic()
            return True

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """Keep it from giving way while somebody waits for it to load, for another to leave it, or between commands."""
        with self._lock:
            self._awaited += 1
        try:
            yield
        finally:
            with self._lock:
                self._awaited -= 1

    def engine(self, *, for_client: bool = False) -> EngineProcess:
        """Return the engine for a short command.

        Args:
            for_client: Whether a client uses it, and not a job: it is kept for the client from now on.

        Raises:
            ModelNotReady: There is no base yet, or no more.
            ModelBusy: A job holds it.
        """
        with self._lock:
            if self.state is LoadState.BUSY:
                raise ModelBusy(f"The model is {self.busy_with}; try again when it is done.")
            if self.state is not LoadState.READY or self.process is None:
                why = f": {self.error.detail}" if self.error is not None else ""
                raise ModelNotReady(f"The model is {self.state.value}{why}")
            self.kept_for_client = self.kept_for_client or for_client
            self.last_used_at, self.last_used = self._clock.now(), self._clock.monotonic()
            return self.process

    def acquire(self, purpose: str) -> EngineProcess:
        """Take the engine for a long command."""
        process = self.engine()
        with self._lock:
            if self.state is not LoadState.READY:
                raise ModelBusy(f"The model is {self.busy_with or self.state.value}.")
            self.state, self.busy_with = LoadState.BUSY, purpose
        return process

    def release(self) -> None:
        """Give the engine back."""
        with self._lock:
            self.busy_with = None
            self.last_used_at, self.last_used = self._clock.now(), self._clock.monotonic()
            if self.state is LoadState.BUSY:
                self.state = LoadState.READY

    def touch(self) -> None:
        """Record that it was used until now."""
        with self._lock:
            self.last_used_at, self.last_used = self._clock.now(), self._clock.monotonic()

    def idle_for(self, idle_s: float, unkept_s: float | None = None) -> bool:
        """Whether it is loaded, nobody waits for it, nothing runs on it, and nothing has for a while.

        Args:
            idle_s: How long.
            unkept_s: How long if no client asked for it or used it; `idle_s` if None.
        """
        with self._lock:
            return self._idle_for(idle_s, unkept_s)

    def _idle_for(self, idle_s: float, unkept_s: float | None) -> bool:
        if self.state is not LoadState.READY or self._awaited or self.process is None or self.process.has_pending:
            return False
        wanted_s = idle_s if unkept_s is None or self.kept_for_client else unkept_s
        return self._clock.monotonic() - self.last_used >= wanted_s

    def retire(self, idle_s: float, unkept_s: float | None = None) -> bool:
        """Begin to unload it if it has been idle for so long; whoever asks for its engine from now on is refused.

        Returns:
            Whether it is to be unloaded. In one step with the look: no command can come in between.
        """
        with self._lock:
            if not self._idle_for(idle_s, unkept_s):
                return False
            self.state = LoadState.UNLOADING
        self._done.set()
        return True

    def begin_unloading(self) -> None:
        """Begin to unload it, whatever it is doing but a job.

        Raises:
            ModelBusy: A job holds it.
        """
        with self._lock:
            if self.busy_with is not None:
                raise ModelBusy(f"The model is {self.busy_with}; cancel the job first.")
            self.state = LoadState.UNLOADING
        self._done.set()

    def attached(self, adapter_id: str, memory_bytes: int) -> None:
        """Record that an adapter is on the base."""
        with self._lock:
            if adapter_id not in self.adapters:
                self.adapters = (*self.adapters, adapter_id)
            self.memory_bytes = memory_bytes

    def detached(self, adapter_id: str, memory_bytes: int) -> None:
        """Record that an adapter is off the base."""
        with self._lock:
            self.adapters = tuple(name for name in self.adapters if name != adapter_id)
            self.memory_bytes = memory_bytes

    def log_tail(self) -> list[str]:
        """Return the engine's last lines."""
        return self.process.log_tail() if self.process is not None else []

    def end_process(self) -> None:
        """End the engine; its memory is free on return."""
        with self._lock:
            process, self.process = self.process, None
        if process is not None:
            process.close()
