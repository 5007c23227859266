"""Which kinds of engines are kept ready on which machine."""

import pytest

from services.engine_service import kinds_of
from services.engines.warm import EngineKind
from services.hardware.devices import EngineChoice
from services.hardware.host_probe import MemoryReading
from services.hardware.machine import Machine
from services.hardware.nvml_probe import GpuReading

LARGE = GpuReading(0, "GPU-0", compute_capability="9.0", memory_free_bytes=1)
OLD = GpuReading(1, "GPU-1", compute_capability="6.1", memory_free_bytes=1)
UNSLOTH, PLAIN = EngineChoice("unsloth", "it can"), EngineChoice("transformers", "Unsloth cannot")
BESIDE = [EngineKind("transformers"), EngineKind("none")]


class Hardware:
    def __init__(self, gpus: tuple[GpuReading, ...], choice: EngineChoice) -> None:
        self._gpus, self._choice = gpus, choice

    def memory(self) -> tuple[tuple[GpuReading, ...], MemoryReading]:
        return self._gpus, MemoryReading(9, 6, 3, 33.3, None)

    def engine(self) -> EngineChoice:
        return self._choice


@pytest.mark.parametrize(
    ("gpus", "choice", "kinds"),
    [
        ((), PLAIN, BESIDE),
        ((LARGE,), UNSLOTH, [EngineKind("unsloth", "GPU-0"), *BESIDE, EngineKind("transformers", "GPU-0")]),
        ((LARGE,), PLAIN, [EngineKind("transformers", "GPU-0"), *BESIDE]),
        (
            (LARGE, OLD),
            UNSLOTH,
            [
                EngineKind("unsloth", "GPU-0"), EngineKind("transformers", "GPU-1"), *BESIDE,
                EngineKind("transformers", "GPU-0"),
            ],
        ),
    ],
)  # fmt: skip
def test_what_loads_take_by_default_comes_first(
    gpus: tuple[GpuReading, ...], choice: EngineChoice, kinds: list[EngineKind]
) -> None:
    assert kinds_of(Machine(Hardware(gpus, choice)), gpus) == kinds
