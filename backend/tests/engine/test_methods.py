"""Each method does what its paper says, on a tiny model, in plain torch and PEFT."""

import copy
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from domain.algorithms import Algorithm
from domain.configure import MachineFacts, configure
from domain.peft_config import PeftConfig
from engine import methods
from engine.base import Base
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


@pytest.mark.parametrize("algorithm", Algorithm)
def test_training_starts_from_the_bases_output(tiny_path: Path, algorithm: Algorithm) -> None:
    config = config_for(algorithm)
    base = load(tiny_path, config)
    before = logits(base)
    create(base, config)
    # PiSSA splits W into residual and product, which rounds; DoRA divides by a norm and multiplies by it.
    tolerance = {Algorithm.PISSA: 1e-5, Algorithm.DORA: 1e-5}.get(algorithm, 0.0)
    assert (logits(base) - before).abs().max() <= tolerance


@pytest.mark.parametrize("algorithm", Algorithm)
def test_the_count_of_trainable_parameters_is_pefts(tiny_path: Path, algorithm: Algorithm) -> None:
    config = config_for(algorithm)
    base = load(tiny_path, config)
    create(base, config)
    counted = sum(p.numel() for p in base.model.parameters() if p.requires_grad)
    assert counted == base.trainable_parameters == base.model.get_nb_trainable_parameters()[0]
    trained = [name for name, p in base.model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name and ".adp" in name for name in trained)


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 8 / 4), (True, 8 / 2)])
def test_the_scaling_is_alpha_over_r_or_over_its_root(tiny_path: Path, rslora: bool, scaling: float) -> None:
    config = config_for(Algorithm.LORA, use_rslora=rslora, alpha=8)
    base = load(tiny_path, config)
    create(base, config)
    layer = base.model.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.scaling["adp"] == scaling


def test_doras_magnitudes_start_as_the_norms_of_the_weights(tiny_path: Path) -> None:
    config = config_for(Algorithm.DORA)
    base = load(tiny_path, config)
    create(base, config)
    layer = base.model.get_base_model().model.layers[0].self_attn.q_proj
    norms = layer.get_base_layer().weight.norm(dim=1)
    assert torch.allclose(layer.lora_magnitude_vector["adp"].weight, norms)


def test_pissa_freezes_the_residual_and_gives_the_base_back_to_the_bit(tiny_path: Path, tmp_path: Path) -> None:
    config = config_for(Algorithm.PISSA)
    base = load(tiny_path, config)
    before = copy.deepcopy(base.model.state_dict())
    output = logits(base)
    with pytest.raises(RuntimeError, match="cut off"), kept(base, config, tmp_path):
        create(base, config)
        layer = base.model.get_base_model().model.layers[0].self_attn.q_proj
        original = before["model.layers.0.self_attn.q_proj.weight"]
        assert not torch.equal(layer.get_base_layer().weight, original)
        product = layer.scaling["adp"] * layer.lora_B["adp"].weight @ layer.lora_A["adp"].weight
        assert torch.allclose(layer.get_base_layer().weight + product, original, atol=1e-6)
        # The adapter holds the r largest singular values: the best rank-r part of W (Eckart-Young).
        rest = torch.linalg.svdvals(original)[4:]
        assert torch.allclose(torch.linalg.svdvals(layer.get_base_layer().weight)[: len(rest)], rest, atol=1e-4)
        raise RuntimeError("cut off")
    base.detach("adp")
    after = base.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(logits(base), output)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rslora", [False, True])
def test_a_pissa_adapter_is_the_same_as_plain_lora_on_the_unmodified_base(
    tiny_path: Path, tmp_path: Path, rslora: bool
) -> None:
    config = config_for(Algorithm.PISSA, use_rslora=rslora, alpha=6)
    base = load(tiny_path, config)
    with kept(base, config, tmp_path):
        initial = create(base, config)
        disturb(base)
        expected = logits(base)
        state, lora = methods.as_plain_lora(
            methods.adapter_state(base.model, "adp"), initial, base.model.peft_config["adp"]
        )
    base.detach("adp")
    assert (lora.r, lora.init_lora_weights, lora.use_rslora) == (8, True, rslora)
    lora.save_pretrained(str(tmp_path))
    from safetensors.torch import save_file

    save_file(state, tmp_path / "adapter_model.safetensors")
    plain = PeftModel.from_pretrained(load(tiny_path, config).model, str(tmp_path)).eval()
    with torch.no_grad():
        found = plain(input_ids=PROBE, use_cache=False).logits
    assert (expected - logits(load(tiny_path, config))).abs().max() > 1e-2  # it did learn something
    assert torch.allclose(found, expected, atol=1e-4)


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
    from engine.errors import BadSetting

    with pytest.raises(BadSetting, match="query_key_value"):
        load(tiny_path, config_for(Algorithm.LORA, target_modules=["query_key_value"]))


def test_several_adapters_share_one_base_and_do_not_disturb_each_other(tiny_path: Path) -> None:
    config = config_for(Algorithm.LORA)
    base = load(tiny_path, config)
    bare = logits(base)
    outputs = {}
    for name in ("one", "two"):
        base.create(name, methods.lora_config(config, "tests/tiny", None))
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
