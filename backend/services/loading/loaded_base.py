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
    """The state of one base. The loader's thread and the engine's thread change it; any thread may read it.

    Attributes:
        wanted: What was asked for.
        use: Who uses it.
        loading: Done when the load has succeeded or failed.
        error: Why the load failed, or why the engine ended.
        process: The engine that holds it, or is to hold it.
        loaded: The engine's description of the base; None until it is loaded.
        loaded_at: When it was loaded.
        memory_bytes: The memory that it holds on its device, as its engine reports it.
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
            Whether it is in that state now. A base that is being unloaded leaves that state no more, whatever its
            loader and its engine still report.

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
        """Whether the load has succeeded or failed."""
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
        """Record progress of the load. The time left is estimated from the time so far if the progress names none."""
        with self._lock:
            if not self._enter(LoadState(state)):
                return
            if progress.eta_s is None and progress.fraction and progress.downloaded_bytes is None:
                elapsed = self._clock.monotonic() - self._state_since_s
                progress = replace(progress, eta_s=elapsed / progress.fraction * (1 - progress.fraction))
            self.progress = progress

    def adopt(self, process: EngineProcess) -> bool:
        """Take the engine that will hold the base.

        Returns:
            False if the base was unloaded meanwhile. The caller then ends the engine.
        """
        with self._lock:
            if self._state is LoadState.UNLOADING:
                return False
            self.process = process
            return True

    def ready(self, loaded: Loaded) -> None:
        """Record that the base is loaded, with the engine's description of it."""
        with self._lock:
            self.loaded_at = self._clock.now()  # first: who sees `loaded` may read it
            self.loaded = loaded
            self.memory_bytes = loaded.memory_bytes
            self.use.now()
            if self._enter(LoadState.READY):
                self.progress = replace(self.progress, fraction=1.0, bytes_per_s=None, eta_s=0.0)

    def fail(self, error: StudioError) -> None:
        """Record why the load failed, or why the engine ended."""
        with self._lock:
            self.adapters = ()
            self.memory_bytes = None
            if self._state is not LoadState.UNLOADING:
                self.error = error  # first: who waits for the end of the load reads it next
                self._enter(LoadState.FAILED)

    @property
    def resident_bytes(self) -> int:
        """Memory that it holds on its device now, as far as it can be measured; 0 before there is an engine."""
        process = self.process
        if process is None:
            return 0
        if self.key.device != "cpu":
            return self.memory_bytes or 0
        return process.resident_bytes()

    # Using

    def join(self, *, for_client: bool) -> bool:
        """Use the base for one more client or job; return False if it has failed or is being unloaded."""
        with self._lock:
            if self._state in GONE:
                return False
            self.use.now(for_client=for_client)
            return True

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """Keep it from giving way while a caller waits for it to load or to be free, and between its commands."""
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
        """Give the engine back. The engine may have died meanwhile."""
        with self._lock:
            self.busy_with = None
            self.use.now()
            if self._state is LoadState.BUSY:
                self._enter(LoadState.READY)

    def touch(self) -> None:
        """Record a use that ends now."""
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
        """Whether it is loaded, nothing runs on it, and its use has been over for a time (`BaseUse.over_for`)."""
        with self._lock:
            return self._idle_for(idle_s, unkept_s)

    def _idle_for(self, idle_s: float, unkept_s: float | None) -> bool:
        if self._state is not LoadState.READY or self.process is None or self.process.has_pending:
            return False
        return self.use.over_for(idle_s, unkept_s)

    def retire(self, idle_s: float, unkept_s: float | None = None) -> bool:
        """Begin to unload it if it has been idle for a time. From then on its engine is refused to everyone.

        Returns:
            Whether it is to be unloaded. The check and the change are one step: no command can come in between.
        """
        with self._lock:
            return self._idle_for(idle_s, unkept_s) and self._enter(LoadState.UNLOADING)

    def begin_unloading(self, *, though_busy: bool = False) -> None:
        """Begin to unload it, even while it is used for a short command.

        Args:
            though_busy: Unload it even while a job holds it, since the server ends.

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
