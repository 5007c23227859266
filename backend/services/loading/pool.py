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
from services.engines.process import EngineProcess
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

    Two locks, beside the one inside each base; who takes several takes them in this order:

    - Admission's is held by one load or run at a time, from the judgement whether it fits until it has begun, so that
      two cannot both take the last memory. Making room under it ends engines, which takes seconds: nothing but another
      admission waits for it.
    - `lock` protects which bases there are, together with what the owner keeps about them. Every request needs it, so
      nobody holds it while an engine starts or ends.

    Args:
        clock: For ages and idle times.
        machine: Tells the devices.
        files: Brings a model's files onto this machine.
        forgotten: Takes each base that the pool has forgotten, with `lock` held and before the pool ends its engine:
            the owner drops what it keeps about it in the same step. May come twice for one base.
        log_dir: Where engines write.
        idle_unload_s: A base unused for this long is unloaded.
        make_room_after_s: A client's base unused for this long is unloaded where another needs its memory.
        engine_silence_s: An engine that is silent for this long is ended.

    Attributes:
        lock: For owners to change or read what they keep about bases in one step with the bases. It may be taken again
            by the thread that holds it.
    """

    def __init__(
        self,
        clock: Clock,
        machine: Machine,
        files: ModelFiles,
        forgotten: Callable[[LoadedBase], None],
        *,
        log_dir: Path,
        idle_unload_s: float,
        make_room_after_s: float,
        engine_silence_s: float,
    ) -> None:
        self._clock, self._machine, self._files, self._forgotten = clock, machine, files, forgotten
        self._log_dir, self._engine_silence_s = log_dir, engine_silence_s
        self._idle_unload_s, self._make_room_after_s = idle_unload_s, make_room_after_s
        self.lock = threading.RLock()
        # Those to join, where a base that failed makes way for the next of its key; and all that are not forgotten.
        self._bases: dict[BaseKey, LoadedBase] = {}
        self._held: list[LoadedBase] = []
        self._admission = threading.Lock()
        self._loaders = ThreadPoolExecutor(max_workers=2, thread_name_prefix="load")
        self._closed = threading.Event()
        threading.Thread(target=self._unload_idle, name="idle-unload", daemon=True).start()

    # Reading

    def find(self, serves: Callable[[BaseKey], bool]) -> LoadedBase | None:
        """Return the oldest base whose key will do, in whatever state it is."""
        with self.lock:
            return next((base for key, base in self._bases.items() if serves(key)), None)

    def room_on(self, device: Device, own: LoadedBase | None = None) -> Device:
        """Return a device with what a new load, or a run on the base `own`, may use of it: see `with_room`."""
        with self.lock:
            return with_room(device, self._bases.values(), own)

    # Admitting

    def admit_run(
        self, what: str, judge: Callable[[Device], Assessment], device: Device, runs_on: LoadedBase | BaseKey
    ) -> None:
        """Refuse a run that does not fit, even once idle bases have been unloaded for it.

        Args:
            what: Names it in the refusal.
            judge: Says whether it fits on a device.
            device: Where it runs.
            runs_on: The base it will run on; or its key, and then it runs on the base of that key, if there is one.

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

    def join_or_start(
        self, wanted: BaseRequest, judge: Callable[[Device], Assessment], register: Callable[[LoadedBase], T]
    ) -> T:
        """Join the base that is there already, or start loading it, after unloading idle ones where that is needed.

        Args:
            wanted: The base.
            judge: Says whether loading it fits on a device; not asked if the load is forced or the base is there.
            register: Takes the base, with `lock` held since it was joined or started: no other thread sees the one
                without the other, and none can unload it in between.

        Returns:
            What `register` returned.

        Raises:
            DoesNotFit: Loading it needs more than the device has free beside the loads under way, even with every idle
                base unloaded.
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
        """Refuse what is blocked, and what does not fit, after unloading idle bases where that makes it fit.

        The caller holds admission's lock, and not `lock`. What an unloaded base gave back is measured, not computed.
        """
        while True:
            with self.lock:
                bases = list(self._bases.values())
            device = with_room(self._machine.device(device_name(device.torch_name)), bases, own)
            assessment = judge(device)
            refuse_what_is_blocked(assessment, what)
            if assessment.verdict != "does_not_fit":
                return
            idle = next_to_give_way(device, bases, judge, own, self._make_room_after_s)
            if idle is None:
                refuse_what_does_not_fit(assessment, what, device)
                return
            self._retire(idle, self._make_room_after_s, f"room for: {what}", unkept_s=0.0)

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
        """Bring the files here and load them in a new engine; every outcome is a state of the base."""
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
            process = EngineProcess(
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
        """Record why there is no base: with it for the client to see, or else with the job alone that wanted it."""
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
        """Forget a base whatever it is doing but a job; the caller ends its engine then, without `lock`.

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
        """Unload a base if it has been idle for so long; its memory is free then.

        From the first line on it gives its engine to nobody; then it is forgotten, and its engine ends last, without
        `lock`.
        """
        if not base.retire(idle_s, unkept_s):
            return  # it was put to use, or unloaded, at this very moment
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
