"""Which base in memory serves a request, what loads it, and the command that does."""

from pathlib import Path
from typing import Protocol

from domain import protocol
from domain.models.shape import ModelShape
from domain.peft.config import PeftConfig
from domain.peft.unsloth_rules import loaded_length, obstacle
from services.hardware.devices import Device, EngineChoice
from services.loading.base_request import BaseKey


class ChoosesEngines(Protocol):
    """The machine, as far as it is asked here."""

    def engine(self, wanted: str, device: Device, obstacle: str | None) -> EngineChoice: ...


def place(
    machine: ChoosesEngines,
    wanted: str,
    model_id: str,
    revision: str | None,
    config: PeftConfig,
    shape: ModelShape | None,
    device: Device,
) -> tuple[BaseKey, EngineChoice]:
    """Say which base serves a request, loaded already or not, and why on that engine.

    Args:
        wanted: `auto`, `transformers` or `unsloth`.
        shape: The model's, where its family is known.

    Raises:
        SettingRejected: Unsloth was asked for and cannot do it.
    """
    engine = machine.engine(wanted, device, obstacle(config, shape.model_type if shape is not None else None))
    fast = engine.name == "unsloth"
    length = loaded_length(config, shape.max_positions if shape is not None else None) if fast else None
    quantization, precision = config.quantization, config.precision
    key = BaseKey(model_id, revision, quantization, precision, device.torch_name, engine.name, length)
    return key, engine


def load_command(request_id: str, path: Path, config: PeftConfig, key: BaseKey, device: Device) -> protocol.LoadBase:
    """Write the load. An engine that is shown one GPU knows it as the first, whichever it is of the machine's."""
    if key.max_seq_length is not None:
        config = config.model_copy(update={"max_seq_length": key.max_seq_length})
    shown = "cuda:0" if device.gpu_uuid is not None else device.torch_name
    return protocol.LoadBase(
        request_id=request_id, model_path=str(path), config=config, device=shown, engine=key.engine
    )
