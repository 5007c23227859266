"""Tiny random models of families that transformers holds otherwise than their files do, and adapters on them."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

_SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 2,
}  # fmt: skip
_MLA = {
    "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
# What the default of each family's configuration is replaced by. gpt_oss holds its experts (in, out), with biases, and
# the others (out, in); ernie4_5_moe has a module below its router, and names it otherwise in its files.
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": _EXPERTS | {"num_experts": 4},
    "ernie4_5_moe": {"moe_k": 2, "moe_num_experts": 4, "moe_intermediate_size": 32, "moe_num_shared_experts": 1},
    "glm4_moe_lite": _MLA,
    "deepseek_v32": _MLA | {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 16},
    "glm_moe_dsa": _MLA | {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 16},
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma3_text": {"query_pre_attn_scalar": 16},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


def make_family(name: str, folder: Path, tokenizer: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a model of a family as a normal local folder; return it.

    Args:
        tokenizer: The folder whose tokenizer it gets.
        dtype: Of its weights.
    """
    tokens = AutoTokenizer.from_pretrained(tokenizer)
    torch.manual_seed(0)
    kind = CONFIG_MAPPING[name]
    known = kind().to_dict()
    sizes = {key: value for key, value in _SMALL.items() if key in known} | FAMILIES[name]
    config = kind(vocab_size=len(tokens), **sizes)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder


def make_random_adapter(base: Path, folder: Path, size: float = 0.02, **settings: Any) -> Path:
    """Write an adapter as stock PEFT makes it, with every weight moved away from where it starts; return its folder.

    Args:
        base: The model's folder.
        size: How far each weight is moved.
        settings: Of PEFT's LoraConfig.
    """
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **settings))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape))
    adapted.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def stock_logits(folder: Path, probe: torch.Tensor, adapter: Path | None = None) -> torch.Tensor:
    """Return what stock transformers answers, with an adapter of stock PEFT or without."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=probe, use_cache=False).logits
    return logits
