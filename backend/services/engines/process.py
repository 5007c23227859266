"""A handle on one engine process: start it, send commands, receive events, know how it ended."""

import signal
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

import psutil
from pydantic import ValidationError

from core import oom_order, telemetry
from core.errors import EngineFailed, EngineUnavailable, StudioError
from core.logging import get_logger
from core.oom_order import EndedBefore
from core.settings import get_settings
from domain import protocol
from domain.protocol import E, R
from services.engines import priority
from services.engines.log import EngineLog
from services.engines.spawning import spawn

# An engine sends a heartbeat every two seconds, also while torch works. An engine that is silent for so long hangs.
_SILENCE_S = 60.0
_STARVED = 0.02  # of the time: so little of a processor is not enough for a heartbeat
_log = get_logger(__name__)


class EngineDied(EngineFailed):
    """The engine process ended while a command was running.

    `exit_code` or `signal` says how it ended. `unresponsive` says whether it was killed for its silence. `log_tail`
    holds the last lines that it wrote.
    """

    slug, title = "engine-died", "Engine died"


def death_class(error: EngineDied, *, out_of_memory: bool) -> str:
    """Name how an engine ended, as jobs and exports record it.

    Args:
        error: The end of the engine.
        out_of_memory: Whether the kernel has meanwhile killed a process for want of memory. It counts these kills. A
            SIGKILL that it has not counted came from somebody else.
    """
    if error.extras.get("unresponsive"):
        return "engine_unresponsive"
    if error.extras.get("signal") != signal.SIGKILL:
        return "engine_crash"
    return "out_of_host_memory" if out_of_memory else "engine_killed"


class CommandFailed(EngineFailed):
    """The engine lives, but could not carry out a command. `error_class` says why."""

    slug, title = "engine-command-failed", "Engine command failed"


@dataclass(frozen=True)
class _Pending(Generic[R, E]):
    """A command that has not had its final event yet."""

    command: protocol.Command[R, E]
    future: Future[R]
    on_event: Callable[[E], None] | None


class EngineProcess:
    """One engine.

    Args:
        log_path: Where its stdout and stderr go, capped at 4 MiB with one older part kept.
        on_exit: Called once, from a thread of this class, when the process has ended.
        silence_s: Seconds without a heartbeat after which it is killed.
        gpu_uuid: The one GPU that its libraries will see; None for every one there is.
        backend: The back end that will load its base, or `none` where it will hold none. Unsloth must be imported
            before the packages that it patches.
        in_background: Whether it gives way to everything else on the machine until `take_over`, where the system lets
            its priority be raised again. The kernel ends it first where memory runs out.
    """

    def __init__(
        self,
        log_path: Path,
        on_exit: Callable[[], None] | None = None,
        silence_s: float = _SILENCE_S,
        gpu_uuid: str | None = None,
        backend: str = "transformers",
        *,
        in_background: bool = False,
    ) -> None:
        self._on_exit = on_exit
        self._nice = get_settings().engine_nice
        self._in_background = in_background and priority.can_be_raised(self._nice)
        self._silence_s, self._heard_s = silence_s, time.monotonic()
        self._unresponsive, self._handling, self._resting = False, False, False
        self._pending: dict[str, _Pending[Any, Any]] = {}
        self._lock = threading.Lock()
        self._log = EngineLog(log_path)
        self._closing = False
        self._ended = threading.Event()
        self._begun = threading.Event()
        self.garbage_lines = 0
        log_path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._process, self._commands, events = spawn(
                log_path.parent, gpu_uuid, backend, priority.LOWEST if self._in_background else self._nice
            )
        except OSError as error:
            raise EngineUnavailable(f"No engine process could be started: {error}") from error
        oom_order.mark(self.pid, EndedBefore.EVERYTHING if in_background else EndedBefore.SERVER)
        telemetry.engine_starts.inc()
        self._log_thread = threading.Thread(
            target=self._log.copy, args=(self._process.stdout,), name="engine-log", daemon=True
        )
        self._log_thread.start()
        threading.Thread(target=self._read_events, args=(events,), name="engine-events", daemon=True).start()
        threading.Thread(target=self._watch, name="engine-watch", daemon=True).start()

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def take_over(self, log_path: Path, on_exit: Callable[[], None] | None, silence_s: float) -> bool:
        """Make an engine that was started beforehand one like any other.

        Args:
            log_path: Where its output goes from now on; what it has written goes there too.
            on_exit: As at the start.
            silence_s: As at the start.

        Returns:
            Whether it lives. Of one that does not, `on_exit` is not called.
        """
        with self._lock:
            if not self.alive:
                return False
            self._on_exit, self._silence_s = on_exit, silence_s
        try:
            self._log.move(log_path)
        except OSError as error:
            _log.warning("engine.log_not_moved", pid=self.pid, reason=str(error))
        oom_order.mark(self.pid, EndedBefore.SERVER)
        if self._in_background:
            priority.raise_to(self.pid, self._nice)
        return True

    def private_bytes(self) -> int:
        """Return the memory that ending the process would free now: what no file backs; 0 if it has ended."""
        try:
            held = psutil.Process(self.pid).memory_info()
        except psutil.NoSuchProcess:
            return 0
        return int(held.rss - getattr(held, "shared", 0))  # Linux alone tells them apart

    def resident_bytes(self) -> int:
        """Return the memory that the process holds now; 0 if it has ended."""
        try:
            return int(psutil.Process(self.pid).memory_info().rss)
        except psutil.NoSuchProcess:
            return 0

    def processor_s(self) -> float:
        """Return the seconds of processor time that the process has used; 0 if it has ended."""
        try:
            used = psutil.Process(self.pid).cpu_times()
        except psutil.NoSuchProcess:
            return 0.0
        return float(used.user + used.system)

    @property
    def alive(self) -> bool:
        """Whether the process runs and takes commands."""
        return not self._closing and not self._ended.is_set()

    @property
    def begun(self) -> bool:
        """Whether it has said anything yet."""
        return self._begun.is_set()

    @property
    def has_pending(self) -> bool:
        """Whether a command has not had its final event yet."""
        with self._lock:
            return bool(self._pending)

    def log_tail(self) -> list[str]:
        """Return the last lines of the engine's own output."""
        return self._log.tail()

    def request(self, command: protocol.Command[R, E], on_event: Callable[[E], None] | None = None) -> "Future[R]":
        """Send a command.

        Args:
            command: The command. `stop` takes its `request_id`.
            on_event: Called with every event before the final one, in order, on the reader's thread.

        Returns:
            A future of the command's result. It fails with CommandFailed, with EngineDied, or with EngineFailed if the
            answer is no result of this command.
        """
        future: Future[R] = Future()
        with self._lock:
            if not self.alive:
                future.set_exception(self._death())
                return future
            self._pending[command.request_id] = _Pending(command, future, on_event)
            self._heard_s, self._resting = time.monotonic(), False
        self._send(command)
        return future

    def stop(self, request_id: str, mode: protocol.StopMode = "discard") -> None:
        """Ask the engine to end a command early. The command's future is done once the engine has."""
        self._send(protocol.Stop(target_id=request_id, mode=mode))

    def write_checkpoint(self, request_id: str) -> None:
        """Ask the engine for a checkpoint of a training run. An event says when it is written."""
        self._send(protocol.WriteCheckpoint(target_id=request_id))

    def close(self, timeout_s: float = 10.0) -> None:
        """End the process: by closing its pipe, or by force after `timeout_s`. Its memory is free on return."""
        self._closing = True
        with suppress(BrokenPipeError):  # it is already gone; the wait below collects it
            self._commands.close()
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._ended.wait(timeout_s)

    def kill(self) -> None:
        """End the process at once."""
        self._process.kill()

    def _send(self, line: protocol.Command[R, E] | protocol.Signal) -> None:
        encoded = protocol.encode(line)
        try:
            with self._lock:
                self._commands.write(encoded)
                self._commands.flush()
        except (BrokenPipeError, ValueError):
            # The process ended; the events thread sees end-of-file and fails what is pending.
            _log.warning("engine.gone", pid=self.pid, command=type(line).__name__)

    def _watch(self) -> None:
        """Kill an engine that has fallen silent: one that is stopped, swapped out for good, or stuck in a driver.

        An engine that wants the processor and does not get it is silent too. It has got almost none of it meanwhile; so
        its time goes on when it has.
        """
        tick_s = min(protocol.HEARTBEAT_S, self._silence_s / 4)
        looked_s, spent_s = time.monotonic(), self.processor_s()
        while not self._ended.wait(tick_s):
            now_s = time.monotonic()
            if now_s - looked_s > 2 * tick_s:
                self._heard_s = now_s  # this process itself was stopped meanwhile, so the time begins again
            looked_s = now_s
            before_s, spent_s = spent_s, self.processor_s()
            if self._handling or self._resting:
                self._heard_s = now_s
            elif now_s - self._heard_s > tick_s and spent_s - before_s < _STARVED * tick_s and self._wants_processor():
                self._heard_s += tick_s
            if now_s - self._heard_s > self._silence_s:
                _log.error("engine.silent", pid=self.pid, silent_s=round(now_s - self._heard_s))
                self._unresponsive = True
                self._process.kill()
                return

    def _wants_processor(self) -> bool:
        """Whether one of its threads has the processor or waits for it. Linux alone tells."""
        states = set()
        for stat in Path(f"/proc/{self.pid}/task").glob("*/stat"):
            with suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended
                states.add(stat.read_text().rpartition(") ")[2][:1])  # man 5 proc_pid_stat
        return "R" in states

    def _read_events(self, events: Any) -> None:
        with events:
            for line in events:
                try:
                    event = protocol.EVENTS.validate_json(line)
                except ValidationError:
                    self.garbage_lines += 1
                    _log.warning("engine.garbage", pid=self.pid, size_bytes=len(line))
                    continue
                self._heard_s = time.monotonic()
                self._begun.set()
                if not isinstance(event, protocol.Heartbeat):
                    self._deliver(event)
        self._process.wait()
        self._log_thread.join(timeout=5)
        if not self._closing:
            code = self._process.returncode
            telemetry.engine_deaths.labels(f"signal {-code}" if code < 0 else f"exit code {code}").inc()
        with self._lock:
            self._ended.set()
            pending, self._pending = self._pending, {}
            on_exit = self._on_exit
        for waiting in pending.values():
            waiting.future.set_exception(self._death())
        if on_exit is not None:
            on_exit()

    def _deliver(self, event: protocol.CommandEvent) -> None:
        final = isinstance(event, protocol.Done | protocol.Failed)
        with self._lock:
            waiting = self._pending.pop(event.request_id, None) if final else self._pending.get(event.request_id)
            if waiting is not None and final and isinstance(waiting.command, protocol.WarmUp):
                self._resting = not self._pending
        if waiting is None:
            return
        if isinstance(event, protocol.Done):
            self._settle(waiting, event)
        elif isinstance(event, protocol.Failed):
            extras = {"error_class": event.error_class, "suggestions": event.suggestions}
            waiting.future.set_exception(CommandFailed(event.message, **extras, log_tail=self.log_tail()))
        elif not isinstance(event, waiting.command.event_types()):
            self.garbage_lines += 1
            _log.warning("engine.stray_event", pid=self.pid, command=type(waiting.command).__name__, kind=event.kind)
        elif waiting.on_event is not None:
            self._handle(event, waiting.on_event, waiting.future)

    def _settle(self, waiting: _Pending[R, E], event: protocol.Done) -> None:
        """Complete a command's future with the result, read as the type that the command names."""
        try:
            result = waiting.command.read_result(event.result)
        except ValidationError as error:
            _log.error("engine.wrong_result", pid=self.pid, command=type(waiting.command).__name__, error=str(error))
            wrong = f"The engine answered {type(waiting.command).__name__} with something else than its result."
            waiting.future.set_exception(EngineFailed(wrong, log_tail=self.log_tail()))
        else:
            waiting.future.set_result(result)

    def _handle(self, event: protocol.CommandEvent, on_event: Callable[[Any], None], future: "Future[Any]") -> None:
        """Pass an event on. If that fails, for instance on a full disk, the command fails and this thread goes on."""
        self._handling = True  # nobody listens for heartbeats meanwhile
        try:
            on_event(event)
        except Exception as error:  # noqa: BLE001 - whatever it is, the reader goes on
            _log.exception("engine.event_lost", pid=self.pid, event_kind=event.kind)
            with self._lock:
                known = self._pending.pop(event.request_id, None)
            if known is not None:
                detail = error.detail if isinstance(error, StudioError) else type(error).__name__
                future.set_exception(EngineFailed(f"An event of the engine could not be recorded: {detail}"))
            self.stop(event.request_id)
        finally:
            self._heard_s, self._handling = time.monotonic(), False

    def _death(self) -> EngineDied:
        code = self._process.poll()
        number = -code if code is not None and code < 0 else None
        how = f"by signal {number} ({signal.Signals(number).name})" if number else f"with exit code {code}"
        why = f" after {self._silence_s:g} s of silence" if self._unresponsive else ""
        return EngineDied(
            f"The engine process {self.pid} ended {how}{why}.",
            unresponsive=self._unresponsive,
            exit_code=code if code is not None and code >= 0 else None,
            signal=number,
            log_tail=self.log_tail(),
        )
