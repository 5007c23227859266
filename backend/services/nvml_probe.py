"""What NVIDIA's driver says of the GPUs, field by field: what cannot be read is None, never zero."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeVar

T = TypeVar("T")
# bfloat16 matrix units came with Ampere (CUDA programming guide, compute capability 8.0).
_BF16_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class GpuReading:
    """One GPU. `error` says why a GPU that the driver counts does not answer (lost, no permission)."""

    index: int
    uuid: str | None
    name: str | None
    memory_total_bytes: int | None
    memory_used_bytes: int | None
    memory_free_bytes: int | None
    compute_capability: str | None
    supports_bf16: bool | None
    utilization_percent: int | None
    temperature_c: int | None
    power_w: float | None
    error: str | None


@dataclass(frozen=True)
class DriverFacts:
    """The driver. `reason` says why there is none, or None."""

    available: bool
    driver_version: str | None
    cuda_version: str | None
    reason: str | None


class NvmlProbe:
    """Reads GPUs through NVML.

    Args:
        nvml: The pynvml module (or its double); imported at first use by default.
    """

    def __init__(self, nvml: ModuleType | Any | None = None) -> None:
        self._given = nvml
        self._nvml: Any = None
        self._reason: str | None = None

    def driver(self) -> DriverFacts:
        """Return the driver's versions, or why there is none."""
        if not self._ready():
            return DriverFacts(False, None, None, self._reason)
        version = self._ask(lambda: _text(self._nvml.nvmlSystemGetDriverVersion()))
        cuda = self._ask(self._nvml.nvmlSystemGetCudaDriverVersion_v2)
        return DriverFacts(True, version, f"{cuda // 1000}.{cuda % 1000 // 10}" if cuda is not None else None, None)

    def gpus(self) -> tuple[GpuReading, ...]:
        """Return a reading of every GPU; one that fails is marked and the others still answer."""
        if not self._ready():
            return ()
        count = self._ask(self._nvml.nvmlDeviceGetCount) or 0
        return tuple(self._read(index) for index in range(count))

    def _ready(self) -> bool:
        """Initialise NVML once it can be; a driver that appears later is found at the next call."""
        if self._nvml is not None:
            return True
        nvml = self._given if self._given is not None else importlib.import_module("pynvml")
        try:
            nvml.nvmlInit()
        except nvml.NVMLError as error:
            self._reason = f"NVML does not start: {error}"
            return False
        self._nvml, self._reason = nvml, None
        return True

    def _ask(self, query: Callable[[], T]) -> T | None:
        """Return a query's answer, or None where this GPU or driver does not support it."""
        try:
            return query()
        except self._nvml.NVMLError:
            return None

    def _read(self, index: int) -> GpuReading:
        nvml = self._nvml
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            nvml.nvmlDeviceGetUUID(handle)
        except nvml.NVMLError as error:
            return GpuReading(index, None, None, None, None, None, None, None, None, None, None, str(error))
        memory = self._ask(lambda: nvml.nvmlDeviceGetMemoryInfo(handle))
        capability = self._ask(lambda: nvml.nvmlDeviceGetCudaComputeCapability(handle))
        utilization = self._ask(lambda: nvml.nvmlDeviceGetUtilizationRates(handle))
        power = self._ask(lambda: nvml.nvmlDeviceGetPowerUsage(handle))
        return GpuReading(
            index=index,
            uuid=self._ask(lambda: _text(nvml.nvmlDeviceGetUUID(handle))),
            name=self._ask(lambda: _text(nvml.nvmlDeviceGetName(handle))),
            memory_total_bytes=int(memory.total) if memory is not None else None,
            memory_used_bytes=int(memory.used) if memory is not None else None,
            memory_free_bytes=int(memory.free) if memory is not None else None,
            compute_capability=f"{capability[0]}.{capability[1]}" if capability is not None else None,
            supports_bf16=tuple(capability) >= _BF16_CAPABILITY if capability is not None else None,
            utilization_percent=int(utilization.gpu) if utilization is not None else None,
            temperature_c=self._ask(lambda: int(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))),
            power_w=power / 1000 if power is not None else None,
            error=None,
        )


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
