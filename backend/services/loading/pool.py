"""The base models in memory: one engine a base, started when it fits, ended when something else needs its memory."""

import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from core.clock import Clock
from core.errors import EngineUnavailable, ModelNotReady, StudioError
from core.logging import get_logger
from domain.memory.verdict import Assessment
from services.engines.warm import Engines
from services.hardware.devices import Device, device_name
from services.hardware.machine import Machine
from services.loading.admission import next_to_give_way, refuse_what_does_not_fit, refuse_what_is_blocked, with_room
from services.loading.base_request import BaseKey, BaseRequest
from services.loading.loaded_base import LoadedBase
from services.loading.placement import load_command
from services.models.files import ModelFiles

_log = get_logger(__name__)
_IDLE_CHECK_S = 15.0
T = TypeVar("T")


class BasePool:
    """Starts bases, shares them, and ends them.

    There are two locks, beside the one inside each base. A thread that takes several takes them in this order:

    - The lock of admission. One load or run holds it at a time, from the judgement whether it fits until it has begun.
      So two of them cannot both take the last memory. Engines are ended under it to make room, which takes seconds.
      Only other admissions wait meanwhile.
    - `lock`. It protects which bases there are, and what the owner keeps about them. Every request needs it, so no
      thread holds it while an engine starts or ends.

    Args:
        clock: For ages and idle times.
        machine: Knows the devices.
        files: Brings a model's files onto this machine.
        engines: Gives engines.
        forgotten: Called with each base that the pool has forgotten, with `lock` held and before its engine ends. The
            owner drops what it keeps about the base. It may be called twice for one base.
        log_dir: Where engines write.
        idle_unload_s: A base unused for this long is unloaded.
        make_room_after_s: A client's base unused for this long is unloaded where another needs its memory.
        engine_silence_s: An engine that is silent for this long is ended.

    Attributes:
        lock: An owner holds it while it reads or changes what it keeps about bases. The thread that holds it may take
            it again.
    """

    def __init__(
        self,
        clock: Clock,
        machine: Machine,
        files: ModelFiles,
        engines: Engines,
        forgotten: Callable[[LoadedBase], None],
        *,
        log_dir: Path,
        idle_unload_s: float,
        make_room_after_s: float,
        engine_silence_s: float,
    ) -> None:
        self._clock, self._machine, self._files, self._forgotten = clock, machine, files, forgotten
        self._engines = engines
        self._log_dir, self._engine_silence_s = log_dir, engine_silence_s
        self._idle_unload_s, self._make_room_after_s = idle_unload_s, make_room_after_s
        self.lock = threading.RLock()
        # The bases that a request may join. One that failed is replaced by the next of its key.
        self._bases: dict[BaseKey, LoadedBase] = {}
        self._held: list[LoadedBase] = []  # every base that is not forgotten
        self._admission = threading.Lock()
        self._loaders = ThreadPoolExecutor(max_workers=2, thread_name_prefix="load")
        self._closed = threading.Event()
        engines.hold_while(self._works_on_the_cpu)
        threading.Thread(target=self._unload_idle, name="idle-unload", daemon=True).start()

    # Reading

    def find(self, serves: Callable[[BaseKey], bool]) -> LoadedBase | None:
        """Return the oldest base whose key serves, in any state."""
        with self.lock:
            return next((base for key, base in self._bases.items() if serves(key)), None)

    def room_on(self, device: Device, own: LoadedBase | None = None) -> Device:
        """Return a device with the memory that a new load, or a run on the base `own`, may use: see `with_room`.

        What engines hold that are kept ready counts as free, since they give way.
        """
        with self.lock:
            device = with_room(device, self._bases.values(), own)
        if device.on_gpu or device.available_bytes is None:
            return device
        return replace(device, available_bytes=device.available_bytes + self._engines.memory_bytes())

    def free_on(self, device: Device) -> Device:
        """Return a device with what is free of it now, though nothing gives way."""
        with self.lock:
            return with_room(device, self._bases.values())

    def _works_on_the_cpu(self) -> bool:
        """Whether a base loads or works that was admitted with the host's memory as it was then."""
        with self.lock:
            bases = [base for base in self._bases.values() if base.key.device == "cpu"]
        return any(base.under_way or base.busy_with is not None for base in bases)

    # Admitting

    def admit_run(
        self, what: str, judge: Callable[[Device], Assessment], device: Device, runs_on: LoadedBase | BaseKey
    ) -> None:
        """Unload idle bases if a run needs their memory; refuse the run if it does not fit even then.

        Args:
            what: Names the run in the refusal.
            judge: Says whether it fits on a device.
            device: Where it runs.
            runs_on: The base that it will use; or the base's key where the base may not be there yet.

        Raises:
            DoesNotFit: With the estimate and what would make it fit.
            ModelRejected: The engine cannot train the model.
        """
        with self._admission:
            if isinstance(runs_on, BaseKey):
                with self.lock:
                    own = self._bases.get(runs_on)
            else:
                own = runs_on
            self._make_room(what, judge, device, own)

    def make_room(self, what: str, judge: Callable[[Device], Assessment], device: Device) -> None:
        """Unload idle bases if something beside them needs their memory.

        Args:
            what: Names it.
            judge: Says whether it fits on a device, without an estimate: what does not fit even then is not refused.
            device: Where it runs.
        """
        with self._admission:
            self._make_room(what, judge, device, None)

    def join_or_start(
        self, wanted: BaseRequest, judge: Callable[[Device], Assessment], register: Callable[[LoadedBase], T]
    ) -> T:
        """Join the base that is there already, or start loading it. Idle bases are unloaded if it needs their memory.

        Args:
            wanted: The base.
            judge: Says whether loading it fits on a device; not asked if the load is forced or the base is there.
            register: Called with the base. `lock` is held from the moment that the base was joined or started, so no
                thread sees an unregistered base or unloads it in between.

        Returns:
            What `register` returned.

        Raises:
            DoesNotFit: It needs more memory than the device would have with every idle base unloaded.
            ModelRejected: The engine cannot train the model, and the load is not forced.
            EngineUnavailable: The pool is closed.
        """
        with self._admission:
            with self.lock:
                base = self._bases.get(wanted.key)
                if base is not None and base.join(for_client=wanted.for_client):
                    return register(base)
            if not wanted.force:
                self._make_room(f"Loading {wanted.key.model_id}", judge, wanted.device, None)
            with self.lock:
                return register(self._start(wanted))

    def _make_room(
        self, what: str, judge: Callable[[Device], Assessment], device: Device, own: LoadedBase | None
    ) -> None:
        """Unload idle bases until a load or run fits; refuse it if it is blocked or does not fit even then.

        Engines that are kept ready hold nothing that anybody needs, so they give way first. The memory that an unloaded
        base gave back is measured. The caller holds the lock of admission, and not `lock`.
        """
        while True:
            with self.lock:
                bases = list(self._bases.values())
            device = self._free_now(device, bases, own)
            assessment = judge(device)
            refuse_what_is_blocked(assessment, what)
            if assessment.verdict != "does_not_fit":
                return
            if not device.on_gpu and self._engines.give_way(f"room for: {what}"):
                continue
            idle = next_to_give_way(device, bases, judge, own, self._make_room_after_s)
            if idle is None:
                refuse_what_does_not_fit(assessment, what, device)
                return
            self._retire(idle, self._make_room_after_s, f"room for: {what}", unkept_s=0.0)

    def _free_now(self, device: Device, bases: list[LoadedBase], own: LoadedBase | None) -> Device:
        """Return a device as it is now, with what is really free of it."""
        device = with_room(self._machine.device(device_name(device.torch_name)), bases, own)
        if device.on_gpu or device.available_bytes is None:
            return device
        return replace(device, available_bytes=max(0, device.available_bytes - self._engines.growing_bytes()))

    # Loading

    def _start(self, wanted: BaseRequest) -> LoadedBase:
        """Put a base there and have it loaded. The caller holds both locks."""
        if self._closed.is_set():
            raise EngineUnavailable("The server is stopping.")
        base = LoadedBase(wanted, self._clock)
        self._bases[wanted.key] = base
        self._held.append(base)
        # The context carries the request's Hub token to the download, and nowhere else.
        run = contextvars.copy_context().run
        base.loading = self._loaders.submit(run, self._load, base)
        return base

    def _load(self, base: LoadedBase) -> None:
        """Bring the files here and load them in a new engine. However it ends, the base's state says so."""
        wanted = base.wanted
        try:
            path = self._files.ensure(
                base.key.model_id,
                base.key.revision,
                base.report,
                lambda: base.cancelled,
                allow_pickle=wanted.allow_pickle,
            )
            if base.cancelled:
                return
            base.report("loading", replace(base.progress, fraction=None, bytes_per_s=None, eta_s=None))
            process = self._engines.take(
                self._log_dir / f"engine-{base.id}.log",
                on_exit=lambda: self._on_exit(base),
                silence_s=self._engine_silence_s,
                gpu_uuid=wanted.device.gpu_uuid,
                backend=base.key.engine,
            )
            if not base.adopt(process):
                process.close()
                return
            loaded = process.request(load_command(path, wanted.config, base.key, wanted.device)).result()
            base.ready(loaded)
            _log.info("model.ready", model_id=base.key.model_id, pid=process.pid, load_s=loaded.load_s)
        except StudioError as error:
            _log.warning("model.load_failed", model_id=base.key.model_id, error=error.detail)
            self._fail(base, error)
        except Exception as error:  # noqa: BLE001 - a loader thread must end in a state; the log has the traceback
            _log.exception("model.load_crashed", model_id=base.key.model_id)
            self._fail(base, StudioError(f"The model could not be loaded: {type(error).__name__}."))

    def _fail(self, base: LoadedBase, error: StudioError) -> None:
        """Record why a load failed. The base stays listed if a client asked for it; a job has the error itself."""
        base.fail(error)
        if not base.use.for_client:
            self._forget(base)
        base.end_process()

    def _on_exit(self, base: LoadedBase) -> None:
        if base.usable:
            _log.error("engine.ended", model_id=base.key.model_id, log_tail=base.log_tail())
            self._fail(base, ModelNotReady("The engine that held the model ended; load it again."))

    # Unloading

    def begin_unloading(self, base: LoadedBase) -> None:
        """Forget a base, unless a job holds it. The caller ends its engine afterwards, without `lock`.

        Raises:
            ModelBusy: A job holds it; it stays.
        """
        with self.lock:
            base.begin_unloading()
            self._forget(base)

    def _unload_idle(self) -> None:
        while not self._closed.wait(min(_IDLE_CHECK_S, self._idle_unload_s)):
            with self.lock:
                bases = list(self._bases.values())
            for base in bases:
                self._retire(base, self._idle_unload_s, "idle")

    def _retire(self, base: LoadedBase, idle_s: float, why: str, unkept_s: float | None = None) -> None:
        """Unload a base if it has been idle for a time. Its memory is free on return.

        The base first refuses its engine to everyone. Then it is forgotten. Its engine ends last, without `lock`.
        """
        if not base.retire(idle_s, unkept_s):
            return  # another thread has just begun to use it, or to unload it
        self._forget(base)
        base.end_process()
        _log.info("model.unloaded", model_id=base.key.model_id, why=why)

    def _forget(self, base: LoadedBase) -> None:
        with self.lock:
            self._forgotten(base)
            if base in self._held:
                self._held.remove(base)
            if self._bases.get(base.key) is base:
                del self._bases[base.key]

    def close(self) -> None:
        """End every engine, and start no more."""
        with self.lock:
            self._closed.set()
            bases = list(self._held)
            for base in bases:
                self._forget(base)
        for base in bases:
            base.begin_unloading(though_busy=True)
            base.end_process()
        self._loaders.shutdown(wait=False, cancel_futures=True)
