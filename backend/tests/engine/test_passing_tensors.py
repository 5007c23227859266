"""What a layer is said to compute with, against the most that is really held in a forward and a backward pass."""

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from domain.configure import MachineFacts, configure
from domain.memory.activations import Batch, kept_by_layers
from domain.models.shape import Kept, ModelShape, highest
from domain.peft.algorithms import Algorithm
from engine.live_storages import LiveStorages
from engine.outline import describe
from tests.support.small_families import SMALL

CPU = MachineFacts(has_gpu=False, supports_bf16=False)
# Chunks of a state space that are shorter than a row, attention without a fused kernel, a plain Llama.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "bloom": {},
    "nemotron_h": {
        "layers_block_type": ["mamba", "mlp", "attention", "mlp"], "mamba_num_heads": 4, "mamba_head_dim": 32,
        "n_groups": 2, "ssm_state_size": 16, "chunk_size": 32,
    },
}  # fmt: skip
ROWS = 2


@pytest.fixture(scope="module")
def models() -> dict[str, tuple[Any, ModelShape]]:
    made = {}
    for family, sizes in FAMILIES.items():
        config = CONFIG_MAPPING[family](**{**SMALL, "num_hidden_layers": 4, **sizes})
        shape = describe(config.to_dict()).shape
        assert shape is not None
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=shape.attention, dtype=torch.float32)
        model.requires_grad_(False)
        made[family] = model.train(), shape
    return made


def _most_held(model: Any, length: int) -> int:
    """Return the bytes of the most that layers hold at once, with a gradient to the embedding's output."""
    embedding = model.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda _module, _inputs, output: output.requires_grad_(True).clone())
    gc.collect()
    live = LiveStorages()
    try:
        with live:
            model(input_ids=torch.zeros(ROWS, length, dtype=torch.long), use_cache=False).logits.sum().backward()
    finally:
        handle.remove()
    return max(live.moments)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [64, 144])
def test_the_most_that_a_layer_holds_is_what_is_said(
    models: dict[str, tuple[Any, ModelShape]], family: str, length: int
) -> None:
    model, shape = models[family]
    config = configure(
        Algorithm.LORA, use_case=None, overrides={"rank": 1, "dropout": 0.0, "max_seq_length": length}, machine=CPU
    ).config
    bare = replace(shape, blocks=tuple(replace(block, part=replace(block.part, linears=())) for block in shape.blocks))
    layers = kept_by_layers(bare, config, Batch(ROWS, length, masked=False), on_gpu=False)
    held = _most_held(model, length)
    assert 0.96 * held <= layers.peak_bytes + layers.working_bytes <= 1.04 * held


def test_only_moments_count_that_are_the_highest_at_some_length() -> None:
    flat, middle, steep = Kept(100.0, 0.0), Kept(50.0, 0.1), Kept(10.0, 1.0)
    assert highest([steep, middle, flat]) == (flat, steep)  # the middle one is passed by both before it is the highest
    assert highest([middle, Kept(40.0, 0.1), Kept(30.0, 0.05)]) == (middle,)
    assert highest([flat, Kept(60.0, 0.5), steep]) == (flat, Kept(60.0, 0.5), steep)
    assert highest([]) == ()
