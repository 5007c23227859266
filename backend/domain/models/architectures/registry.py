"""Which family a config.json belongs to, and how its weights are stored."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from domain.models.architectures import elsewhere, experts, hybrid, older
from domain.models.architectures.assembly import Family
from domain.models.architectures.dense import STYLES, build_dense, build_phi, build_phi3
from domain.models.architectures.reader import ConfigReader, NotKnown
from domain.models.architectures.storage import read_stored
from domain.models.shape import ModelShape

_NO_SDPA = "its attention does not run through scaled_dot_product_attention, the only one that the engine uses"
_OWN_CODE = "it needs Python of its own, which is never run here"
_UNTIED = MappingProxyType({"tie_word_embeddings": False, "hidden_act": "silu"})
_TIED = MappingProxyType({"tie_word_embeddings": True, "hidden_act": "silu"})


def _families() -> dict[str, Family]:
    """List them; the defaults are those of transformers' configuration classes (version 5.17)."""
    tied = {"gemma", "gemma2", "gemma3_text", "smollm3", "starcoder2", "cohere", "cohere2", "ernie4_5"}
    families = {name: Family(build_dense, _TIED if name in tied else _UNTIED) for name in STYLES}
    tanh = "gelu_pytorch_tanh"
    families["gemma"] = Family(build_dense, {**_TIED, "hidden_act": tanh})
    families["gemma2"] = Family(build_dense, {**_TIED, "hidden_activation": tanh})
    families["gemma3_text"] = Family(build_dense, hybrid.GEMMA3_TEXT)
    families["starcoder2"] = Family(build_dense, {**_TIED, "use_bias": True, "hidden_act": tanh})
    families["seed_oss"] = Family(build_dense, {**_UNTIED, "attention_bias": True})
    families["glm"] = families["glm4"] = Family(build_dense, {**_UNTIED, "attention_bias": True})
    families["arcee"] = Family(build_dense, {**_UNTIED, "hidden_act": "relu2"})
    families |= {
        "phi": Family(build_phi, {**_UNTIED, "hidden_act": "gelu_new"}),
        "phi3": Family(build_phi3, _UNTIED),
        "gpt2": Family(older.build_gpt2, {**_TIED, "activation_function": "gelu_new"}),
        "gpt_bigcode": Family(older.build_gpt2, {**_TIED, "activation_function": tanh}),
        "gpt_neo": Family(older.build_gpt_neo, {**_TIED, "activation_function": "gelu_new"}, _NO_SDPA),
        "gptj": Family(older.build_gptj, {**_UNTIED, "activation_function": "gelu_new"}, _NO_SDPA),
        "gpt_neox": Family(older.build_gpt_neox, {**_UNTIED, "hidden_act": "gelu"}),
        "opt": Family(older.build_opt, {**_TIED, "activation_function": "relu"}),
        "bloom": Family(older.build_bloom, _TIED, _NO_SDPA),
        "falcon": Family(older.build_falcon, _TIED),
        "mpt": Family(older.build_mpt, _TIED, _NO_SDPA),
        "mixtral": Family(experts.build_mixtral, _UNTIED, adapts_experts=True),
        "olmoe": Family(experts.build_mixtral, _UNTIED, adapts_experts=True),
        "granitemoe": Family(experts.build_mixtral, _UNTIED),
        "phimoe": Family(experts.build_mixtral, _UNTIED, adapts_experts=True),
        "qwen2_moe": Family(experts.build_qwen_moe, _UNTIED),
        "qwen3_moe": Family(experts.build_qwen_moe, _UNTIED, adapts_experts=True),
        "deepseek_v2": Family(experts.build_deepseek, _UNTIED, adapts_experts=True),
        "deepseek_v3": Family(experts.build_deepseek, _UNTIED, adapts_experts=True),
        "kimi_k2": Family(experts.build_deepseek, _UNTIED, _OWN_CODE, adapts_experts=True),
        "minicpm3": Family(experts.build_minicpm3, _TIED),
        "glm4_moe": Family(experts.build_glm4_moe, _UNTIED, adapts_experts=True),
        "gpt_oss": Family(experts.build_gpt_oss, _UNTIED, _NO_SDPA),
        "qwen3_next": Family(hybrid.build_qwen_hybrid, _UNTIED, adapts_experts=True),
        "qwen3_5_text": Family(hybrid.build_qwen_hybrid, _UNTIED),
        "granitemoehybrid": Family(hybrid.build_granite_hybrid, _UNTIED),
        "gemma3": Family(hybrid.build_gemma3, _TIED),
        "qwen": Family(elsewhere.build_qwen, _UNTIED, _OWN_CODE),
        "baichuan": Family(elsewhere.build_fused_llama, _UNTIED, _OWN_CODE),
        "internlm2": Family(elsewhere.build_fused_llama, _UNTIED, _OWN_CODE),
        "exaone": Family(elsewhere.build_exaone, {**_UNTIED, "activation_function": "silu"}, _OWN_CODE),
        "phi3small": Family(elsewhere.build_phi3_small, _TIED, _OWN_CODE),
        "mimo": Family(elsewhere.build_mimo, _UNTIED, _OWN_CODE),
    }
    return families


FAMILIES: Mapping[str, Family] = MappingProxyType(_families())
# Models whose text part AutoModelForCausalLM loads alone (transformers 5.17, modeling_auto.py).
_TEXT_OF = MappingProxyType({"qwen3_5": "qwen3_5_text"})


def read_shape(config: Mapping[str, Any]) -> ModelShape | None:
    """Read a model's shape from its config.json.

    Returns:
        The shape, or None where the family is not known here or its config lacks a dimension: nothing is guessed.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        return None
    try:
        text = config
        if model_type in _TEXT_OF:
            model_type, text = _TEXT_OF[model_type], ConfigReader(config).part("text_config")
        family = FAMILIES.get(model_type)
        if family is None:
            return None
        shape = family.build(ConfigReader(text, family.defaults), model_type)
        return replace(
            shape,
            stored=read_stored(config),
            dtype=_dtype(text) or _dtype(config),
            obstacle=family.obstacle,
            adapts_experts=family.adapts_experts,
        )
    except NotKnown:
        return None


def _dtype(config: Mapping[str, Any]) -> str | None:
    value = config.get("dtype") or config.get("torch_dtype")  # the latter until transformers 4.56
    return value if isinstance(value, str) else None
