"""The base that serves a request, and the command that loads it."""

from dataclasses import replace
from pathlib import Path

import pytest

from domain.configure import MachineFacts, configure
from domain.models.shape import ModelShape
from domain.peft.algorithms import Algorithm
from domain.peft.config import PeftConfig
from services.hardware.devices import Device, EngineChoice, choose_engine
from services.loading.loaded_model import ModelOnDevice
from services.loading.placement import load_command, place
from services.models.embedded import CONFIG
from tests.support.shapes import shape_of

GPU = Device("cuda:1", MachineFacts(has_gpu=True, supports_bf16=True), 1, "GPU-b", "9.0")
LLAMA = shape_of(CONFIG)
ON_GPU = ModelOnDevice("me/x", None, LLAMA, GPU)


class FastMachine:
    """Has a GPU that Unsloth runs on."""

    def engine(self, wanted: str, device: Device, obstacle: str | None) -> EngineChoice:
        return choose_engine(wanted, device, EngineChoice("unsloth", "a GPU of 9.0"), obstacle)


def _config(**overrides: object) -> PeftConfig:
    values = {"precision": "bf16", "max_seq_length": 512} | overrides
    return configure(Algorithm.LORA, use_case=None, overrides=values, machine=GPU.facts).config


def test_requests_of_several_lengths_share_a_base() -> None:
    keys = [place(FastMachine(), "auto", ON_GPU, _config(max_seq_length=n))[0] for n in (64, 512)]
    assert keys[0] == keys[1] and keys[0].engine == "unsloth" and keys[0].max_seq_length == 2048
    longer, _ = place(FastMachine(), "auto", ON_GPU, _config(max_seq_length=4096))
    assert longer != keys[0] and longer.max_seq_length == 4096


@pytest.mark.parametrize(
    ("overrides", "shape", "why"),
    [({"precision": "fp32"}, LLAMA, "16-bit"), ({"quantization": "int8"}, LLAMA, "8-bit"), ({}, None, "not known")],
)
def test_what_unsloth_cannot_hold_is_held_by_transformers(
    overrides: dict[str, object], shape: ModelShape | None, why: str
) -> None:
    key, engine = place(FastMachine(), "auto", replace(ON_GPU, shape=shape), _config(**overrides))
    assert key.engine == engine.name == "transformers" and why in engine.reason and key.max_seq_length is None


def test_a_family_that_was_never_measured_with_unsloth_is_told_from_one_that_was() -> None:
    for family, said in (("llama", False), ("qwen2", True)):
        key, engine = place(FastMachine(), "auto", replace(ON_GPU, shape=replace(LLAMA, family=family)), _config())
        assert key.engine == "unsloth"
        assert ("has not been measured" in engine.reason) is said


def test_the_engine_is_told_of_the_one_gpu_that_it_is_shown() -> None:
    config = _config()
    key, _ = place(FastMachine(), "auto", ON_GPU, config)
    command = load_command(Path("model"), config, key, GPU)
    assert (command.device, command.engine, command.config.max_seq_length) == ("cuda:0", "unsloth", 2048)
    nameless = Device("cuda:1", GPU.facts, 1, None, "9.0")
    plain, _ = place(FastMachine(), "transformers", replace(ON_GPU, device=nameless), config)
    command = load_command(Path("model"), config, plain, nameless)
    assert (command.device, command.engine, command.config.max_seq_length) == ("cuda:1", "transformers", 512)
