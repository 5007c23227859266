"""Which base in memory serves a request, which engine loads it, and the command that loads it."""

from dataclasses import replace
from pathlib import Path
from typing import Protocol

from domain import protocol
from domain.memory.estimate import loading_bytes
from domain.peft.config import PeftConfig
from domain.peft.unsloth_rules import loaded_length, obstacle, unmeasured
from services.hardware.devices import Device, EngineChoice
from services.loading.base_request import BaseKey, BaseRequest
from services.loading.loaded_model import ConfiguredLoad, LoadRequest, ModelOnDevice


class ChoosesEngines(Protocol):
    """The part of the machine that is needed here."""

    def engine(self, wanted: str, device: Device, obstacle: str | None) -> EngineChoice:
        """Return the engine for a device, and why."""
        ...


def place(
    machine: ChoosesEngines, wanted: str, where: ModelOnDevice, config: PeftConfig
) -> tuple[BaseKey, EngineChoice]:
    """Return which base serves a request, whether it is loaded or not, and the reason for its engine.

    Args:
        machine: Knows which engines there are.
        wanted: `auto`, `transformers` or `unsloth`.
        where: The model and its device.
        config: Decides how its weights are stored.

    Raises:
        SettingRejected: Unsloth was asked for and cannot do it.
    """
    shape, device = where.shape, where.device
    engine = machine.engine(wanted, device, obstacle(config, shape.family if shape is not None else None))
    fast = engine.name == "unsloth"
    if fast and shape is not None and (caution := unmeasured(shape.family)) is not None:
        engine = replace(engine, reason=f"{engine.reason}; {caution}")
    length = loaded_length(config, shape.max_positions if shape is not None else None) if fast else None
    stored = config.quantization, config.precision
    return BaseKey(where.model_id, where.revision, *stored, device.torch_name, engine.name, length), engine


def wanted_base(
    machine: ChoosesEngines, request: LoadRequest | ConfiguredLoad, where: ModelOnDevice, config: PeftConfig
) -> BaseRequest:
    """Return which base a load asks for, and how it is loaded if it is not there.

    Args:
        machine: Knows which engines there are.
        request: A client's, or a job's.
        where: The model and its device.
        config: The configuration of the request.

    Raises:
        SettingRejected: Unsloth was asked for and cannot do it.
    """
    key, engine = place(machine, request.engine, where, config)
    shape, device = where.shape, where.device
    return BaseRequest(
        key,
        engine.reason,
        config,
        device,
        loading_bytes(shape, config, on_gpu=device.on_gpu) if shape is not None else None,
        for_client=isinstance(request, LoadRequest),
        force=request.force,
        allow_pickle=request.allow_pickle,
    )


def load_command(path: Path, config: PeftConfig, key: BaseKey, device: Device) -> protocol.LoadBase:
    """Write the command that loads a base. An engine that sees only one GPU calls it cuda:0."""
    if key.max_seq_length is not None:
        config = config.model_copy(update={"max_seq_length": key.max_seq_length})
    shown = "cuda:0" if device.gpu_uuid is not None else device.torch_name
    return protocol.LoadBase(model_path=str(path), config=config, device=shown, engine=key.engine)
