"""Configurations, and the base models that are loaded: one engine a base, shared by whoever asks for it."""

import contextvars
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from core.clock import Clock, SystemClock
from core.errors import LoadedModelNotFound, ModelBusy, ModelNotReady, StudioError
from core.logging import get_logger
from core.settings import get_settings
from core.singleton import singleton
from domain import protocol
from domain.activations import Batch
from domain.algorithms import SPECS, Algorithm
from domain.configure import Configuration, configure
from domain.memory_estimate import adapter_parameters, loading_bytes
from domain.memory_verdict import Assessment, assess, assess_loading, savings
from domain.model_shape import ModelShape
from domain.peft_config import PeftConfig
from domain.use_cases import UseCaseId
from services.admission import next_to_give_way, refuse_what_does_not_fit, with_room
from services.base_placement import load_command, place
from services.devices import Device, EngineChoice, device_name
from services.engine_process import EngineProcess
from services.loaded_base import BaseKey, LoadedBase, LoadState
from services.machine import Machine, get_machine
from services.model_facts import ModelFacts, get_model_facts
from services.model_files import ModelFiles, get_model_files

_log = get_logger(__name__)
_IDLE_CHECK_S = 15.0


@dataclass(frozen=True)
class LoadRequest:
    """What a client wants loaded, or with `for_job` what a job needs.

    Attributes:
        for_job: Whether a job or an export wants it: `overrides` then says nothing about other jobs, and no client
            asked for the model to stay.
    """

    model_id: str
    revision: str | None
    algorithm: Algorithm
    use_case: UseCaseId | None
    overrides: dict[str, Any]
    engine: str
    device: str | int
    force: bool
    allow_pickle: bool = False
    for_job: bool = False


@dataclass(frozen=True)
class LoadedModel:
    """A base model with the configuration it was asked for. Several may share one base.

    Attributes:
        asked: What the client set itself; it holds for jobs on the model.
    """

    id: str
    model_id: str
    revision: str | None
    algorithm: Algorithm
    configuration: Configuration
    base: LoadedBase
    estimated_bytes: int | None
    trainable_parameters: int | None
    asked: Mapping[str, Any]

    @property
    def state(self) -> LoadState:
        return self.base.state


class PeftService:
    """Loads, lends out and unloads base models.

    Args:
        clock: For ages and idle times.
        machine: Tells the devices and the engine.
        files: Brings a model's files onto this machine.
        facts: Tells a model's shape without its weights.
        log_dir: Where engines write.
        idle_unload_s: A model unused for this long is unloaded.
        make_room_after_s: A client's model unused for this long is unloaded where another needs its memory.
        engine_silence_s: An engine that is silent for this long is ended.
    """

    def __init__(
        self,
        clock: Clock,
        machine: Machine,
        files: ModelFiles,
        facts: ModelFacts,
        *,
        log_dir: Path,
        idle_unload_s: float,
        make_room_after_s: float,
        engine_silence_s: float,
    ) -> None:
        self._clock, self._machine, self._files, self._facts = clock, machine, files, facts
        self._log_dir, self._engine_silence_s = log_dir, engine_silence_s
        self._idle_unload_s, self._make_room_after_s = idle_unload_s, make_room_after_s
        self._models: dict[str, LoadedModel] = {}
        self._bases: dict[BaseKey, LoadedBase] = {}
        self._lock = threading.RLock()
        # What is admitted is admitted one by one, so that two cannot both take the last. Beside the lock above, which
        # every request needs: room is made by ending engines, and that takes seconds.
        self._admission = threading.Lock()
        self._loaders = ThreadPoolExecutor(max_workers=2, thread_name_prefix="load")
        self._closed = threading.Event()
        threading.Thread(target=self._unload_idle, name="idle-unload", daemon=True).start()

    # Configuration

    def configure(
        self,
        algorithm: Algorithm,
        use_case: UseCaseId | None,
        overrides: dict[str, Any],
        *,
        model_id: str | None = None,
        revision: str | None = None,
        device: Device | None = None,
    ) -> Configuration:
        """Make a complete configuration for this machine and, if named, a model.

        Raises:
            SettingRejected: An override cannot take effect.
            ModelNotFound: There is no such model.
        """
        device = device or self._beside(self._machine.device("auto"), algorithm, overrides, model_id, revision)
        shape = self._facts.shape(model_id, revision) if model_id is not None else None
        return configure(
            algorithm,
            use_case=use_case,
            overrides=overrides,
            machine=device.facts,
            shape=shape,
            available_bytes=device.available_bytes,
        )

    def device(self, wanted: str | int) -> Device:
        """Return a device with what a new load may use of it: what is free, less what loads under way will need.

        Raises:
            SettingRejected: There is no such device.
        """
        device = self._machine.device(wanted)
        with self._lock:
            return with_room(device, self._bases.values())

    def _beside(
        self,
        device: Device,
        algorithm: Algorithm,
        overrides: dict[str, Any],
        model_id: str | None,
        revision: str | None,
    ) -> Device:
        """Return a device as it is for a run: what a base of the model holds that is there already counts as free.

        Otherwise a base that fits would be loaded a second time in fewer bits.
        """
        stored = SPECS[algorithm].fixed.get("quantization", overrides.get("quantization", "none"))
        wanted = (model_id, revision, stored, device.torch_name)
        with self._lock:
            own = [
                base
                for base in self._bases.values()
                if (base.key.model_id, base.key.revision, base.key.quantization, base.key.device) == wanted
                and overrides.get("precision", base.key.precision) == base.key.precision
            ]
            return with_room(device, self._bases.values(), own[0] if own else None)

    def device_of(self, model: LoadedModel) -> Device:
        """Return the device that a loaded model is on, with what a run on that model may use of it."""
        device = self._machine.device(device_name(model.base.key.device))
        with self._lock:
            return with_room(device, self._bases.values(), model.base)

    def admit_run(
        self,
        model_id: str,
        revision: str | None,
        config: PeftConfig,
        *,
        loaded: LoadedModel | None,
        batch: Batch,
    ) -> None:
        """Refuse a fine-tune that does not fit, even once idle models have been unloaded for it.

        Args:
            loaded: The loaded model it will use, if it names one; otherwise a base that is there is taken.
            batch: The largest forward pass of the data.

        Raises:
            DoesNotFit: With the estimate and what would make it fit.
        """
        shape = self._facts.shape(model_id, revision)

        def judge(device: Device) -> Assessment:
            available = device.available_bytes
            return assess(shape, config, available, on_gpu=device.on_gpu, batch=batch, siblings=self._facts.siblings)

        device = self._machine.device("auto" if loaded is None else device_name(loaded.base.key.device))
        with self._admission:
            if loaded is None:
                key, _ = place(self._machine, "auto", model_id, revision, config, shape, device)
                with self._lock:
                    own = self._bases.get(key)
            else:
                own = loaded.base
            self._admit(f"Training {model_id}", judge, device, own)

    def savings(self, model_id: str, revision: str | None, config: PeftConfig, *, on_gpu: bool) -> list[str]:
        """Say what would need less memory, and how much; nothing where the model's layers are not known."""
        shape = self._facts.shape(model_id, revision)
        return savings(shape, config, on_gpu=on_gpu) if shape is not None else []

    # Loading

    def load(self, request: LoadRequest) -> LoadedModel:
        """Start loading a model, or join the load of the same base that is there already.

        Raises:
            SettingRejected: A setting cannot take effect.
            ModelNotFound: There is no such model.
            NeedsRemoteCode, NoSafeWeights, ModelRejected: It is not safe to load; nothing is downloaded.
            DoesNotFit: Loading it needs more than the device has free beside the loads under way, even with every
                idle model unloaded.
        """
        device = self.device(request.device)
        self._files.check(request.model_id, request.revision, allow_pickle=request.allow_pickle)
        shape = self._facts.shape(request.model_id, request.revision)
        configuration = self.configure(
            request.algorithm,
            request.use_case,
            request.overrides,
            model_id=request.model_id,
            revision=request.revision,
            device=self._beside(
                self._machine.device(request.device),
                request.algorithm,
                request.overrides,
                request.model_id,
                request.revision,
            ),
        )
        config = configuration.config
        key, engine = place(self._machine, request.engine, request.model_id, request.revision, config, shape, device)
        needed = loading_bytes(shape, config, on_gpu=device.on_gpu) if shape is not None else None
        trainable = _trainable(shape, configuration)
        with self._admission:
            with self._lock:
                base = self._bases.get(key)
                if base is not None and base.join(for_client=not request.for_job):
                    return self._on_base(base, request, configuration, needed, trainable)
            if not request.force:
                self._admit_load(request.model_id, shape, config, device)
            with self._lock:
                base = self._start(key, configuration, engine, device, request, needed)
                return self._on_base(base, request, configuration, needed, trainable)

    def _on_base(
        self,
        base: LoadedBase,
        request: LoadRequest,
        configuration: Configuration,
        needed: int | None,
        trainable: int | None,
    ) -> LoadedModel:
        """Return the loaded model of a request: one that is there, or a new one. The caller holds the lock."""
        for model in self._models.values():
            same = model.base is base and model.algorithm == request.algorithm
            asked_alike = request.for_job or model.asked == request.overrides
            if same and asked_alike and model.configuration.config == configuration.config:
                return model
        model = LoadedModel(
            f"mdl_{uuid.uuid4().hex[:12]}",
            request.model_id,
            request.revision,
            request.algorithm,
            configuration,
            base,
            needed,
            trainable,
            {} if request.for_job else request.overrides,
        )
        self._models[model.id] = model
        return model

    def _admit_load(self, model_id: str, shape: ModelShape | None, config: PeftConfig, device: Device) -> None:
        def judge(device: Device) -> Assessment:
            available = device.available_bytes
            return assess_loading(shape, config, available, on_gpu=device.on_gpu, siblings=self._facts.siblings)

        self._admit(f"Loading {model_id}", judge, device, None)

    def _admit(self, what: str, judge: Callable[[Device], Assessment], device: Device, own: LoadedBase | None) -> None:
        """Refuse what does not fit, after unloading idle models where that makes it fit.

        The caller admits nothing else meanwhile. What an unloaded model gave back is measured, not computed.
        """
        while True:
            with self._lock:
                bases = list(self._bases.values())
            device = with_room(self._machine.device(device_name(device.torch_name)), bases, own)
            found = judge(device)
            if found.verdict != "does_not_fit":
                return
            idle = next_to_give_way(device, bases, judge, own, self._make_room_after_s)
            if idle is None:
                refuse_what_does_not_fit(found, what, device)
                return
            self._retire(idle, self._make_room_after_s, f"room for: {what}", unkept_s=0.0)

    def _start(
        self,
        key: BaseKey,
        configuration: Configuration,
        engine: EngineChoice,
        device: Device,
        request: LoadRequest,
        needed: int | None,
    ) -> LoadedBase:
        base = LoadedBase(key, self._clock, engine.reason, force=request.force, allow_pickle=request.allow_pickle)
        base.kept_for_client, base.needed_bytes = not request.for_job, needed  # before the load can fail
        self._bases[key] = base
        # The context carries the request's Hub token to the download, and nowhere else.
        run = contextvars.copy_context().run
        future: Future[None] = self._loaders.submit(run, self._load, base, configuration, device)
        base.loading = future
        return base

    def _load(self, base: LoadedBase, configuration: Configuration, device: Device) -> None:
        """Bring the files here and load them in a new engine; every outcome is a state of the base."""
        try:
            path = self._files.ensure(
                base.key.model_id,
                base.key.revision,
                base.report,
                lambda: base.cancelled,
                allow_pickle=base.options.allow_pickle,
            )
            if base.cancelled:
                base.finish(LoadState.UNLOADING)
                return
            base.report("loading", replace(base.progress, fraction=None, bytes_per_s=None, eta_s=None))
            process = EngineProcess(
                self._log_dir / f"engine-{base.id}.log",
                on_exit=lambda: self._on_exit(base),
                silence_s=self._engine_silence_s,
                gpu_uuid=device.gpu_uuid,
                backend=base.key.engine,
            )
            if not base.adopt(process):
                process.close()
                return
            _, future = process.request(
                lambda request_id: load_command(request_id, path, configuration.config, base.key, device)
            )
            base.ready(future.result())
            _log.info("model.ready", model_id=base.key.model_id, pid=process.pid, load_s=base.load_s)
        except StudioError as error:
            _log.warning("model.load_failed", model_id=base.key.model_id, error=error.detail)
            self._fail(base, error)
        except Exception as error:  # noqa: BLE001 - a loader thread must end in a state; the log has the traceback
            _log.exception("model.load_crashed", model_id=base.key.model_id)
            self._fail(base, StudioError(f"The model could not be loaded: {type(error).__name__}."))

    def _fail(self, base: LoadedBase, error: StudioError) -> None:
        """Record why a load failed: with the base for the client to see, or else with the job alone that wanted it."""
        base.fail(error)
        base.end_process()
        if not base.kept_for_client:
            self._forget(base)

    def _on_exit(self, base: LoadedBase) -> None:
        if base.usable:
            base.fail(ModelNotReady("The engine that held the model ended; load it again."))
            _log.error("engine.ended", model_id=base.key.model_id, log_tail=base.log_tail())

    # Reading

    def models(self) -> list[LoadedModel]:
        """Return every loaded model, oldest first."""
        with self._lock:
            return list(self._models.values())

    def memory_bytes(self) -> dict[tuple[str, str], int]:
        """Return the memory of each loaded base, by model id and device."""
        return {
            (model.model_id, model.base.key.device): model.base.memory_bytes
            for model in self.models()
            if model.base.memory_bytes is not None
        }

    def get(self, model_id: str) -> LoadedModel:
        """Return one loaded model.

        Raises:
            LoadedModelNotFound: There is none of that id.
        """
        with self._lock:
            model = self._models.get(model_id)
        if model is None:
            raise LoadedModelNotFound(f"No loaded model has the id {model_id}.")
        return model

    # Using

    @contextmanager
    def lent(self, model: LoadedModel, purpose: str) -> Iterator[EngineProcess]:
        """Hold the base for one long piece of work; others get ModelBusy meanwhile.

        Raises:
            ModelNotReady: It is still loading, or failed.
            ModelBusy: Something else holds it.
        """
        process = model.base.acquire(purpose)
        try:
            yield process
        finally:
            model.base.release()

    def attach(self, model: LoadedModel, adapter_id: str, path: Path) -> None:
        """Make an adapter usable on a loaded base. It stays until the base is unloaded."""
        if adapter_id in model.base.adapters:
            return
        process = model.base.engine()
        _, future = process.request(
            lambda request_id: protocol.AttachAdapter(request_id=request_id, adapter_id=adapter_id, path=str(path))
        )
        result = future.result()
        model.base.touch()
        model.base.attached(adapter_id, result["memory_bytes"])

    def detach_everywhere(self, adapter_id: str) -> None:
        """Take an adapter off every base that has it.

        Raises:
            ModelBusy: A base that has it is training.
        """
        for base in {id(model.base): model.base for model in self.models()}.values():
            if adapter_id not in base.adapters:
                continue
            if base.busy_with is not None:
                raise ModelBusy(f"The base of the adapter is {base.busy_with}.")
            try:
                process = base.engine()
            except ModelNotReady:
                continue  # it is being unloaded, and the adapter with it
            _, future = process.request(
                lambda request_id: protocol.DetachAdapter(request_id=request_id, adapter_id=adapter_id)
            )
            base.detached(adapter_id, future.result()["memory_bytes"])

    # Unloading

    def unload(self, model_id: str) -> None:
        """Forget a loaded model; the last one on a base ends its engine and frees its memory before returning.

        Raises:
            LoadedModelNotFound: There is none of that id.
            ModelBusy: A job is training on the base.
        """
        with self._lock:
            model = self.get(model_id)
            base = model.base
            others = [other for other in self._models.values() if other.base is base and other.id != model_id]
            if not others:
                base.begin_unloading()
                if self._bases.get(base.key) is base:
                    del self._bases[base.key]
            del self._models[model_id]
        if not others:
            base.end_process()

    def _unload_idle(self) -> None:
        while not self._closed.wait(min(_IDLE_CHECK_S, self._idle_unload_s)):
            with self._lock:
                bases = list(self._bases.values())
            for base in bases:
                self._retire(base, self._idle_unload_s, "idle")

    def _retire(self, base: LoadedBase, idle_s: float, why: str, unkept_s: float | None = None) -> None:
        """Unload a base, with every loaded model on it, if it has been idle for so long; its memory is free then."""
        if not base.retire(idle_s, unkept_s):
            return  # it was put to use, or unloaded, at this very moment
        self._forget(base)
        base.end_process()
        _log.info("model.unloaded", model_id=base.key.model_id, why=why)

    def _forget(self, base: LoadedBase) -> None:
        with self._lock:
            self._models = {name: model for name, model in self._models.items() if model.base is not base}
            if self._bases.get(base.key) is base:
                del self._bases[base.key]

    def close(self) -> None:
        """End every engine."""
        self._closed.set()
        with self._lock:
            bases = list({id(model.base): model.base for model in self._models.values()}.values())
            self._models.clear()
            self._bases.clear()
        for base in bases:
            base.finish(LoadState.UNLOADING)
            base.end_process()
        self._loaders.shutdown(wait=False, cancel_futures=True)


def _trainable(shape: ModelShape | None, configuration: Configuration) -> int | None:
    return adapter_parameters(shape, configuration.config) if shape is not None else None


@singleton
def get_peft_service() -> PeftService:
    """Return the process's PEFT service."""
    settings = get_settings()
    return PeftService(
        SystemClock(),
        get_machine(),
        get_model_files(),
        get_model_facts(),
        log_dir=settings.home / "logs",
        idle_unload_s=settings.idle_unload_s,
        make_room_after_s=settings.make_room_after_s,
        engine_silence_s=settings.engine_silence_s,
    )
