"""Sizes of small models of many families, by which transformers' own classes are built in tests."""

from typing import Any

SMALL = {
    "vocab_size": 128,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"n_embd": 96, "n_layer": 6, "n_head": 6, "n_positions": 256, "vocab_size": 128}
LATENT = {
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 32,
    "num_key_value_heads": 6,
}
OWN: dict[str, dict[str, Any]] = {
    "gpt2": GPT2,
    "gpt_bigcode": GPT2,
    "opt": {"ffn_dim": 160, "word_embed_proj_dim": 96},
    "minicpm3": LATENT,
    "gpt_neox": {"num_key_value_heads": 6},
    "granitemoe": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "granitemoehybrid": {
        "layer_types": ["full_attention"] * 6,
        "shared_intermediate_size": 160,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "mamba_n_heads": 4,
    },
}
WITHOUT_HEAD_DIM = {"falcon", "opt", "gpt_neox", "phi", "minicpm3", "gpt2", "gpt_bigcode"}
EXPERTS = {
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
}
OWN |= {
    "mixtral": EXPERTS,
    "qwen2_moe": EXPERTS,
    "qwen3_moe": EXPERTS,
    "gpt_oss": EXPERTS | {"sliding_window": 32},
    "mamba": {"state_size": 8},
    "qwen3_5_text": {
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    },
    "llama4_text": EXPERTS | {"intermediate_size_mlp": 160},
    "bloom": {"n_head": 6, "n_layer": 6},
}  # fmt: skip
