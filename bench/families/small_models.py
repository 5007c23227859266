"""Makes a small model of random weights of any family that transformers knows, with the tests' tokenizer beside it."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.models.auto.auto_factory import _get_model_class
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from engine.model_class import attention_of, model_class

_MOST_PARAMETERS = 40_000_000
_VOCABULARY_STEP = 64
# By part of a name: every whole number of a configuration whose name holds it becomes so large at most. The first that
# fits counts.
_AT_MOST: tuple[tuple[str, int], ...] = (
    *(("vocab_size", 400), ("num_hidden_layers", 2), ("n_layer", 2), ("num_layers", 2), ("decoder_layers", 2)),
    *(("encoder_layers", 2), ("depth", 2), ("num_key_value_heads", 2), ("n_head_kv", 2), ("num_kv_heads", 2)),
    *(("num_experts_per_tok", 2), ("moe_topk", 2), ("moe_k", 2), ("top_k", 2), ("experts_top", 2), ("n_group", 1)),
    *(("topk_group", 1), ("n_shared_experts", 1), ("num_shared_experts", 1), ("moe_num_shared", 1)),
    *(("first_k_dense", 1), ("experts", 4), ("num_local", 4), ("num_attention_heads", 4), ("n_head", 4), ("heads", 4)),
    *(("group_vocab", 400), ("zero_expert", 2), ("adapter_rank", 16), ("num_embeddings", 64), ("base_channels", 32)),
    *(("latent_channels", 64), ("embedding_dim", 64), ("projector_hidden", 64), ("projection_dim", 64)),
    *(("global_head_dim", 16), ("head_dim", 16), ("rope_head", 8), ("v_head", 16), ("nope_head", 16), ("d_head", 16)),
    *(("lora_rank", 32), ("chunk_size", 16), ("state_size", 16), ("d_state", 16), ("index_topk", 16)),
    *(("moe_intermediate", 32), ("expert_intermediate", 32), ("intermediate", 128), ("ffn", 128), ("n_inner", 128)),
    *(("hidden_size_per_layer", 16), ("laurel", 16), ("hidden_size", 64), ("n_embd", 64), ("d_model", 64)),
    *(("embed_dim", 64), ("proj_dim", 64), ("image_size", 28), ("patch_size", 14), ("max_position", 512)),
    *(("n_positions", 512), ("n_ctx", 512), ("max_seq_len", 512), ("max_source", 512), ("max_target", 512)),
    *(("num_blocks", 2), ("sliding_window", 64), ("attention_chunk", 64), ("max_window", 2), ("num_channels", 3)),
)
# Lists that follow from the sizes; the class makes its own.
_DERIVED = frozenset(
    {
        *("layer_types", "mlp_layer_types", "layers_block_type", "hybrid_override_pattern", "no_rope_layers"),
        *("moe_layers", "transformers_version", "dtype", "architectures", "full_attention_idxs", "attn_layer_indices"),
        *("hybrid_layer_ids", "per_layer_config", "expert_layers", "mamba_layers", "cross_attention_layers"),
        *("attention_layers", "_name_or_path", "output_attentions"),
    }
)
# What a family needs beside that.
_SPECIAL: dict[str, dict[str, Any]] = {
    **{
        name: {"layer_types": ["linear_attention", "full_attention"]}
        for name in (
            *("qwen3_5", "qwen3_5_moe", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "olmo_hybrid", "minicpmv4_6"),
        )
    },
    **{
        name: {"num_key_value_heads": 4}
        for name in (
            *("deepseek_v2", "deepseek_v3", "deepseek_v32", "glm_moe_dsa", "glm4_moe_lite", "minicpm3", "axk1"),
            *("axk2", "youtu", "kimi_k25", "nemotron"),
        )
    },
    **{name: {"head_dim": 16} for name in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral")},
    **{
        name: {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
        for name in (
            *("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker", "paddleocr_vl", "glm4v", "glm46v", "glm_ocr", "glmga"),
            "cosmos3_edge",
        )
    },
    **{name: {"rotary_dim": 16} for name in ("codegen", "gptj")},
    **{
        name: {"num_hidden_layers": 6, "num_kv_shared_layers": 0}
        for name in ("gemma4", "gemma4_text", "gemma4_unified")
    },
    "deepseek_v2": {"num_key_value_heads": 4, "num_experts_per_tok": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "num_hidden_layers": 2},
    **{
        name: {
            **{"num_hidden_layers": 6, "num_kv_shared_layers": 0, "intermediate_size": 128},
            "activation_sparsity_pattern": [0.95] * 3 + [0.0] * 3,
        }
        for name in ("gemma3n", "gemma3n_text")
    },
    **{
        name: {
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]},
            },
        }
        for name in ("cohere_compass", "cohere_compass_text")
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8}},
    **{
        name: {
            "layer_types": ["linear_attention", "qwen_sparse_attention"],
            **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16},
            "indexer_compress_ratio": 4,
        }
        for name in ("qwen4_exp", "qwen4_exp_text")
    },
    "emu3": {"vocabulary_map": {"<image>": 5, "<|extra_200|>": 6, "<|visual token 000000|>": 7}},
    "ernie4_5_vl_moe": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]}},
    "glm4v_moe": {
        "rope_parameters": {
            **{"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5},
        },
    },
    "hunyuan_vl": {
        **{"head_dim": 16, "mrope_section": [2, 2, 2, 2]},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2, 2]},
    },
    **{
        name: {
            "text_config": {
                **{"model_type": text, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
                **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 400},
                "hidden_size_per_layer_input": 0,
            },
        }
        for name, text in (*(("gemma4_assistant", "gemma4_text"), ("gemma4_unified_assistant", "gemma4_unified_text")),)
    },
    "chameleon": {
        "vocabulary_map": {"<image>": 5, "IMGIMGAZ": 6},
        **{"channel_multiplier": [1, 1], "num_key_value_heads": 4},
    },
    "deepseek_ocr2": {
        **{"num_key_value_heads": 4, "num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse"]},
        **{"n_group": 1, "topk_group": 1},
    },
    "doge": {"num_key_value_heads": 4},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "granite4_vision": {
        **{"deepstack_layer_map": [], "downsample_rate": "1/2"},
        "text_config": {
            **{"model_type": "granite", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
            **{"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 400},
        },
    },
    "hrm_text": {"num_layers_per_stack": 2, "num_hidden_layers": 16},
    "janus": {"channel_multiplier": [1, 1], "num_patches": 2},
    "kimi_linear": {
        **{"num_key_value_heads": 4, "num_experts_per_token": 2, "layer_types": ["linear_attention", "full_attention"]},
        "mlp_layer_types": ["dense", "sparse"],
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"num_key_value_heads": 4, "num_hidden_layers": 4, "qk_head_dim": None},
    "mistral4": {"num_key_value_heads": 4, "head_dim": 32},
    "step3p7": {
        **{"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64},
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("sliding_attention", "full_attention")
        },
    },
    "zamba": {
        **{"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
        **{"attention_hidden_size": 128, "attention_head_dim": 32, "num_key_value_heads": 4, "mamba_dt_rank": 4},
    },
    "zamba2": {
        **{"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
        **{
            "hybrid_layer_ids": [1, 3],
            "attention_hidden_size": 128,
            "attention_head_dim": 32,
            "num_key_value_heads": 4,
        },
        **{"mamba_headdim": 16, "n_mamba_heads": 8, "kv_channels": 16, "num_query_groups": 4},
    },
    "glm5_next": {"num_key_value_heads": 4, "layer_types": ["linear_attention", "deepseek_sparse_attention"]},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},  # its class rounds the width of keys up to 64
    "laguna": {"num_attention_heads_per_layer": [4, 4]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "mamba_n_heads": 8},
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
}
# What a family's published config.json files have, and its class does not name.
_ADDED: dict[str, dict[str, Any]] = {
    "qwen2_5_omni_thinker": {"vision_start_token_id": 7},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 7},
}


def families() -> list[str]:
    """Name the families that predict the next token, and those of pictures and text that are tuned on text."""
    causal = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in MODEL_FOR_MASKED_LM_MAPPING_NAMES]
    return causal + [name for name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if name not in causal]


def make_small(family: str, folder: Path, tokenizer: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a model into a folder and return the folder.

    Args:
        family: A model type.
        folder: Is made.
        tokenizer: A folder whose tokenizer goes beside it.
        dtype: Of its weights.

    Raises:
        Exception: Whatever the family's class says of sizes that do not go together.
    """
    tokens = AutoTokenizer.from_pretrained(tokenizer)
    kind = CONFIG_MAPPING[family]
    ends = {"bos_token_id": 1, "eos_token_id": tokens.eos_token_id, "pad_token_id": tokens.pad_token_id}
    # As published ones are, filled up: a family's own tokenizer class may add tokens of its own.
    vocabulary = -(-len(tokens) // _VOCABULARY_STEP) * _VOCABULARY_STEP
    small = _small(kind().to_dict(), _SPECIAL.get(family, {}), vocabulary, ends)
    config = kind(**small, **_ADDED.get(family, {}))
    model_class(config)
    chosen = _published_class(config)
    with torch.device("meta"):
        parameters = sum(int(parameter.numel()) for parameter in chosen._from_config(config).parameters())
    if parameters > _MOST_PARAMETERS:
        raise ValueError(f"{parameters:,} parameters: one of its sizes is not made small")
    torch.manual_seed(0)
    model = chosen._from_config(config, attn_implementation=attention_of(chosen), dtype=dtype)
    for parameter in model.parameters():  # what a class begins with zeros, training fills
        if parameter.dim() == 2 and not bool(parameter.any()):
            torch.nn.init.normal_(parameter, std=0.02)
    ids = torch.tensor([tokens("hello there").input_ids])
    model(input_ids=ids, use_cache=False).logits.square().mean().backward()
    model.save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder


def _published_class(config: Any) -> Any:
    """Return the class that a family's models are published by, with every part that their files have."""
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return _get_model_class(config, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    return model_class(config)[0]


def _small(config: dict[str, Any], special: dict[str, Any], vocabulary: int, ends: dict[str, Any]) -> dict[str, Any]:
    """Make every size of a configuration small."""
    small: dict[str, Any] = {}
    for name, value in config.items():
        if name in _DERIVED:
            continue
        if isinstance(value, dict) and name.endswith("_config") and name != "quantization_config":
            towers = "vision" in name or "audio" in name
            small[name] = _small(value, {} if towers else special, vocabulary, ends)
        elif name in ends:
            small[name] = ends[name]
        elif name.endswith("vocab_size") and value is not None:
            small[name] = vocabulary
        elif type(value) is int:
            small[name] = _limited(name, value)
        else:
            small[name] = value
    return small | {name: value for name, value in special.items() if name in config}


def _limited(name: str, value: int) -> int:
    limit = next((limit for part, limit in _AT_MOST if part in name), None)
    return value if limit is None else min(value, limit)
