"""The machine as the services need it: devices by name, and the engine that runs on each."""

from typing import Protocol

from services.hardware.devices import Device, EngineChoice, choose_device, choose_engine, with_engine
from services.hardware.host_probe import MemoryReading
from services.hardware.nvml_probe import GpuReading


class Hardware(Protocol):
    """What is measured; the hardware service does it."""

    def memory(self) -> tuple[tuple[GpuReading, ...], MemoryReading]:
        """Return what is free now on each GPU and on the host."""
        ...

    def engine(self) -> EngineChoice:
        """Return the best engine that this machine has."""
        ...


class Machine:
    """Answers from the hardware profile; free memory is read anew each time, since admission depends on it."""

    def __init__(self, hardware: Hardware) -> None:
        self._hardware = hardware

    def device(self, wanted: str | int) -> Device:
        """Resolve `auto`, `cpu` or a GPU's index.

        Raises:
            SettingRejected: There is no such GPU.
        """
        gpus, memory = self._hardware.memory()
        device = choose_device(wanted, [gpu for gpu in gpus if gpu.error is None], memory.available_bytes)
        if not device.on_gpu:
            return device
        return with_engine(device, self.engine("auto", device, None).name, memory.available_bytes)

    def training_devices(self) -> tuple[str, ...]:
        """Return what trains here, a job each at a time: every GPU that answers, or else the CPU."""
        gpus, _ = self._hardware.memory()
        return tuple(str(gpu.index) for gpu in gpus if gpu.error is None) or ("cpu",)

    def engine(self, wanted: str, device: Device, obstacle: str | None) -> EngineChoice:
        """Resolve `auto`, `transformers` or `unsloth` for a base on a device.

        Args:
            obstacle: Why Unsloth cannot hold the base; None if it can.

        Raises:
            SettingRejected: Unsloth was asked for and cannot do it.
        """
        return choose_engine(wanted, device, self._hardware.engine(), obstacle)
