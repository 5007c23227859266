"""Configures fine-tunes, and keeps the loaded models: which base each is on, and how it is used."""

import uuid
from pathlib import Path
from typing import Any

from core.clock import Clock, SystemClock
from core.errors import LoadedModelNotFound
from core.settings import get_settings
from core.singleton import singleton
from domain.configure import Configuration, configure, require_device
from domain.memory.activations import Batch
from domain.memory.estimate import adapter_parameters
from domain.memory.unsloth import UnslothHere
from domain.memory.verdict import Assessment, assess, assess_loading, savings
from domain.peft.algorithms import SPECS, Algorithm
from domain.peft.config import PeftConfig
from domain.peft.initial_adapter import InitialAdapter
from domain.peft.use_cases import UseCaseId
from services.engine_service import get_engines
from services.engines.warm import Engines
from services.hardware.devices import Device, device_name, with_engine
from services.hardware.machine import Machine
from services.hardware_service import get_machine
from services.loading.attachment import attach, detach
from services.loading.base_request import BaseKey, BaseRequest
from services.loading.loaded_base import LoadedBase
from services.loading.loaded_model import ConfiguredLoad, LoadedModel, LoadRequest, ModelOnDevice
from services.loading.placement import place, wanted_base
from services.loading.pool import BasePool
from services.model_registry_service import get_model_facts, get_model_files
from services.models.facts import ModelFacts
from services.models.files import ModelFiles

__all__ = ["ConfiguredLoad", "LoadRequest", "LoadedModel", "ModelOnDevice", "PeftService", "get_peft_service"]


class PeftService:
    """Loads, lends out and unloads base models.

    Args:
        clock: For ages and idle times.
        machine: Knows the devices and the engines.
        files: Brings a model's files onto this machine.
        facts: Knows a model's shape without its weights.
        engines: Gives engines.
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
        engines: Engines,
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
            engines,
            self._drop_models_on,
            log_dir=log_dir,
            idle_unload_s=idle_unload_s,
            make_room_after_s=make_room_after_s,
            engine_silence_s=engine_silence_s,
        )

    # Configuration

    def on_device(
        self, model_id: str, revision: str | None, device: str | int = "auto", loaded: LoadedModel | None = None
    ) -> ModelOnDevice:
        """Look up a model and its device: the device that is asked for, or that the model is loaded on.

        Raises:
            SettingRejected: There is no such device.
            ModelNotFound: There is no such model.
        """
        place = self._machine.device(device if loaded is None else device_name(loaded.base.key.device))
        if loaded is not None and loaded.base.key.engine != "unsloth":
            place = with_engine(place, "transformers", None)
        return ModelOnDevice(model_id, revision, self._facts.shape(model_id, revision), place, loaded)

    def configure(
        self,
        algorithm: Algorithm,
        use_case: UseCaseId | None,
        overrides: dict[str, Any],
        where: ModelOnDevice | None = None,
        initial: InitialAdapter | None = None,
    ) -> Configuration:
        """Make a complete configuration for a model on a device, or without a model for this machine.

        Args:
            initial: The adapter that the run continues, if it continues one.

        Raises:
            SettingRejected: An override cannot take effect.
        """
        if where is None:
            machine = self._machine.device("auto").facts
            return configure(algorithm, use_case=use_case, overrides=overrides, machine=machine, initial=initial)
        # The memory of a base that serves this configuration counts as free. Otherwise a base that fits would be loaded
        # a second time in fewer bits.
        with self._pool.lock:
            kept = overrides if initial is None else initial.settings | overrides
            own = where.loaded.base if where.loaded is not None else self._base_for(where, algorithm, kept)
            device = self._pool.room_on(where.device, own)
        return configure(
            algorithm,
            use_case=use_case,
            overrides=overrides,
            machine=device.facts,
            shape=where.shape,
            available_bytes=device.available_bytes,
            initial=initial,
        )

    def _base_for(self, where: ModelOnDevice, algorithm: Algorithm, overrides: dict[str, Any]) -> LoadedBase | None:
        """Return the base in memory that will serve the configuration, if there is one."""
        stored = SPECS[algorithm].fixed.get("quantization", overrides.get("quantization", "none"))
        wanted = (where.model_id, where.revision, stored, where.device.torch_name)

        def suits(key: BaseKey) -> bool:
            same = (key.model_id, key.revision, key.quantization, key.device) == wanted
            return same and overrides.get("precision", key.precision) == key.precision

        return self._pool.find(suits)

    def device(self, wanted: str | int) -> Device:
        """Return a device with the memory that a new load may use: the free memory less that of loads under way.

        Raises:
            SettingRejected: There is no such device.
        """
        return self._pool.room_on(self._machine.device(wanted))

    def admit_run(self, where: ModelOnDevice, config: PeftConfig, batch: Batch) -> None:
        """Unload idle models if a fine-tune needs their memory; refuse the fine-tune if it does not fit even then.

        Args:
            where: The model and its device. Without a loaded model, a base that is in memory is used.
            config: Its configuration.
            batch: The largest forward pass of the data.

        Raises:
            DoesNotFit: With the estimate and what would make it fit.
            ModelRejected: The engine cannot train the model.
        """
        if where.shape is None:
            self._facts.loadable_shape(where.model_id, where.revision)  # refuses it if that is why
        loaded = where.loaded
        key = loaded.base.key if loaded is not None else place(self._machine, "auto", where, config)[0]

        def judge(device: Device) -> Assessment:
            return assess(
                where.shape,
                config,
                device.available_bytes,
                on_gpu=device.on_gpu,
                batch=batch,
                unsloth=device.facts.unsloth if key.engine == "unsloth" else None,
                siblings=self._facts.siblings,
            )

        runs_on = loaded.base if loaded is not None else key
        self._pool.admit_run(f"Training {where.model_id}", judge, where.device, runs_on)

    def free_beside(self, model: LoadedModel) -> int | None:
        """Return the memory that is free on a loaded model's device, less what loads under way will take."""
        return self._pool.free_on(self._machine.device(device_name(model.base.key.device))).available_bytes

    def gpus(self) -> int:
        """Return how many GPUs of this machine can train."""
        return sum(name != "cpu" for name in self._machine.training_devices())

    def make_room_for_worker(self, model_id: str, revision: str | None, config: PeftConfig, device: Device) -> None:
        """Unload idle models of a GPU for a second copy of a base, which a job will hold there beside its own.

        Raises:
            DoesNotFit: It needs more memory than the GPU would have with every idle model unloaded.
        """
        shape = self._facts.loadable_shape(model_id, revision)

        def judge(device: Device) -> Assessment:
            available = device.available_bytes
            return assess_loading(shape, config, available, on_gpu=device.on_gpu, siblings=self._facts.siblings)

        self._pool.make_room(f"Training {model_id} on a further GPU", judge, device)

    def make_room(self, what: str, needed_bytes: int) -> int | None:
        """Unload idle models whose memory on the host something else needs.

        Args:
            what: Names it, for the log.
            needed_bytes: How much it takes.

        Returns:
            What is free now; None where that cannot be known.
        """

        def judge(device: Device) -> Assessment:
            free = device.available_bytes
            fits = free is None or needed_bytes <= free
            return Assessment("fits" if fits else "does_not_fit", free, None)

        self._pool.make_room(what, judge, self._machine.device("cpu"))
        return self.device("cpu").available_bytes

    def savings(
        self, model_id: str, revision: str | None, config: PeftConfig, *, on_gpu: bool, on_unsloth: bool
    ) -> list[str]:
        """Name settings that would need less memory, and how much less; none where the model's layers are not known.

        Args:
            on_unsloth: Whether Unsloth held the base.
        """
        shape = self._facts.shape(model_id, revision)
        unsloth = UnslothHere() if on_unsloth else None
        return savings(shape, config, on_gpu=on_gpu, unsloth=unsloth) if shape is not None else []

    # Loading

    def load(self, request: LoadRequest | ConfiguredLoad) -> LoadedModel:
        """Start loading a model, or join the load of the same base that is there already.

        Args:
            request: A client's request, which is configured here; or a job's, which is configured already.

        Raises:
            SettingRejected: A setting cannot take effect.
            ModelNotFound: There is no such model.
            NeedsRemoteCode, NoSafeWeights, ModelRejected: It is not safe to load, or cannot be trained; nothing is
                downloaded.
            DoesNotFit: It needs more memory than the device would have with every idle model unloaded.
        """
        device = self._machine.device(request.device)
        self._files.check(request.model_id, request.revision, allow_pickle=request.allow_pickle)
        if request.engine == "transformers":
            device = with_engine(device, "transformers", None)
        shape = self._facts.loadable_shape(request.model_id, request.revision)
        where = ModelOnDevice(request.model_id, request.revision, shape, device)
        if isinstance(request, ConfiguredLoad):
            config = request.config
            require_device(config, device.facts)
        else:
            config = self.configure(request.algorithm, request.use_case, request.overrides, where).config

        def judge(device: Device) -> Assessment:
            available = device.available_bytes
            return assess_loading(shape, config, available, on_gpu=device.on_gpu, siblings=self._facts.siblings)

        wanted = wanted_base(self._machine, request, where, config)
        trainable = adapter_parameters(shape, config) if shape is not None else None
        return self._pool.join_or_start(wanted, judge, lambda base: self._on_base(base, request, wanted, trainable))

    def _on_base(
        self, base: LoadedBase, request: LoadRequest | ConfiguredLoad, wanted: BaseRequest, trainable: int | None
    ) -> LoadedModel:
        """Return the loaded model of a request: one that is there, or a new one. The caller holds the pool's lock."""
        for model in self._models.values():
            if model.answers(request, base, wanted.config):
                return model
        model = LoadedModel(
            f"mdl_{uuid.uuid4().hex[:12]}",
            request.model_id,
            request.revision,
            request.algorithm,
            wanted.config,
            base,
            wanted.needed_bytes,
            trainable,
            request.overrides if isinstance(request, LoadRequest) else {},
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
        """Put an adapter on a loaded base. It stays until the base is unloaded."""
        attach(model.base, adapter_id, path)

    def detach_everywhere(self, adapter_id: str) -> None:
        """Take an adapter off every base that has it.

        Raises:
            ModelBusy: A base that has it is training.
        """
        for base in {id(model.base): model.base for model in self.models()}.values():
            detach(base, adapter_id)

    # Unloading

    def unload(self, model_id: str) -> None:
        """Forget a loaded model. With the last model on a base its engine ends, and its memory is free on return.

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
        get_engines(),
        log_dir=settings.home / "logs",
        idle_unload_s=settings.idle_unload_s,
        make_room_after_s=settings.make_room_after_s,
        engine_silence_s=settings.engine_silence_s,
    )
