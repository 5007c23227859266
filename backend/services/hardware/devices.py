"""Which device a request means, what it has free, and which engine runs on it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from core.errors import SettingRejected
from domain.configure import MachineFacts
from domain.memory.unsloth import UnslothHere
from domain.peft.unsloth_rules import LEAST_CAPABILITY

EngineName = Literal["transformers", "unsloth"]


@dataclass(frozen=True)
class EngineChoice:
    """Which engine is used and why."""

    name: EngineName
    reason: str


class GpuFacts(Protocol):
    """What is read of a GPU's profile."""

    @property
    def index(self) -> int:
        """Its number, as NVML counts."""
        ...

    @property
    def uuid(self) -> str | None:
        """Its uuid."""
        ...

    @property
    def compute_capability(self) -> str | None:
        """As `8.0`."""
        ...

    @property
    def supports_bf16(self) -> bool | None:
        """Whether it computes in bf16."""
        ...

    @property
    def memory_free_bytes(self) -> int | None:
        """Memory that nothing uses."""
        ...


@dataclass(frozen=True)
class Device:
    """A place to put a model.

    Attributes:
        torch_name: `cpu` or `cuda:N`.
        available_bytes: Memory free on it; None where the driver does not say.
        gpu_uuid: What an engine is shown of the machine's GPUs, so that its libraries can take no other.
        compute_capability: The GPU's, as `8.0`.
    """

    torch_name: str
    facts: MachineFacts
    available_bytes: int | None
    gpu_uuid: str | None = None
    compute_capability: str | None = None

    @property
    def on_gpu(self) -> bool:
        """Whether it is a GPU."""
        return self.facts.has_gpu


def with_engine(device: Device, engine: EngineName, host_available_bytes: int | None) -> Device:
    """Return a device whose facts say whether Unsloth holds what it can of the bases there.

    Args:
        engine: The best on the device.
        host_available_bytes: What is free on the host, where Unsloth's checkpointing keeps a part.
    """
    unsloth = UnslothHere(host_available_bytes) if engine == "unsloth" else None
    return replace(device, facts=replace(device.facts, unsloth=unsloth))


def device_name(torch_name: str) -> str | int:
    """Return what a client calls the device that torch calls `cpu` or `cuda:N`."""
    return torch_name if torch_name == "cpu" else int(torch_name.removeprefix("cuda:"))


def choose_device(wanted: str | int, gpus: Sequence[GpuFacts], host_available_bytes: int) -> Device:
    """Resolve `auto`, `cpu` or a GPU's index.

    Raises:
        SettingRejected: There is no such GPU.
    """
    cpu = Device("cpu", MachineFacts(has_gpu=False, supports_bf16=False), host_available_bytes)
    if wanted == "cpu" or (wanted == "auto" and not gpus):
        return cpu
    if wanted == "auto":
        gpu = max(gpus, key=lambda gpu: gpu.memory_free_bytes or 0)
    else:
        matching = [gpu for gpu in gpus if str(gpu.index) == str(wanted)]
        if not matching:
            raise _rejected("device", f"there is no GPU {wanted}; this machine has {len(gpus)}")
        gpu = matching[0]
    facts = MachineFacts(has_gpu=True, supports_bf16=bool(gpu.supports_bf16))
    return Device(f"cuda:{gpu.index}", facts, gpu.memory_free_bytes, gpu.uuid, gpu.compute_capability)


def choose_engine(wanted: str, device: Device, machine: EngineChoice, obstacle: str | None) -> EngineChoice:
    """Resolve `auto`, `transformers` or `unsloth` for a base on a device.

    Args:
        machine: The best that this machine has.
        obstacle: Why Unsloth cannot hold the base; None if it can.

    Raises:
        SettingRejected: Unsloth was asked for and cannot do it.
    """
    if wanted == "transformers":
        return EngineChoice("transformers", "asked for")
    why = _not_here(device, machine) or obstacle
    if why is None:
        return EngineChoice("unsloth", "asked for" if wanted == "unsloth" else machine.reason)
    if wanted == "unsloth":
        raise _rejected("engine", f"Unsloth cannot run here: {why}")
    return EngineChoice("transformers", why)


def _not_here(device: Device, machine: EngineChoice) -> str | None:
    if machine.name != "unsloth":
        return machine.reason
    if not device.on_gpu:
        return "the model goes to the CPU"
    capability = capability_of(device.compute_capability)
    if capability < LEAST_CAPABILITY:
        return f"compute capability {device.compute_capability} of {device.torch_name} is below Unsloth's 7.0"
    return None


def capability_of(text: str | None) -> tuple[int, int]:
    """Return a compute capability as numbers; (0, 0) where the driver does not say."""
    major, _, minor = (text or "0.0").partition(".")
    return int(major), int(minor)


def _rejected(location: str, message: str) -> SettingRejected:
    return SettingRejected(f"{location}: {message}", errors=[{"location": [location], "message": message}])
