"""The formulas of domain.memory.activations against what autograd really holds, family by family."""

from functools import cache
from typing import Any

import pytest
import torch
from peft import PeftModelForCausalLM
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from domain.configure import MachineFacts, configure
from domain.memory.activations import Batch, kept_by_layers
from domain.models.shape import ModelShape
from domain.peft.algorithms import Algorithm
from domain.peft.config import PeftConfig
from engine import methods
from engine.dora import use_blocks
from engine.outline import describe
from engine.transformers_backend import DTYPES
from tests.support.saved_bytes import saved_bytes
from tests.support.small_families import OWN, SMALL, WITHOUT_HEAD_DIM

CPU = MachineFacts(has_gpu=False, supports_bf16=False)
ROWS, LENGTH = 2, 64
# Plain and fused projections, norms of every kind, parallel blocks, windows, capped logits, latent attention.
DENSE = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "gpt2", "gpt_bigcode"),
    *(
        "gpt_neox",
        "opt",
        "falcon",
        "cohere",
        "cohere2",
        "olmo2",
        "starcoder2",
        "stablelm",
        "glm4",
        "granite",
        "minicpm3",
    ),
    *("smollm3", "nemotron", "granitemoehybrid", "ernie4_5", "apertus"),
)
# Experts that stay as they are, attention that is not fused, a state space.
OTHERS = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "bloom", "mamba", "qwen3_5_text")
# gpt_bigcode calls torch.jit.script on import, which torch has deprecated; PEFT corrects GPT-2's layout by itself.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning"),
]


def _config(algorithm: Algorithm = Algorithm.LORA, **overrides: Any) -> PeftConfig:
    overrides = {"rank": 8, "batch_size": ROWS, "max_seq_length": LENGTH, **overrides}
    return configure(algorithm, use_case=None, overrides=overrides, machine=CPU).config


def _values(model_type: str) -> dict[str, Any]:
    values = {**SMALL, **OWN.get(model_type, {})}
    if model_type in WITHOUT_HEAD_DIM:
        del values["head_dim"]
    return values


@cache
def _shape(model_type: str) -> ModelShape:
    shape = describe(CONFIG_MAPPING[model_type](**_values(model_type)).to_dict()).shape
    assert shape is not None
    return shape


def _both(model_type: str, config: PeftConfig, *, masked: bool = True) -> tuple[int, int]:
    """Return what autograd holds after a forward pass, and what the formulas say, in bytes."""
    parsed, shape = CONFIG_MAPPING[model_type](**_values(model_type)), _shape(model_type)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(parsed, attn_implementation=shape.attention).to(DTYPES[config.precision])
    base.requires_grad_(False)
    use_blocks()
    settings = methods.lora_config(config, base, "tiny", None)
    model = PeftModelForCausalLM(base, settings)
    if settings.target_parameters:
        methods.put_dropout(model, "default", config.dropout)
    model.train()
    ids = torch.randint(0, 128, (ROWS, LENGTH))
    mask = torch.ones(ROWS, LENGTH, dtype=torch.long)
    if masked:
        mask[0, -3:] = 0
    held = saved_bytes(model, lambda: model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1)[0])
    return held, kept_by_layers(shape, config, Batch(ROWS, LENGTH, masked), on_gpu=False).peak_bytes


@pytest.mark.parametrize("model_type", DENSE)
@pytest.mark.parametrize(("precision", "dropout"), [("fp32", 0.0), ("fp32", 0.05), ("bf16", 0.05)])
def test_every_dense_family_keeps_what_the_formula_says(model_type: str, precision: str, dropout: float) -> None:
    held, said = _both(model_type, _config(precision=precision, dropout=dropout))
    # The first layer keeps less: nothing before the first adapter needs a gradient. In six layers that is up to a
    # sixth of a part; in real models a thirtieth.
    assert 0.94 * held <= said <= 1.17 * held


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("algorithm", [Algorithm.LORA, Algorithm.DORA])
def test_masks_dropout_precision_and_dora_are_counted(
    algorithm: Algorithm, dropout: float, precision: str, masked: bool
) -> None:
    held, said = _both("llama", _config(algorithm, dropout=dropout, precision=precision), masked=masked)
    assert 0.98 * held <= said <= 1.04 * held


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["down_proj"], ["o_proj", "gate_proj"]])
def test_only_adapted_modules_keep_their_input(targets: list[str]) -> None:
    held, said = _both("llama", _config(target_modules=targets))
    assert 0.98 * held <= said <= 1.18 * held


# Experts in the kinds of code that computes them: grouped products, of (out, in) and of (in, out), all of them at once.
STACKED = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "granitemoe", "llama4_text")


@pytest.mark.parametrize("model_type", STACKED)
@pytest.mark.parametrize(("precision", "dropout"), [("fp32", 0.0), ("fp32", 0.05), ("bf16", 0.05)])
def test_adapters_on_experts_keep_what_is_said(model_type: str, precision: str, dropout: float) -> None:
    held, said = _both(model_type, _config(precision=precision, dropout=dropout, target_experts=True))
    assert 0.94 * held <= said <= 1.17 * held


@pytest.mark.parametrize("model_type", OTHERS)
@pytest.mark.parametrize(("precision", "masked"), [("fp32", False), ("fp32", True), ("bf16", True)])
def test_other_families_keep_what_is_said(model_type: str, precision: str, masked: bool) -> None:
    held, said = _both(model_type, _config(precision=precision), masked=masked)
    assert 0.94 * held <= said <= 1.17 * held
