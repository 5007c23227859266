"""Shapes against transformers' own classes: modules, sizes and ties, what a layer does, what is refused."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from domain.memory.activations import missing_targets
from domain.models.shape import ModelShape, Role
from engine.methods import linear_layers
from engine.model_class import read_config
from engine.outline import describe
from services.models.embedded import CONFIG
from services.models.embedded_shape import EMBEDDED_SHAPE
from tests.support.shapes import shape_of

RECORDED = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "configs"
CONFIGS = sorted(RECORDED.glob("*/config.json"))
# One of every kind of layers: plain, fused, tied, windows, experts of four forms, state spaces, towers, shared layers.
FAMILIES = (
    *("llama", "gpt2", "opt", "bloom", "falcon", "phi3", "gemma2", "gemma3", "gemma4_text", "cohere2", "mixtral"),
    *("deepseek_v3", "qwen2_moe", "gpt_oss", "llama4_text", "qwen3_5_text", "granitemoehybrid", "mamba", "zamba2"),
)
# Code that comes with the model.
ELSEWHERE = {"qwen", "baichuan", "internlm2", "exaone", "phi3small", "mimo", "kimi_k2"}
# gpt_bigcode calls torch.jit.script on import, which torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")


def _shape(values: dict[str, Any]) -> ModelShape:
    said = describe(values)
    assert said.shape is not None, said.problem
    return said.shape


def _paths(shape: ModelShape) -> dict[str, tuple[int, int]]:
    paths = {
        f"{block.container}.{index}.{linear.path}": (linear.fan_in, linear.fan_out)
        for block in shape.blocks
        for index in block.indexes
        for linear in block.part.linears
    }
    return paths | {linear.path: (linear.fan_in, linear.fan_out) for linear in shape.outside.linears}


@cache
def _default(family: str) -> ModelShape:
    """Return the shape of a family's default configuration."""
    return _shape(CONFIG_MAPPING[family]().to_dict())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_module_and_parameter_of_the_class_is_counted_once(family: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family]())
    shape = _default(family)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    ours, layers = _paths(shape), linear_layers(model)
    weights = {path: id(model.get_submodule(path).weight) for path in layers}
    # A module that appears in several places, as Zamba's shared block, is counted where it is first.
    assert set(ours) <= set(layers) and {weights[path] for path in ours} == set(weights.values())
    assert all(layers[path] == size for path, size in ours.items())


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "deepseek_v3", "gemma3", "qwen3_5_text"])
def test_a_target_module_is_missed_exactly_where_the_engine_misses_it(family: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family]())
    shape = _default(family)
    names = {".".join(path.split(".")[at:]) for path, _ in model.named_modules() for at in range(path.count(".") + 1)}
    names |= {f"{name}x" for name in names} | {name[1:] for name in names} - {""}
    layers = linear_layers(model)
    missing = {name for name in names if not any(path == name or path.endswith(f".{name}") for path in layers)}
    assert set(missing_targets(shape, sorted(names))) == missing


@pytest.mark.parametrize(
    ("family", "role", "ends"),
    [
        ("llama4_text", "special", {"feed_forward.router"}),  # its router is a linear module that returns two values
        ("qwen2_moe", "router", {"mlp.shared_expert_gate"}),
        ("qwen2_moe", "shared_expert", {"gate_proj", "up_proj", "down_proj"}),
        ("deepseek_v32", "unreached", {"wq_b", "wk", "weights_proj"}),  # what an indexer chooses has no gradient
        ("deepseek_v3", "refused", {"gate_proj", "up_proj", "down_proj"}),  # PEFT takes the names for the experts
        ("mamba", "refused", {"out_proj"}),
        ("mamba", "bypassed", {"dt_proj"}),  # its weight is read past the module: an adapter would not count
        ("gemma3", "tower", {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}),
    ],
)
def test_what_is_left_out_of_all_linear_modules(family: str, role: Role, ends: set[str]) -> None:
    shape = _default(family)
    found = {linear.path for linear, _ in shape.linears() if linear.role == role}
    assert found and all(any(path == end or path.endswith(f".{end}") for end in ends) for path in found)
    assert all(any(path == end or path.endswith(f".{end}") for path in found) for end in ends)


def test_experts_are_known_by_what_they_are() -> None:
    shape = _default("mixtral")
    (block,) = shape.blocks
    assert [(tensor.path, tensor.experts, tensor.fan_in, tensor.fan_out) for tensor in block.part.stacked] == [
        ("mlp.experts.gate_up_proj", 8, 4096, 2 * 14336),
        ("mlp.experts.down_proj", 8, 14336, 4096),
    ]
    turned = _default("gpt_oss").blocks[0].part.stacked  # gpt-oss stores them the other way round
    assert {(tensor.fan_in, tensor.fan_out) for tensor in turned} == {(2880, 5760), (2880, 2880)}


@pytest.mark.parametrize(
    ("family", "attention"),
    [("llama", "sdpa"), ("gpt_oss", "eager"), ("bloom", "eager"), ("mamba", "eager"), ("gemma3", "sdpa")],
)
def test_the_attention_is_the_fused_one_where_the_class_has_it(family: str, attention: str) -> None:
    shape = _default(family)
    assert shape.attention == attention
    squares = any(block.part.kept.full.square > 1 for block in shape.blocks)
    assert squares == (attention == "eager" and family != "mamba")
    assert any(block.part.by_token for block in shape.blocks) == (family == "mamba")


def test_the_shape_that_comes_with_the_embedded_model_is_what_an_engine_says() -> None:
    assert describe(dict(CONFIG)) == EMBEDDED_SHAPE


@pytest.mark.parametrize("change", [{}, {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 72}])
def test_the_shape_that_tests_take_without_an_engine_is_what_an_engine_says(change: dict[str, Any]) -> None:
    values = {**CONFIG, **change}
    by_hand = shape_of(values)
    assert by_hand.dtype == "bfloat16"
    assert _shape(values) == ModelShape(**{**by_hand.__dict__, "dtype": None})


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"model_type": "qwen", "auto_map": {"AutoModel": "x.Y"}}, "Python of its own"),
        ({"model_type": "no such family"}, "no model type"),
        ({"model_type": ["llama"]}, "no model type"),
        ({}, "no model type"),
        ({"model_type": "bert"}, "encoder"),
        ({"model_type": "t5"}, "no class that predicts the next token"),
        ({**CONFIG, "num_hidden_layers": 5000}, "layers"),
        ({**CONFIG, "num_hidden_layers": "many"}, "does not take"),
        ({**CONFIG, "num_attention_heads": 0}, "does not take"),
        ({**CONFIG, "rope_parameters": {"rope_type": "no such"}}, "cannot be built"),
    ],
)
def test_what_cannot_be_loaded_says_why(values: dict[str, Any], why: str) -> None:
    said = describe(values)
    assert said.shape is None and not said.loadable
    assert said.problem is not None and why in said.problem


def test_no_code_of_a_repository_is_run(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nLlamaConfig = None\n")
    values = {**CONFIG, "auto_map": {"AutoConfig": "evil.LlamaConfig"}, "_name_or_path": str(tmp_path)}
    assert read_config(values).model_type == "llama"
    assert describe(values).shape == EMBEDDED_SHAPE.shape
    assert not (tmp_path / "ran").exists()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(["llama", "gemma2", "mixtral", "gpt2", "qwen3_5_text"]),
    st.dictionaries(
        st.sampled_from(
            [
                *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size"),
                *(
                    "intermediate_size",
                    "head_dim",
                    "layer_types",
                    "num_local_experts",
                    "rope_parameters",
                    "sliding_window",
                ),
                *("attn_implementation", "hidden_act", "tie_word_embeddings", "quantization_config", "dtype", "n_embd"),
            ]
        ),
        st.one_of(
            *(st.none(), st.text(max_size=5), st.integers(-2, 40), st.booleans(), st.floats()),
            *(st.lists(st.integers(0, 3), max_size=3), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2)),
        ),
        max_size=4,
    ),
)
def test_a_hostile_config_has_a_shape_or_a_reason(family: str, values: dict[str, Any]) -> None:
    said = describe({"num_hidden_layers": 2, **values, "model_type": family})
    assert (said.shape is None) != (said.problem is None)
    assert said.shape is None or said.shape.parameters > 0


@pytest.mark.slow
@pytest.mark.skipif(not CONFIGS, reason="recorded configs are not here")
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.parent.name)
def test_published_configs_have_a_shape_or_need_code_of_their_own(path: Path) -> None:
    raw = json.loads(path.read_bytes())
    said = describe(raw)
    if raw["model_type"] in ELSEWHERE:
        assert said.shape is None and not said.loadable
    elif raw["model_type"] != "minicpm3":  # transformers 5.17 fails on the published rope_scaling
        assert said.shape is not None, said.problem


def test_a_class_that_mixes_tokens_behind_its_layers_is_counted_with_all_logits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = {**CONFIG, "num_hidden_layers": 2}
    assert _shape(values).chunked_loss
    plain = LlamaForCausalLM.forward

    def pooled(self: Any, *arguments: Any, **named: Any) -> Any:
        output = plain(self, *arguments, **named)
        output.logits = output.logits[:, :8]  # of some of the tokens alone
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", pooled)
    assert not _shape(values).chunked_loss
