"""Adapters on a base: gradients, targets, and several of them at once. The numbers are in test_numerics.py."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from domain.configure import MachineFacts, configure
from domain.peft.algorithms import Algorithm
from domain.peft.config import PeftConfig
from engine import methods
from engine.base import Base
from engine.errors import BadSetting
from engine.frozen_weights import original_weights_kept
from engine.initialisation import create_adapter

CPU = MachineFacts(has_gpu=False, supports_bf16=False)
PROBE = torch.arange(4, 36).reshape(2, 16)


def config_for(algorithm: Algorithm, **overrides: Any) -> PeftConfig:
    values = {"rank": 4, "max_seq_length": 64, "dropout": 0.0} | overrides
    return configure(algorithm, use_case=None, overrides=values, machine=CPU).config


def load(path: Path, config: PeftConfig) -> Base:
    return Base(path, config, "cpu", "transformers")


def logits(base: Base) -> torch.Tensor:
    with torch.no_grad():
        return base.model(input_ids=PROBE, use_cache=False).logits


def create(base: Base, config: PeftConfig) -> dict[str, torch.Tensor]:
    """Create the adapter as a run does; return A and B as initialised if it is to be converted."""
    torch.manual_seed(0)
    initial = create_adapter(base, "adp", config, "tests/tiny", None)
    base.model.eval()
    return initial


def kept(base: Base, config: PeftConfig, scratch: Path) -> AbstractContextManager[None]:
    """Give the base its weights back at the end of the block, as a run does."""
    return original_weights_kept(base.model, methods.changed_layers(base.model, config), scratch)


def disturb(base: Base, size: float = 0.02) -> None:
    """Move every trained weight, as an optimizer would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in base.model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def test_gradients_flow_through_four_bit_layers_after_the_model_was_evaluated(tiny_path: Path) -> None:
    """On CPUs with avx512_bf16, bitsandbytes' inference kernel would cut or falsify them."""
    config = config_for(Algorithm.QLORA)
    base = load(tiny_path, config)
    create(base, config)
    disturb(base)
    logits(base)  # an evaluation, in eval mode and without gradients
    found = _gradients(base)

    from bitsandbytes import functional
    from bitsandbytes.nn import Linear4bit

    plain = load(tiny_path, config_for(Algorithm.LORA))
    dequantised = {
        name: functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        for name, module in base.model.get_base_model().named_modules()
        if isinstance(module, Linear4bit)
    }
    assert dequantised
    for name, weight in dequantised.items():
        plain.model.get_submodule(name.replace(".base_layer", "")).weight.data = weight.float()
    create(plain, config_for(Algorithm.LORA))
    disturb(plain)
    expected = _gradients(plain)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-3, atol=1e-6), name


def _gradients(base: Base) -> dict[str, torch.Tensor]:
    base.model.train()
    base.model(input_ids=PROBE, labels=PROBE, use_cache=False).loss.backward()
    return {name: p.grad for name, p in base.model.named_parameters() if p.grad is not None}


def test_quantised_weights_take_the_bytes_that_nf4_should(tiny_path: Path) -> None:
    base = load(tiny_path, config_for(Algorithm.QLORA))
    weight = base.model.model.layers[0].mlp.gate_proj.weight
    assert weight.numel() * weight.element_size() == 64 * 128 // 2
    assert weight.quant_state.nested and weight.quant_state.quant_type == "nf4"
    assert base.total_parameters == load(tiny_path, config_for(Algorithm.LORA)).total_parameters


def test_named_targets_alone_are_adapted_and_unknown_ones_refused(tiny_path: Path) -> None:
    config = config_for(Algorithm.LORA, target_modules=["q_proj", "v_proj"])
    base = load(tiny_path, config)
    create(base, config)
    adapted = {
        name.split(".lora_A")[0].rsplit(".", 1)[-1] for name, _ in base.model.named_parameters() if "lora_A" in name
    }
    assert adapted == {"q_proj", "v_proj"}
    with pytest.raises(BadSetting, match="query_key_value"):
        load(tiny_path, config_for(Algorithm.LORA, target_modules=["query_key_value"]))


def test_several_adapters_share_one_base_and_do_not_disturb_each_other(tiny_path: Path) -> None:
    config = config_for(Algorithm.LORA)
    base = load(tiny_path, config)
    bare = logits(base)
    outputs = {}
    for name in ("one", "two"):
        base.create(name, methods.lora_config(config, base.model, "tests/tiny", None))
        disturb(base, 0.05 if name == "one" else 0.1)
        base.model.eval()
        outputs[name] = logits(base)
    for name, expected in outputs.items():
        with base.using(name):
            assert torch.equal(logits(base), expected)
    with base.using(None):
        assert torch.equal(logits(base), bare)
    base.detach("one")
    with base.using("two"):
        assert torch.equal(logits(base), outputs["two"])
    base.detach("two")
    assert base.adapters == [] and torch.equal(logits(base), bare)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_adapters_that_are_there_already_do_not_hide_the_layers(tiny_path: Path, targets: str | list[str]) -> None:
    config = config_for(Algorithm.LORA, target_modules=targets)
    base = load(tiny_path, config)
    bare = methods.targeted_layers(base.model, config)
    base.create("one", methods.lora_config(config_for(Algorithm.LORA), base.model, "tests/tiny", None))
    base.create("two", methods.lora_config(config, base.model, "tests/tiny", None))
    assert methods.targeted_layers(base.model.get_base_model(), config) == bare


@pytest.mark.parametrize(("tied", "words"), [(True, "head, whose weights"), (False, "head; adapters are put")])
def test_the_head_as_a_target_is_refused_as_what_it_is(tied: bool, words: str) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 32}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=tied))
    config = config_for(Algorithm.LORA, target_modules=["q_proj", "lm_head"])
    with pytest.raises(BadSetting, match=f"lm_head names the output {words}"):
        methods.targeted_layers(model, config)
