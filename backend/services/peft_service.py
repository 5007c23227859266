"""Configurations, and the models that are loaded: who asked for which base in memory, and how it is used."""

import uuid
from pathlib import Path
from typing import Any

from core.clock import Clock, SystemClock
from core.errors import LoadedModelNotFound, ModelBusy, ModelNotReady
from core.settings import get_settings
from core.singleton import singleton
from domain import protocol
from domain.configure import Configuration, configure
from domain.memory.activations import Batch
from domain.memory.estimate import adapter_parameters, loading_bytes
from domain.memory.verdict import Assessment, assess, assess_loading, savings
from domain.peft.algorithms import SPECS, Algorithm
from domain.peft.config import PeftConfig
from domain.peft.use_cases import UseCaseId
from services.hardware.devices import Device, device_name
from services.hardware.machine import Machine
from services.hardware_service import get_machine
from services.loading.base_request import BaseKey, BaseRequest
from services.loading.loaded_base import LoadedBase
from services.loading.loaded_model import LoadedModel, LoadRequest
from services.loading.placement import place
from services.loading.pool import BasePool
from services.model_registry_service import get_model_facts, get_model_files
from services.models.facts import ModelFacts
from services.models.files import ModelFiles

__all__ = ["LoadRequest", "LoadedModel", "PeftService", "get_peft_service"]


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
        self._machine, self._files, self._facts = machine, files, facts
        self._models: dict[str, LoadedModel] = {}  # under the pool's lock: a base and the models on it are one state
        self._pool = BasePool(
            clock,
            machine,
            files,
            self._drop_models_on,
            log_dir=log_dir,
            idle_unload_s=idle_unload_s,
            make_room_after_s=make_room_after_s,
            engine_silence_s=engine_silence_s,
        )

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
        return self._pool.room_on(self._machine.device(wanted))

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

        def suits(key: BaseKey) -> bool:
            same = (key.model_id, key.revision, key.quantization, key.device) == wanted
            return same and overrides.get("precision", key.precision) == key.precision

        with self._pool.lock:
            return self._pool.room_on(device, self._pool.find(suits))

    def device_of(self, model: LoadedModel) -> Device:
        """Return the device that a loaded model is on, with what a run on that model may use of it."""
        return self._pool.room_on(self._machine.device(device_name(model.base.key.device)), model.base)

    def admit_run(
        self, model_id: str, revision: str | None, config: PeftConfig, *, loaded: LoadedModel | None, batch: Batch
    ) -> None:
        """Refuse a fine-tune that does not fit, even once idle models have been unloaded for it.

        Args:
            loaded: The loaded model it will use, if it names one; otherwise a base that is there is taken.
            batch: The largest forward pass of the data.

        Raises:
            DoesNotFit: With the estimate and what would make it fit.
            ModelRejected: The engine cannot train the model.
        """
        shape = self._facts.shape(model_id, revision)

        def judge(device: Device) -> Assessment:
            available = device.available_bytes
            return assess(shape, config, available, on_gpu=device.on_gpu, batch=batch, siblings=self._facts.siblings)

        if loaded is None:
            device = self._machine.device("auto")
            key, _ = place(self._machine, "auto", model_id, revision, config, shape, device)
            self._pool.admit_run(f"Training {model_id}", judge, device, key)
        else:
            device = self._machine.device(device_name(loaded.base.key.device))
            self._pool.admit_run(f"Training {model_id}", judge, device, loaded.base)

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
            NeedsRemoteCode, NoSafeWeights, ModelRejected: It is not safe to load, or cannot be trained; nothing is
                downloaded.
            DoesNotFit: Loading it needs more than the device has free beside the loads under way, even with every
                idle model unloaded.
        """
        device = self.device(request.device)
        self._files.check(request.model_id, request.revision, allow_pickle=request.allow_pickle)
        shape = self._facts.shape(request.model_id, request.revision)
        model_id, revision = request.model_id, request.revision
        beside = self._beside(
            self._machine.device(request.device), request.algorithm, request.overrides, model_id, revision
        )
        configuration = self.configure(
            request.algorithm, request.use_case, request.overrides, model_id=model_id, revision=revision, device=beside
        )
        config = configuration.config
        key, engine = place(self._machine, request.engine, model_id, revision, config, shape, device)
        needed = loading_bytes(shape, config, on_gpu=device.on_gpu) if shape is not None else None
        trainable = adapter_parameters(shape, config) if shape is not None else None

        def judge(device: Device) -> Assessment:
            available = device.available_bytes
            return assess_loading(shape, config, available, on_gpu=device.on_gpu, siblings=self._facts.siblings)

        wanted = BaseRequest(
            key,
            engine.reason,
            config,
            device,
            needed,
            for_client=not request.for_job,
            force=request.force,
            allow_pickle=request.allow_pickle,
        )
        return self._pool.join_or_start(
            wanted, judge, lambda base: self._on_base(base, request, configuration, needed, trainable)
        )

    def _on_base(
        self,
        base: LoadedBase,
        request: LoadRequest,
        configuration: Configuration,
        needed: int | None,
        trainable: int | None,
    ) -> LoadedModel:
        """Return the loaded model of a request: one that is there, or a new one. The caller holds the pool's lock."""
        for model in self._models.values():
            if model.answers(request, base, configuration):
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

    def _drop_models_on(self, base: LoadedBase) -> None:
        """Forget the loaded models on a base that is no more. The caller holds the pool's lock."""
        self._models = {name: model for name, model in self._models.items() if model.base is not base}

    # Reading

    def models(self) -> list[LoadedModel]:
        """Return every loaded model, oldest first."""
        with self._pool.lock:
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
        with self._pool.lock:
            model = self._models.get(model_id)
        if model is None:
            raise LoadedModelNotFound(f"No loaded model has the id {model_id}.")
        return model

    # Using

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
        with self._pool.lock:
            model = self.get(model_id)
            base = model.base
            shared = any(other.base is base and other is not model for other in self._models.values())
            if shared:
                del self._models[model_id]
            else:
                self._pool.begin_unloading(base)
        if not shared:
            base.end_process()

    def close(self) -> None:
        """End every engine."""
        self._pool.close()


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
