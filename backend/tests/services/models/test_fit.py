from dataclasses import dataclass

import pytest

from domain.memory.unsloth import UnslothHere
from domain.models.records import ModelSummary
from domain.peft.algorithms import Algorithm
from services.hardware.devices import EngineChoice
from services.hardware.host_probe import MemoryReading
from services.hardware.machine import Machine
from services.hardware.nvml_probe import GpuReading
from services.models.fit import fit_of
from tests.support.shapes import KnownShapes

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 1000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
SUMMARY = ModelSummary(model_id="me/m")


@dataclass
class FixedHardware:
    """A machine without a GPU, and so many bytes free."""

    available_bytes: int

    def memory(self) -> tuple[tuple[GpuReading, ...], MemoryReading]:
        return (), MemoryReading(self.available_bytes, self.available_bytes, 0, 0.0, None)

    def engine(self) -> EngineChoice:
        return EngineChoice("transformers", "the only one")


def with_memory(available_bytes: int) -> Machine:
    return Machine(FixedHardware(available_bytes))


class WithGpu:
    """A machine with a GPU and, perhaps, Unsloth."""

    def __init__(self, *, unsloth: bool, capability: str = "9.0", host_bytes: int = 2**36) -> None:
        self.unsloth, self.capability, self.host_bytes = unsloth, capability, host_bytes

    def memory(self) -> tuple[tuple[GpuReading, ...], MemoryReading]:
        gpu = GpuReading(
            0, "GPU-0", memory_free_bytes=2**35, compute_capability=self.capability, supports_bf16=self.capability > "8"
        )
        return (gpu,), MemoryReading(2**37, self.host_bytes, 0, 0.0, None)

    def engine(self) -> EngineChoice:
        return (
            EngineChoice("unsloth", "a GPU of 9.0") if self.unsloth else EngineChoice("transformers", "not installed")
        )


def test_a_device_says_whether_unsloth_holds_bases_there_and_what_the_host_has_for_it() -> None:
    for hardware, unsloth in (
        (WithGpu(unsloth=True), UnslothHere(2**36)),
        (WithGpu(unsloth=False), None),
        (WithGpu(unsloth=True, capability="6.1"), None),
    ):
        assert Machine(hardware).device("auto").facts.unsloth == unsloth
        assert Machine(hardware).device("cpu").facts.unsloth is None


def test_lists_count_what_the_engine_would_take_that_would_hold_the_base() -> None:
    config = CONFIG | {"vocab_size": 128256, "hidden_size": 1024, "num_attention_heads": 16, "num_hidden_layers": 8}
    sizes = []
    for unsloth in (True, False):
        found = fit_of(Machine(WithGpu(unsloth=unsloth)), KnownShapes(), config, SUMMARY, "lora")
        assert found is not None and found.verdict == "fits"
        sizes.append(found.estimate_bytes)
    assert sizes[0] != sizes[1]


def test_a_model_of_which_nothing_is_known_is_not_judged() -> None:
    machine, unknown = with_memory(2**34), {"model_type": "nobodys"}
    assert (
        fit_of(machine, KnownShapes(), None, SUMMARY, "lora")
        is fit_of(machine, KnownShapes(), unknown, SUMMARY, "lora")
        is None
    )


@pytest.mark.parametrize("algorithm", Algorithm)
@pytest.mark.parametrize("positions", [1, 7])
def test_a_model_that_no_default_goes_with_is_not_judged(algorithm: Algorithm, positions: int) -> None:
    machine, config = with_memory(2**34), CONFIG | {"max_position_embeddings": positions}
    assert fit_of(machine, KnownShapes(), config, SUMMARY, algorithm.value) is None
    assert fit_of(machine, KnownShapes(), CONFIG | {"max_position_embeddings": 8}, SUMMARY, algorithm.value) is not None


def test_the_machine_that_is_given_decides() -> None:
    large, small = (fit_of(with_memory(size), KnownShapes(), CONFIG, SUMMARY, "lora") for size in (2**34, 2**20))
    assert large is not None and small is not None
    assert (large.verdict, small.verdict) == ("fits", "does_not_fit")
