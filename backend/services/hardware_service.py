"""What this machine is and what it is doing."""

import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from core.clock import Clock, SystemClock
from core.settings import get_settings
from core.singleton import singleton
from core.ttl_cache import Timed, TtlCell
from domain.peft.unsloth_rules import LEAST_CAPABILITY
from services.hardware.cuda_checks import CudaCheck, run_cuda_checks
from services.hardware.devices import EngineChoice, capability_of
from services.hardware.host_probe import CpuReading, DiskReading, HostProbe, MemoryReading, get_host_probe
from services.hardware.machine import Machine
from services.hardware.nvml_probe import DriverFacts, GpuReading, NvmlProbe

PROFILE_TTL_S = 300.0
# What the torch side of the validation found stays true until driver, GPUs or packages change, which is looked at each
# time. What can change beside them is a GPU that breaks, and its free memory.
VALIDATION_TTL_S = 3600.0
PACKAGES = ("torch", "transformers", "peft", "trl", "unsloth", "bitsandbytes")
_VALIDATED = (*PACKAGES, "unsloth_zoo", "triton", "xformers", "flash-attn")
# Volta: the oldest that Unsloth supports (its README, "Supports NVIDIA GPUs since 2018, minimum 7.0").
_ON_CPU = "Fine-tuning runs on the CPU with transformers + PEFT."


@dataclass(frozen=True)
class CudaFacts:
    """Whether a process here can use CUDA. `cuda_version` is the newest that the driver supports."""

    available: bool
    driver_version: str | None
    cuda_version: str | None
    reason: str | None


@dataclass(frozen=True)
class HardwareProfile:
    """The machine at one moment."""

    gpus: tuple[GpuReading, ...]
    cpu: CpuReading
    memory: MemoryReading
    disk: DiskReading
    cuda: CudaFacts
    platform: str
    python_version: str
    packages: Mapping[str, str | None]
    engine: EngineChoice


@dataclass(frozen=True)
class UsageReading:
    """What changes from second to second."""

    gpus: tuple[GpuReading, ...]
    cpu: CpuReading
    memory: MemoryReading
    disk: DiskReading


@dataclass(frozen=True)
class CudaValidation:
    """Whether a CUDA fine-tune would work here, and when torch was asked."""

    valid: bool
    checks: tuple[CudaCheck, ...]
    checked_at: datetime
    age_s: float


def installed_versions(names: Iterable[str] | None = None) -> dict[str, str | None]:
    """Read packages' versions from their metadata; nothing is imported.

    Args:
        names: Those of the profile by default.
    """
    versions: dict[str, str | None] = {}
    for name in PACKAGES if names is None else names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return versions


def select_engine(gpus: tuple[GpuReading, ...], packages: Mapping[str, str | None]) -> EngineChoice:
    """Choose Unsloth where it can run, plain transformers + PEFT everywhere else."""
    working = [gpu for gpu in gpus if gpu.error is None and gpu.compute_capability is not None]
    if not working:
        return EngineChoice("transformers", "no NVIDIA GPU answers; Unsloth needs one")
    if packages.get("unsloth") is None:
        return EngineChoice("transformers", "the package unsloth is not installed")
    best = max(working, key=lambda gpu: capability_of(gpu.compute_capability))
    if capability_of(best.compute_capability) < LEAST_CAPABILITY:
        return EngineChoice("transformers", f"compute capability {best.compute_capability} is below Unsloth's 7.0")
    return EngineChoice("unsloth", f"{best.name} has compute capability {best.compute_capability}")


def cuda_facts(driver: DriverFacts, gpus: tuple[GpuReading, ...]) -> CudaFacts:
    """Say whether there is a GPU that answers, and if not, why."""
    reason = driver.reason
    if driver.available and not gpus:
        reason = "the driver lists no GPU"
    elif driver.available and all(gpu.error is not None for gpu in gpus):
        reason = f"no GPU answers: {_failures(gpus)}"
    return CudaFacts(reason is None, driver.driver_version, driver.cuda_version, reason)


def _failures(gpus: tuple[GpuReading, ...]) -> str:
    return "; ".join(f"GPU {gpu.index}: {gpu.error}" for gpu in gpus if gpu.error is not None)


class HardwareService:
    """Answers from a five-minute profile, and live where it is asked for.

    Args:
        packages: Reads the installed versions.
        data_path: The disk that is reported is the one that holds this path.
        cuda_checks: Runs the torch side of the validation in a process of its own.
    """

    def __init__(
        self,
        clock: Clock,
        nvml: NvmlProbe,
        host: HostProbe,
        packages: Callable[[], Mapping[str, str | None]],
        data_path: Path,
        cuda_checks: Callable[[], list[CudaCheck]],
    ) -> None:
        self._nvml, self._host, self._packages = nvml, host, packages
        self._data_path, self._cuda_checks = data_path, cuda_checks
        self._profile = TtlCell(PROFILE_TTL_S, clock, self._measure)
        self._clock = clock
        self._torch_checks = TtlCell(VALIDATION_TTL_S, clock, self._ask_torch)
        self._checked: object = None  # what the checks that are kept were made of; None for checks of which one failed

    def profile(self, *, refresh: bool = False) -> Timed[HardwareProfile]:
        """Return the profile, measured at most five minutes ago, or now with `refresh`."""
        return self._profile.get(refresh=refresh)

    def engine(self) -> EngineChoice:
        """Return the best engine that this machine has, by the profile."""
        return self.profile().value.engine

    def _measure(self) -> HardwareProfile:
        usage, packages = self.usage(), self._packages()
        return HardwareProfile(
            gpus=usage.gpus,
            cpu=usage.cpu,
            memory=usage.memory,
            disk=usage.disk,
            cuda=cuda_facts(self._nvml.driver(), usage.gpus),
            platform=platform.platform(),
            python_version=platform.python_version(),
            packages=packages,
            engine=select_engine(usage.gpus, packages),
        )

    def usage(self) -> UsageReading:
        """Return one live reading."""
        host = self._host
        return UsageReading(self._nvml.gpus(), host.cpu(), host.memory(), host.disk(self._data_path))

    def memory(self) -> tuple[tuple[GpuReading, ...], MemoryReading]:
        """Return what is free now on each GPU and on the host: the part of `usage` that admission wants."""
        return self._nvml.gpus(), self._host.memory()

    def validate_cuda(self, *, refresh: bool = False) -> CudaValidation:
        """Check the driver here and torch in a process of its own; without a GPU, say so in one check.

        What torch's process found is kept for an hour if none of its checks failed, and as long as driver, GPUs and
        packages are the same. However many ask at the same moment, one process runs at a time and those who wait share
        the next result: each one loads torch and a CUDA context on every GPU.

        Args:
            refresh: Ask torch again.
        """
        driver, gpus = self._nvml.driver(), self._nvml.gpus()
        if not driver.available:
            detail = f"No CUDA GPU can be used: {driver.reason}. {_ON_CPU}"
            return self._without_torch(CudaCheck("driver", "fail", detail, driver.fix))
        if not gpus:
            detail = f"The driver answers but lists no GPU. {_ON_CPU}"
            fix = "Start a container with its GPUs (`--gpus all`); elsewhere `nvidia-smi` must list the GPU."
            return self._without_torch(CudaCheck("device", "fail", detail, fix))
        version = CudaCheck("driver", "pass", f"Driver {driver.driver_version}, CUDA {driver.cuda_version}.", None)
        if all(gpu.error is not None for gpu in gpus):  # torch can wait for ever on a GPU that is lost
            return self._without_torch(version, _device_check(gpus))
        found = self._torch_checks.get(refresh=refresh or self._checked != self._what_is_checked())
        checks = (version, _device_check(gpus), *found.value)
        valid = all(check.status != "fail" for check in checks)
        return CudaValidation(valid, checks, found.measured_at, found.age_s)

    def _without_torch(self, *checks: CudaCheck) -> CudaValidation:
        return CudaValidation(False, checks, self._clock.now(), 0.0)

    def _ask_torch(self) -> list[CudaCheck]:
        about, checks = self._what_is_checked(), self._cuda_checks()
        self._checked = about if all(check.status != "fail" for check in checks) else None
        return checks

    def _what_is_checked(self) -> object:
        """Return what the checks are about; they are made again once it is something else."""
        gpus = tuple((gpu.index, gpu.uuid, gpu.error) for gpu in self._nvml.gpus())
        return self._nvml.driver(), gpus, tuple(installed_versions(_VALIDATED).items())


def _device_check(gpus: tuple[GpuReading, ...]) -> CudaCheck:
    names = ", ".join(f"{gpu.index}: {gpu.name or 'unnamed'}" for gpu in gpus if gpu.error is None)
    lost = _failures(gpus)
    if not lost:
        return CudaCheck("device", "pass", names, None)
    detail = lost + (f"; these answer: {names}" if names else "")
    return CudaCheck("device", "fail", detail, "Reset or reseat the GPU; see `dmesg` for Xid errors.")


@singleton
def get_hardware_service() -> HardwareService:
    """Return the process's hardware service."""
    return HardwareService(
        SystemClock(), NvmlProbe(), get_host_probe(), installed_versions, get_settings().home, run_cuda_checks
    )


@singleton
def get_machine() -> Machine:
    """Return the process's machine."""
    return Machine(get_hardware_service())
