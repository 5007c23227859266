"""Which device a request means, what it has free, and which engine runs on it."""

from dataclasses import dataclass
from typing import Literal, Protocol

from core.errors import SettingRejected
from domain.configure import MachineFacts

EngineName = Literal["transformers", "unsloth"]


class GpuFacts(Protocol):
    """What is read of a GPU's profile."""

    @property
    def index(self) -> int: ...
    @property
    def supports_bf16(self) -> bool | None: ...
    @property
    def memory_free_bytes(self) -> int | None: ...


@dataclass(frozen=True)
class Device:
    """A place to put a model.

    Attributes:
        torch_name: `cpu` or `cuda:N`.
        available_bytes: Memory free on it; None where the driver does not say.
    """

    torch_name: str
    facts: MachineFacts
    available_bytes: int | None

    @property
    def on_gpu(self) -> bool:
        return self.facts.has_gpu


def device_name(torch_name: str) -> str | int:
    """Return what a client calls the device that torch calls `cpu` or `cuda:N`."""
    return torch_name if torch_name == "cpu" else int(torch_name.removeprefix("cuda:"))


def choose_device(wanted: str | int, gpus: "list[GpuFacts]", host_available_bytes: int) -> Device:
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
        found = [gpu for gpu in gpus if str(gpu.index) == str(wanted)]
        if not found:
            raise _rejected("device", f"there is no GPU {wanted}; this machine has {len(gpus)}")
        gpu = found[0]
    facts = MachineFacts(has_gpu=True, supports_bf16=bool(gpu.supports_bf16))
    return Device(f"cuda:{gpu.index}", facts, gpu.memory_free_bytes)


def choose_engine(wanted: str, device: Device, machine_engine: str, reason: str) -> EngineName:
    """Resolve `auto`, `transformers` or `unsloth` for a device.

    Raises:
        SettingRejected: Unsloth was asked for and cannot run here.
    """
    usable = machine_engine == "unsloth" and device.on_gpu
    if wanted == "unsloth" and not usable:
        why = reason if device.on_gpu or machine_engine != "unsloth" else "the model goes to the CPU"
        raise _rejected("engine", f"Unsloth cannot run here: {why}")
    return "unsloth" if usable and wanted in ("auto", "unsloth") else "transformers"


def _rejected(location: str, message: str) -> SettingRejected:
    return SettingRejected(f"{location}: {message}", errors=[{"location": [location], "message": message}])
