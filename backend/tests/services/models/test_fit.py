from dataclasses import dataclass

import pytest

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
