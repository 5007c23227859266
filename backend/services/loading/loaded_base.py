"""One base model in one engine, from the request to the free memory."""

import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime

from core.clock import Clock
from core.errors import ModelBusy, ModelNotReady, StudioError, TransitionNotPermitted
from domain.models.load_states import GONE, UNDER_WAY, USABLE, LoadState, may_change
from domain.results import Loaded
from services.engines.process import EngineProcess
from services.loading.base_request import BaseKey, BaseRequest
from services.loading.base_use import BaseUse
from services.models.progress import LoadProgress


class LoadedBase:
    """The state of one base. Changes come from the loader's thread and the engine's; readers see them at once.

    Attributes:
        wanted: What was asked for.
        use: Who uses it.
        loading: Done when the load has ended, well or not.
        error: Why there is no base.
        process: The engine that holds it, or is to hold it.
        loaded: What the engine said of the base; None until it is loaded.
        loaded_at: When that was.
        memory_bytes: What it holds on its device, by its engine.
        adapters: The adapters that are on it.
        busy_with: The long piece of work that holds it, if one does.
    """

    def __init__(self, wanted: BaseRequest, clock: Clock) -> None:
        self.id = uuid.uuid4().hex[:8]
        self.wanted, self._clock = wanted, clock
        self._lock = threading.Lock()
        self._settled = threading.Event()
        self._state = LoadState.QUEUED
        self._state_since_s = clock.monotonic()
        self.progress = LoadProgress()
        self.use = BaseUse(clock, for_client=wanted.for_client)
        self.loading: Future[None] | None = None
        self.error: StudioError | None = None
        self.process: EngineProcess | None = None
        self.loaded: Loaded | None = None
        self.loaded_at: datetime | None = None
        self.memory_bytes: int | None = None
        self.adapters: tuple[str, ...] = ()
        self.busy_with: str | None = None

    @property
    def key(self) -> BaseKey:
        """Which base it is."""
        return self.wanted.key

    # States

    @property
    def state(self) -> LoadState:
        """Where it is."""
        return self._state

    def _enter(self, following: LoadState) -> bool:
        """Change the state. The caller holds the lock.

        Returns:
            Whether it is in that state now. A base that is being unloaded stays so, whatever its loader and its engine
            still report.

        Raises:
            TransitionNotPermitted: The table of transitions does not allow it.
        """
        if self._state is following:
            return True
        if self._state is LoadState.UNLOADING:
            return False
        if not may_change(self._state, following):
            raise TransitionNotPermitted(f"A base cannot go from {self._state.value} to {following.value}.")
        self._state, self._state_since_s = following, self._clock.monotonic()
        if following not in UNDER_WAY:
            self._settled.set()
        return True

    @property
    def cancelled(self) -> bool:
        """Whether it was unloaded before it was ready."""
        return self._state is LoadState.UNLOADING

    @property
    def settled(self) -> bool:
        """Whether the load has ended, well or not."""
        return self._settled.is_set()

    @property
    def under_way(self) -> bool:
        """Whether it will still take memory for its weights."""
        return self._state in UNDER_WAY

    @property
    def usable(self) -> bool:
        """Whether it is loaded and its engine lives."""
        return self._state in USABLE

    # Loading

    def report(self, state: str, progress: LoadProgress) -> None:
        """Record progress of the load. What says no time left gets one by the time that it took to get this far."""
        with self._lock:
            if not self._enter(LoadState(state)):
                return
            if progress.eta_s is None and progress.fraction and progress.downloaded_bytes is None:
                elapsed = self._clock.monotonic() - self._state_since_s
                progress = replace(progress, eta_s=elapsed / progress.fraction * (1 - progress.fraction))
            self.progress = progress

    def adopt(self, process: EngineProcess) -> bool:
        """Take the engine that will hold the base; False if it was unloaded meanwhile and nobody will end it."""
        with self._lock:
            if self._state is LoadState.UNLOADING:
                return False
            self.process = process
            return True

    def ready(self, loaded: Loaded) -> None:
        """Record what the engine said of the loaded base."""
        with self._lock:
            self.loaded_at = self._clock.now()  # first: whoever sees that it is loaded reads when
            self.loaded = loaded
            self.memory_bytes = loaded.memory_bytes
            self.use.now()
            if self._enter(LoadState.READY):
                self.progress = replace(self.progress, fraction=1.0, bytes_per_s=None, eta_s=0.0)

    def fail(self, error: StudioError) -> None:
        """Record why there is no base."""
        with self._lock:
            self.adapters = ()
            self.memory_bytes = None
            if self._state is not LoadState.UNLOADING:
                self.error = error  # first: whoever waits for the end of the load reads it then
                self._enter(LoadState.FAILED)

    @property
    def resident_bytes(self) -> int:
        """Memory that it holds on its device now, as far as that can be seen; 0 before there is an engine."""
        process = self.process
        if process is None:
            return 0
        if self.key.device != "cpu":
            return self.memory_bytes or 0
        return process.resident_bytes()

    # Using

    def join(self, *, for_client: bool) -> bool:
        """Take part in a base that is there, which is a use of it by a client or a job; False if there is none."""
        with self._lock:
            if self._state in GONE:
                return False
            self.use.now(for_client=for_client)
            return True

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """Keep it from giving way while somebody waits for it to load, for another to leave it, or between commands."""
        with self._lock:
            self.use.awaited += 1
        try:
            yield
        finally:
            with self._lock:
                self.use.awaited -= 1

    def engine(self, *, for_client: bool = False) -> EngineProcess:
        """Return the engine for a short command.

        Args:
            for_client: Whether a client uses it, and not a job: it is kept for the client from now on.

        Raises:
            ModelNotReady: There is no base yet, or no more.
            ModelBusy: A job holds it.
        """
        with self._lock:
            return self._engine(for_client=for_client)

    def _engine(self, *, for_client: bool = False) -> EngineProcess:
        if self._state is LoadState.BUSY:
            raise ModelBusy(f"The model is {self.busy_with}; try again when it is done.")
        if self._state is not LoadState.READY or self.process is None:
            why = f": {self.error.detail}" if self.error is not None else ""
            raise ModelNotReady(f"The model is {self._state.value}{why}")
        self.use.now(for_client=for_client)
        return self.process

    def acquire(self, purpose: str) -> EngineProcess:
        """Take the engine for a long command; `release` gives it back.

        Raises:
            ModelNotReady: There is no base yet, or no more.
            ModelBusy: A job holds it.
        """
        with self._lock:
            process = self._engine()
            self._enter(LoadState.BUSY)
            self.busy_with = purpose
            return process

    def release(self) -> None:
        """Give the engine back. It may have died meanwhile, and the base with it."""
        with self._lock:
            self.busy_with = None
            self.use.now()
            if self._state is LoadState.BUSY:
                self._enter(LoadState.READY)

    def touch(self) -> None:
        """Record that it was used until now."""
        with self._lock:
            self.use.now()

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

    # Unloading

    def idle_for(self, idle_s: float, unkept_s: float | None = None) -> bool:
        """Whether it is loaded, nothing runs on it, and it is not in use, as `BaseUse.over_for` says."""
        with self._lock:
            return self._idle_for(idle_s, unkept_s)

    def _idle_for(self, idle_s: float, unkept_s: float | None) -> bool:
        if self._state is not LoadState.READY or self.process is None or self.process.has_pending:
            return False
        return self.use.over_for(idle_s, unkept_s)

    def retire(self, idle_s: float, unkept_s: float | None = None) -> bool:
        """Begin to unload it if it has been idle for so long; whoever asks for its engine from now on is refused.

        Returns:
            Whether it is to be unloaded. In one step with the look: no command can come in between.
        """
        with self._lock:
            return self._idle_for(idle_s, unkept_s) and self._enter(LoadState.UNLOADING)

    def begin_unloading(self, *, though_busy: bool = False) -> None:
        """Begin to unload it, whatever it is doing but a job.

        Args:
            though_busy: Whether a job does not matter: the server ends.

        Raises:
            ModelBusy: A job holds it.
        """
        with self._lock:
            if self.busy_with is not None and not though_busy:
                raise ModelBusy(f"The model is {self.busy_with}; cancel the job first.")
            self._enter(LoadState.UNLOADING)

    def end_process(self) -> None:
        """End the engine; its memory is free on return."""
        with self._lock:
            process, self.process = self.process, None
        if process is not None:
            process.close()
