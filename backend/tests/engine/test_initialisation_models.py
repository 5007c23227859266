"""Methods that start from a decomposition, on models that are not built like a Llama."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from domain.peft.algorithms import Algorithm
from engine import methods
from engine.channel import Stopped
from engine.frozen_weights import unwrapped
from engine.training import train
from tests.engine.test_methods import config_for, create, kept, load, logits
from tests.support.training_command import TestChannel, command_for

# PEFT corrects GPT-2's layout by itself, and has settings for experts that are not asked for; it says so.
pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"),
]
_SMALL: dict[str, Any] = {"vocab_size": 400, "eos_token_id": 0, "bos_token_id": 0}
_LAYERS: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256,
}  # fmt: skip


def _gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=256, **_SMALL))


def _mixture() -> Any:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**_SMALL, **_LAYERS, **experts))


def _with_images() -> Any:
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    text = _SMALL | _LAYERS
    tokens = {"boi_token_index": 1, "eoi_token_index": 2, "image_token_index": 3, "mm_tokens_per_image": 4}
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, **tokens))


def _written(model: Any, tiny_path: Path, folder: Path) -> Path:
    shutil.copytree(tiny_path, folder, ignore=shutil.ignore_patterns("model.safetensors"))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("algorithm", "overrides"),
    [
        (Algorithm.PISSA, {"quantization": "nf4"}),
        (Algorithm.OLORA, {"quantization": "nf4"}),
        (Algorithm.LOFTQ, {}),
        (Algorithm.LOFTQ, {"loftq_iterations": 2}),
    ],
)
def test_gpt2s_weights_are_found_turned_round_in_its_files(
    tiny_path: Path, tmp_path: Path, algorithm: Algorithm, overrides: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    path = _written(_gpt2(), tiny_path, tmp_path / "gpt2")
    config = config_for(algorithm, learning_rate=0.01, max_steps=3, **overrides)
    base = load(path, config)
    before, published = logits(base), logits(load(path, config_for(Algorithm.LORA)))
    result = train(base, command_for(tmp_path, config), TestChannel())
    assert result.final_eval_loss is not None and result.initial_eval_loss is not None
    assert result.final_eval_loss < result.initial_eval_loss
    base.detach("adp")
    assert torch.equal(logits(base), before) and not torch.equal(before, published)


@pytest.mark.parametrize(
    ("algorithm", "overrides"),
    [(Algorithm.PISSA, {}), (Algorithm.OLORA, {}), (Algorithm.LOFTQ, {"loftq_iterations": 2})],
)
def test_stacked_experts_stay_as_they_are_and_the_attention_beside_them_is_decomposed(
    tiny_path: Path, tmp_path: Path, algorithm: Algorithm, overrides: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    path = _written(_mixture(), tiny_path, tmp_path / "mixture")
    config = config_for(algorithm, max_steps=2, **overrides)
    base = load(path, config)
    before, experts = logits(base), base.model.get_parameter("model.layers.0.mlp.experts.gate_up_proj").clone()
    train(base, command_for(tmp_path, config), TestChannel())
    assert torch.equal(unwrapped(base.model).get_parameter("model.layers.0.mlp.experts.gate_up_proj"), experts)
    adapted = {path.rpartition(".")[2] for path in methods.targeted_layers(base.model, config)}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj"}
    base.detach("adp")
    assert torch.equal(logits(base), before)


@pytest.mark.parametrize("algorithm", [Algorithm.PISSA, Algorithm.LOFTQ])
def test_weights_that_transformers_renamed_are_found_under_their_names_in_the_files(
    tiny_path: Path, tmp_path: Path, algorithm: Algorithm
) -> None:
    torch.manual_seed(0)
    path = _written(_with_images(), tiny_path, tmp_path / "images")
    with safe_open(path / "model.safetensors", framework="pt") as tensors:
        assert "language_model.model.layers.0.self_attn.q_proj.weight" in tensors.keys()  # noqa: SIM118
    config = config_for(algorithm, quantization="nf4", target_modules=["language_model.layers.0.self_attn.q_proj"])
    base = load(path, config)
    assert list(methods.targeted_layers(base.model, config)) == ["model.language_model.layers.0.self_attn.q_proj"]
    with kept(base, config, tmp_path):
        create(base, config)


@pytest.mark.parametrize("algorithm", [Algorithm.PISSA, Algorithm.LOFTQ])
def test_a_run_can_be_ended_between_two_decompositions(tiny_path: Path, tmp_path: Path, algorithm: Algorithm) -> None:
    config = config_for(algorithm, max_steps=2, quantization="nf4")
    base = load(tiny_path, config)
    before = logits(base)
    whole = TestChannel()
    train(base, command_for(tmp_path / "whole", config), whole)
    base.detach("adp")
    at = [event.fraction for event in whole.events if getattr(event, "stage", None) == "adapter"]
    assert at == [None, *(number / 14 for number in range(14))]
    channel = TestChannel(stop_at=3)
    with pytest.raises(Stopped):
        train(base, command_for(tmp_path / "cut", config), channel)
    assert [event.stage for event in channel.events] == ["tokenizing", "adapter", "adapter"]
    assert base.adapters == [] and torch.equal(logits(base), before)
    assert not list((tmp_path / "cut").glob("originals-*"))
