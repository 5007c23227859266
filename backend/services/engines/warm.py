"""Engines that are started before they are wanted: imports done, nothing loaded."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from core.clock import Clock
from core.errors import EngineFailed, EngineUnavailable
from core.logging import get_logger
from domain import protocol
from domain.results import WarmedUp
from services.engines.process import EngineProcess

_MIB = 2**20
# What one holds after its imports, until one of its kind has been measured. On a CPU it was 330 MiB, with Unsloth 460
# (torch 2.13, transformers 5.17, Unsloth 2026.10.7). CUDA's libraries take more.
_FIRST_GUESS = {"transformers": 400 * _MIB, "none": 400 * _MIB, "unsloth": 1024 * _MIB}
_MOST_BYTES = 2 * 2**30  # one that takes more is ended, and none of its kind is started again
_SHARE, _SPARE_SHARE = 10, 5  # all together hold a tenth of the memory, and a fifth of it stays free beside them
_START_S = 1.0  # after the server has begun, so that its first answers have the processor
_LOOK_S = 5.0  # from one look to the next, while one is missing
_ANSWER_S = 10.0  # for one that was ready; it may have been swapped out
_LIVED_S = 60.0  # whatever ends one that has lived so long has nothing to do with its start
_FIRST_WAIT_S, _LONGEST_WAIT_S = 5.0, 600.0  # before one that died is started again, doubled each time
_log = get_logger(__name__)


@dataclass(frozen=True)
class EngineKind:
    """Everything that is decided when an engine's process starts. Two of a kind can stand in for each other.

    Attributes:
        backend: As EngineProcess takes it.
        gpu_uuid: The one GPU that it sees; None as EngineProcess takes it.
    """

    backend: str
    gpu_uuid: str | None = None


@dataclass(frozen=True)
class HostMemory:
    """The host's memory now, in bytes."""

    total_bytes: int
    available_bytes: int


@dataclass(frozen=True)
class WarmEngine:
    """One that is kept ready, as clients see it. `memory_bytes` is what ending it would free on the host."""

    engine: str
    gpu_uuid: str | None
    state: Literal["starting", "ready"]
    memory_bytes: int
    pid: int


class StartsEngine(Protocol):
    """Makes an engine process, as the class EngineProcess does."""

    def __call__(
        self,
        log_path: Path,
        on_exit: Callable[[], None] | None = None,
        *,
        silence_s: float,
        gpu_uuid: str | None,
        backend: str,
        in_background: bool = False,
    ) -> EngineProcess:
        """Start one."""
        ...


class _Standing:
    """One that nobody has taken yet."""

    def __init__(self, process: EngineProcess, began_s: float) -> None:
        self.process, self.began_s = process, began_s
        self.warming: Future[WarmedUp] = process.request(protocol.WarmUp())

    @property
    def ready(self) -> bool:
        return self.warming.done()


class Engines:
    """Gives engines: one of the kind that is kept ready, or else a new one.

    A thread keeps them ready. It starts one at a time, and waits without using the processor while none is missing.
    They hold nothing that anybody needs, so whoever needs their memory has it (`give_way`).

    Args:
        clock: For ages and waits.
        start: Makes a process.
        kinds: Which are kept, the most wanted first. Asked on the keeper's thread.
        memory: Reads the host's memory.
        log_dir: Where they write until they are taken.
        silence_s: As EngineProcess takes it, until they are taken.
        most_bytes: What all of them may hold together: 0 keeps none, None a tenth of the host's memory.
    """

    def __init__(
        self,
        clock: Clock,
        start: StartsEngine,
        kinds: Callable[[], Sequence[EngineKind]],
        memory: Callable[[], HostMemory],
        *,
        log_dir: Path,
        silence_s: float,
        most_bytes: int | None,
    ) -> None:
        self._clock, self._start_process, self._kinds, self._memory = clock, start, kinds, memory
        self._log_dir, self._silence_s, self._most_bytes = log_dir, silence_s, most_bytes
        self._busy: Callable[[], bool] = lambda: False
        self._changed = threading.Condition()  # its lock protects what follows
        self._look_again, self._closed = False, False
        self._standing: dict[EngineKind, _Standing] = {}
        self._describing: EngineProcess | None = None  # the last that was taken of the kind that holds no model
        self._sizes: dict[str, int] = {}  # measured, by back end
        self._deaths: dict[EngineKind, int] = {}
        self._not_before_s: dict[EngineKind, float] = {}
        self._given_up: set[EngineKind] = set()
        self._keeper = threading.Thread(target=self._keep, name="engine-keeper", daemon=True)

    def start(self) -> None:
        """Begin to keep engines ready, unless the settings keep none. Nothing is started before a second has passed.

        Begun again, as by an application that is run twice in one process, it changes nothing.
        """
        if self._most_bytes != 0 and self._keeper.ident is None:
            self._keeper.start()

    def hold_while(self, busy: Callable[[], bool]) -> None:
        """Start none while something is at work that was admitted with the memory that there is now."""
        self._busy = busy

    # Taking

    def take(
        self,
        log_path: Path,
        on_exit: Callable[[], None] | None = None,
        *,
        silence_s: float | None = None,
        gpu_uuid: str | None = None,
        backend: str = "transformers",
    ) -> EngineProcess:
        """Return an engine that is the caller's from now on. The arguments are EngineProcess' own.

        Raises:
            EngineUnavailable: None is ready, and no process can be started.
        """
        kind, silence_s = EngineKind(backend, gpu_uuid), self._silence_s if silence_s is None else silence_s
        process = self._take_ready(kind, log_path, on_exit, silence_s)
        if process is None:
            process = self._start_process(log_path, on_exit, silence_s=silence_s, gpu_uuid=gpu_uuid, backend=backend)
            with self._changed:
                self._given(kind, process)
        return process

    def _given(self, kind: EngineKind, process: EngineProcess) -> None:
        """Remember one that describes models. The caller holds the lock."""
        if kind.backend == "none":
            self._describing = process

    def _take_ready(
        self, kind: EngineKind, log_path: Path, on_exit: Callable[[], None] | None, silence_s: float
    ) -> EngineProcess | None:
        with self._changed:
            standing = self._standing.get(kind)
            if standing is None or not standing.process.begun:  # its first line comes before it can be changed
                return None
            del self._standing[kind]
            self._given(kind, standing.process)
            self._wake()
        process = standing.process
        if self._answers(standing) and process.take_over(log_path, on_exit, silence_s):
            _log.info("engine.taken", pid=process.pid, backend=kind.backend, imports_done=standing.ready)
            return process
        _log.warning("engine.not_taken", pid=process.pid, backend=kind.backend)
        _end(standing)
        return None

    def _answers(self, standing: _Standing) -> bool:
        """Whether one that was ready still works. One that still imports is as good as a new one."""
        if not standing.ready:
            return True
        try:
            standing.process.request(protocol.WarmUp()).result(_ANSWER_S)
        except (EngineFailed, FutureTimeout):
            return False
        return True

    # Memory

    def standing(self) -> list[WarmEngine]:
        """Return those that are kept ready now."""
        with self._changed:
            found = list(self._standing.items())
        return [
            WarmEngine(
                kind.backend,
                kind.gpu_uuid,
                "ready" if one.ready else "starting",
                one.process.private_bytes(),
                one.process.pid,
            )
            for kind, one in found
        ]

    def memory_bytes(self) -> int:
        """Return the host's memory that `give_way` would free."""
        return sum(one.memory_bytes for one in self.standing())

    def growing_bytes(self) -> int:
        """Return the host's memory that those will still take which have not done their imports."""
        return sum(
            max(0, self._size(one.engine) - one.memory_bytes) for one in self.standing() if one.state == "starting"
        )

    def give_way(self, why: str) -> bool:
        """End all of them, and start none for a minute. Their memory is free on return.

        Returns:
            Whether there were any.
        """
        with self._changed:
            ended = list(self._standing.items())
            self._standing.clear()
            for kind, _ in ended:
                self._not_before_s[kind] = self._clock.monotonic() + _LIVED_S
            self._wake()
        for _, standing in ended:
            _end(standing)
        if ended:
            _log.info("engine.gave_way", count=len(ended), why=why)
        return bool(ended)

    def close(self) -> None:
        """End all of them. None is started after that."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self.give_way("the server stops")
        if self._keeper.is_alive():
            self._keeper.join()

    # Keeping

    def _keep(self) -> None:
        pause_s: float | None = _START_S
        while not self._pause(pause_s):
            try:
                pause_s = self._look()
            except Exception:  # noqa: BLE001 - the keeper goes on; the log has the traceback
                _log.exception("engine.keeper_failed")
                pause_s = _LONGEST_WAIT_S

    def _pause(self, pause_s: float | None) -> bool:
        """Wait for a time, or until one is missing; return whether the server ends."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._look_again, pause_s)
            self._look_again = False
            return self._closed

    def _wake(self) -> None:
        """Have the keeper look. The caller holds the lock."""
        self._look_again = True
        self._changed.notify_all()

    def _look(self) -> float | None:
        """Start one that is missing, if it may be started; return the seconds until the next look, or None."""
        wanted = self._kinds()
        self._drop_unwanted(wanted)
        missing = [kind for kind in wanted if self._is_missing(kind)]
        for kind in missing:
            if self._may_start(kind):
                self._start(kind)
                return 0.0
        return _LOOK_S if missing else None

    def _drop_unwanted(self, wanted: Sequence[EngineKind]) -> None:
        """End those whose GPU has gone."""
        with self._changed:
            dropped = [self._standing.pop(kind) for kind in list(self._standing) if kind not in wanted]
        for standing in dropped:
            _end(standing)

    def _is_missing(self, kind: EngineKind) -> bool:
        with self._changed:
            # One engine answers every question about shapes, so another is of no use while it lives.
            lent = kind.backend == "none" and self._describing is not None and self._describing.alive
            return kind not in self._standing and kind not in self._given_up and not lent

    def _may_start(self, kind: EngineKind) -> bool:
        if self._clock.monotonic() < self._not_before_s.get(kind, 0.0) or self._busy():
            return False
        return self._has_room(self._size(kind.backend))

    def _has_room(self, more_bytes: int) -> bool:
        """Whether those that are kept may hold more."""
        memory = self._memory()
        most = memory.total_bytes // _SHARE if self._most_bytes is None else self._most_bytes
        roomy = memory.available_bytes - more_bytes >= memory.total_bytes // _SPARE_SHARE
        return roomy and self.memory_bytes() + more_bytes <= most

    def _size(self, backend: str) -> int:
        return self._sizes.get(backend, _FIRST_GUESS[backend])

    def _start(self, kind: EngineKind) -> None:
        """Start one, and wait until its imports are done."""
        name = "-".join(filter(None, ("engine-warm", kind.backend, kind.gpu_uuid)))
        try:
            process = self._start_process(
                self._log_dir / f"{name}.log",
                lambda: self._on_exit(kind),
                silence_s=self._silence_s,
                gpu_uuid=kind.gpu_uuid,
                backend=kind.backend,
                in_background=True,
            )
        except EngineUnavailable as error:
            self._put_off(kind, error.detail)
            return
        standing = _Standing(process, self._clock.monotonic())
        with self._changed:
            if not self._closed:
                self._standing[kind] = standing
        if self._closed:
            _end(standing)
            return
        try:
            warmed = standing.warming.result()
        except EngineFailed as error:
            self._lose(kind, standing, error.detail)
            return
        self._judge(kind, standing, warmed)

    def _judge(self, kind: EngineKind, standing: _Standing, warmed: WarmedUp) -> None:
        """End one that holds more than it may. One that was taken meanwhile is no longer looked at."""
        held, has_room = standing.process.private_bytes(), self._has_room(0)
        with self._changed:
            if self._standing.get(kind) is not standing:
                return
            self._sizes[kind.backend] = held  # the next is started where there is so much room
            within = not warmed.gpu_contexts and held <= _MOST_BYTES
            if within and has_room:
                _log.info("engine.warm", pid=standing.process.pid, backend=kind.backend, memory_bytes=held)
                return
            del self._standing[kind]
            if not within:
                self._given_up.add(kind)
        _log.warning("engine.not_kept_warm", backend=kind.backend, memory_bytes=held, gpu_contexts=warmed.gpu_contexts)
        _end(standing)

    # Deaths

    def _on_exit(self, kind: EngineKind) -> None:
        with self._changed:
            standing = self._standing.get(kind)
        if standing is not None and not standing.process.alive:
            self._lose(kind, standing, "its process ended")

    def _lose(self, kind: EngineKind, standing: _Standing, why: str) -> None:
        """Forget one that died, or that could not do its imports, and have another started later."""
        with self._changed:
            if self._standing.get(kind) is not standing:
                return
            del self._standing[kind]
            if self._clock.monotonic() - standing.began_s >= _LIVED_S:
                self._deaths.pop(kind, None)
        self._put_off(kind, why, standing.process.log_tail())
        _end(standing)

    def _put_off(self, kind: EngineKind, why: str, log_tail: Sequence[str] = ()) -> None:
        with self._changed:
            deaths = self._deaths[kind] = self._deaths.get(kind, 0) + 1
            wait_s = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2 ** min(deaths - 1, 16))
            self._not_before_s[kind] = self._clock.monotonic() + wait_s
            self._wake()
        _log.warning("engine.warm_lost", backend=kind.backend, why=why, again_in_s=wait_s, log_tail=list(log_tail))


def _end(standing: _Standing) -> None:
    standing.process.kill()
    standing.process.close()
