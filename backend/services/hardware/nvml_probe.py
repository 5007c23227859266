"""What NVIDIA's driver says of the GPUs, field by field: what cannot be read is None, never zero."""

import importlib
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, TypeVar

T = TypeVar("T")
# bfloat16 matrix units came with Ampere (CUDA programming guide, compute capability 8.0).
_BF16_CAPABILITY = (8, 0)
# Errors that are the whole GPU's and not one query's (nvml.h, nvmlReturn_t).
_GPU_IS_GONE = ("NVMLError_GpuIsLost", "NVMLError_ResetRequired")
_INSTALL = "With an NVIDIA GPU in this machine, install its driver; `nvidia-smi` must list the GPU."
# What an error at the start of NVML means to a person, and what to do about it.
_WHY: dict[str, tuple[str, str]] = {
    "NVMLError_LibraryNotFound": ("no NVIDIA driver is installed", _INSTALL),
    "NVMLError_DriverNotLoaded": (
        "the NVIDIA driver is installed but its kernel module is not loaded",
        "Load it with `sudo modprobe nvidia`; after a kernel update, reinstall the driver or restart.",
    ),
    "NVMLError_LibRmVersionMismatch": (
        "the driver's library and its loaded kernel module are of different versions",
        "Restart the machine: the driver was updated while its old module was loaded.",
    ),
    "NVMLError_NoPermission": (
        "this user may not open the NVIDIA devices",
        "Give the user access to /dev/nvidia*, or start the container with its GPUs (`--gpus all`).",
    ),
    "NVMLError_NotFound": ("the driver finds no GPU", _INSTALL),
}


@dataclass(frozen=True)
class GpuReading:
    """One GPU. `error` says why a GPU that the driver counts cannot be used (lost, no permission).

    With MIG on, uuid, name and memory are those of the first instance: CUDA shows a process no other.
    """

    index: int
    uuid: str | None = None
    name: str | None = None
    memory_total_bytes: int | None = None
    memory_used_bytes: int | None = None
    memory_free_bytes: int | None = None
    compute_capability: str | None = None
    supports_bf16: bool | None = None
    utilization_percent: int | None = None
    temperature_c: int | None = None
    power_w: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class DriverFacts:
    """The driver. `reason` and `fix` say why there is none and what to do, or are None."""

    available: bool
    driver_version: str | None
    cuda_version: str | None
    reason: str | None
    fix: str | None = None


class NvmlProbe:
    """Reads GPUs through NVML; may be called from any thread.

    Args:
        nvml: The pynvml module (or its double); imported at first use by default.
    """

    def __init__(self, nvml: ModuleType | Any | None = None) -> None:
        self._given = nvml
        self._nvml: Any = None
        self._failure: tuple[str, str] = ("", "")
        self._lock = threading.Lock()

    def driver(self) -> DriverFacts:
        """Return the driver's versions, or why there is none."""
        with self._lock:
            if not self._started():
                return DriverFacts(False, None, None, *self._failure)
            nvml = self._nvml
            version = self._ask(nvml.nvmlSystemGetDriverVersion)
            cuda = self._ask(nvml.nvmlSystemGetCudaDriverVersion_v2)
            if cuda is None:  # older drivers have only the first version of the call
                cuda = self._ask(nvml.nvmlSystemGetCudaDriverVersion)
            text = _text(version) if version is not None else None
            # 12080 is CUDA 12.8 (nvml.h, NVML_CUDA_DRIVER_VERSION_MAJOR and _MINOR).
            cuda_text = f"{cuda // 1000}.{cuda % 1000 // 10}" if cuda is not None else None
            if self._count() is None:
                return DriverFacts(False, text, cuda_text, *self._failure)
            return DriverFacts(True, text, cuda_text, None)

    def gpus(self) -> tuple[GpuReading, ...]:
        """Return a reading of every GPU; one that fails is marked and the others still answer."""
        with self._lock:
            count = self._count() if self._started() else None
            return tuple(self._read(index) for index in range(count or 0))

    def _started(self) -> bool:
        """Initialise NVML once it can be; a driver that appears later is found at the next call."""
        if self._nvml is not None:
            return True
        try:
            nvml = self._given if self._given is not None else importlib.import_module("pynvml")
        except ImportError as error:
            self._failure = (f"NVML's Python package cannot be imported: {error}", "pip install nvidia-ml-py")
            return False
        try:
            nvml.nvmlInit()
        except nvml.NVMLError as error:
            self._failure = _why(error)
            return False
        self._nvml = nvml
        return True

    def _count(self) -> int | None:
        """Return how many GPUs there are; None if NVML no longer answers, and then start it anew next time."""
        nvml = self._nvml
        try:
            return int(nvml.nvmlDeviceGetCount())
        except nvml.NVMLError as error:
            self._failure = _why(error)
            self._nvml = None
            with suppress(nvml.NVMLError):  # what does not answer may also refuse to be shut down
                nvml.nvmlShutdown()
            return None

    def _ask(self, query: Callable[..., T], *arguments: Any) -> T | None:
        try:
            return query(*arguments)
        except self._nvml.NVMLError:
            return None  # this driver does not have the query

    def _read(self, index: int) -> GpuReading:
        nvml = self._nvml
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
        except nvml.NVMLError as error:
            return GpuReading(index, error=str(error))
        card = _Card(nvml)
        instance = card.first_instance(handle) if card.has_mig(handle) else handle
        reading = card.with_memory(card.sensors(GpuReading(index), handle), instance)
        if instance is None and card.gone is None:
            return replace(reading, error="MIG mode is on and the GPU has no MIG instance")
        return replace(reading, error=card.gone)


class _Card:
    """One GPU's queries. `gone` holds the first error that is the whole GPU's."""

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml
        self.gone: str | None = None

    def ask(self, query: Callable[..., T], *arguments: Any) -> T | None:
        """Return a query's answer, or None where this GPU or driver does not support it."""
        try:
            return query(*arguments)
        except self._nvml.NVMLError as error:
            if self.gone is None and type(error).__name__ in _GPU_IS_GONE:
                self.gone = str(error)
            return None

    def has_mig(self, handle: Any) -> bool:
        mode = self.ask(self._nvml.nvmlDeviceGetMigMode, handle)
        return mode is not None and mode[0] == self._nvml.NVML_DEVICE_MIG_ENABLE

    def first_instance(self, handle: Any) -> Any | None:
        nvml = self._nvml
        for index in range(self.ask(nvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0):
            instance = self.ask(nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, index)
            if instance is not None:
                return instance
        return None

    def sensors(self, reading: GpuReading, handle: Any) -> GpuReading:
        """Fill in what is the physical GPU's, whether or not it is divided."""
        nvml = self._nvml
        capability = self.ask(nvml.nvmlDeviceGetCudaComputeCapability, handle)
        utilization = self.ask(nvml.nvmlDeviceGetUtilizationRates, handle)
        temperature = self.ask(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU)
        milliwatts = self.ask(nvml.nvmlDeviceGetPowerUsage, handle)
        return replace(
            reading,
            uuid=_text_or_none(self.ask(nvml.nvmlDeviceGetUUID, handle)),
            name=_text_or_none(self.ask(nvml.nvmlDeviceGetName, handle)),
            compute_capability=f"{capability[0]}.{capability[1]}" if capability is not None else None,
            supports_bf16=tuple(capability) >= _BF16_CAPABILITY if capability is not None else None,
            utilization_percent=int(utilization.gpu) if utilization is not None else None,
            temperature_c=int(temperature) if temperature is not None else None,
            power_w=milliwatts / 1000 if milliwatts is not None else None,
        )

    def with_memory(self, reading: GpuReading, instance: Any | None) -> GpuReading:
        """Fill in what a process gets: the GPU's memory, or its MIG instance's and that one's names."""
        nvml = self._nvml
        if instance is None:
            return reading
        memory = self.ask(nvml.nvmlDeviceGetMemoryInfo, instance)
        # GPUs that share the host's memory say "not supported", and some drivers a total of zero: both unknown.
        total, used, free = (memory.total, memory.used, memory.free) if memory and memory.total else (None,) * 3
        return replace(
            reading,
            uuid=_text_or_none(self.ask(nvml.nvmlDeviceGetUUID, instance)) or reading.uuid,
            name=_text_or_none(self.ask(nvml.nvmlDeviceGetName, instance)) or reading.name,
            memory_total_bytes=total,
            memory_used_bytes=used,
            memory_free_bytes=free,
        )


def _why(error: Exception) -> tuple[str, str]:
    reason, fix = _WHY.get(type(error).__name__, ("NVML does not answer", _INSTALL))
    return f"{reason} ({error})", fix


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _text_or_none(value: str | bytes | None) -> str | None:
    return _text(value) if value is not None else None
