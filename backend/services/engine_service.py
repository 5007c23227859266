"""The process's engines: which kinds this machine can use are kept ready."""

from core.clock import SystemClock
from core.settings import get_settings
from core.singleton import singleton
from services.engines.process import EngineProcess
from services.engines.warm import EngineKind, Engines, HostMemory
from services.hardware.devices import GpuFacts
from services.hardware.host_probe import get_host_probe
from services.hardware.machine import Machine
from services.hardware_service import get_hardware_service, get_machine


def kinds_of(machine: Machine, gpus: tuple[GpuFacts, ...]) -> list[EngineKind]:
    """Return the kinds of engines that are worth keeping ready, the most wanted first.

    They are: what a load takes by default, on each GPU or on the CPU; what works on the CPU beside it; what describes
    models; and plain transformers on each GPU, for what Unsloth cannot hold.

    Args:
        machine: Knows which engine runs where.
        gpus: Those that answer.
    """
    by_default = [EngineKind(machine.engine("auto", machine.device(gpu.index), None).name, gpu.uuid) for gpu in gpus]
    beside = [EngineKind("transformers"), EngineKind("none")]
    return list(dict.fromkeys([*by_default, *beside, *(EngineKind("transformers", gpu.uuid) for gpu in gpus)]))


@singleton
def get_engines() -> Engines:
    """Return the process's engines."""
    settings, hardware, machine, host = get_settings(), get_hardware_service(), get_machine(), get_host_probe()

    def kinds() -> list[EngineKind]:
        return kinds_of(machine, tuple(gpu for gpu in hardware.profile().value.gpus if gpu.error is None))

    def memory() -> HostMemory:
        reading = host.memory()
        return HostMemory(reading.total_bytes, reading.available_bytes)

    return Engines(
        SystemClock(),
        EngineProcess,
        kinds,
        memory,
        log_dir=settings.home / "logs",
        silence_s=settings.engine_silence_s,
        most_bytes=settings.warm_engine_bytes,
    )
