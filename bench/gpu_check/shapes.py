"""Writes models of real shapes with random weights, and the text to train on."""

import json
from pathlib import Path
from typing import Any

from tests.support.tiny_model import make_tiny_model

_LLAMA_31_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LLAMA_32_ROPE = _LLAMA_31_ROPE | {"factor": 32.0}
_LLAMA = {"model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5}
# Source: the config.json of each model's repository on the Hub.
SHAPES: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B": _LLAMA
    | {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
        "rope_parameters": _LLAMA_32_ROPE | {"rope_theta": 500000.0},
    },
    "Llama-3.2-3B": _LLAMA
    | {
        "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
        "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
        "rope_parameters": _LLAMA_32_ROPE | {"rope_theta": 500000.0},
    },
    "Llama-3.1-8B": _LLAMA
    | {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False,
        "rope_parameters": _LLAMA_31_ROPE | {"rope_theta": 500000.0},
    },
    "Qwen2.5-7B": {
        "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "Qwen2.5-1.5B": {
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960,
        "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 131072, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "Qwen3-1.7B": {
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
        "rms_norm_eps": 1e-6, "max_position_embeddings": 40960, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "gemma-7b": {
        "model_type": "gemma", "vocab_size": 256000, "hidden_size": 3072, "intermediate_size": 24576,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256,
        "rms_norm_eps": 1e-6, "max_position_embeddings": 8192, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "Mistral-7B-v0.1": {
        "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 32768, "sliding_window": 4096, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}  # fmt: skip
# One of each family that Unsloth has fast layers for, the quickest first: `--families`.
OF_EACH_FAMILY = ("Llama-3.2-1B", "Qwen2.5-1.5B", "Qwen3-1.7B", "Mistral-7B-v0.1", "gemma-7b")
TINY = "tiny"


def write_model(name: str, folder: Path) -> None:
    """Write a model of a shape with random weights and a small tokenizer, as a normal local folder."""
    if name == TINY:
        make_tiny_model(folder)
        return
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    # Its tokenizer knows fewer tokens than the embedding has rows, which costs the same to compute.
    make_tiny_model(folder)
    end = AutoTokenizer.from_pretrained(folder).eos_token_id
    values = SHAPES[name]
    config = AutoConfig.for_model(**values, eos_token_id=end, bos_token_id=None, pad_token_id=end)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="4GB")


def write_rows(path: Path, *, rows: int, numbers: int) -> None:
    """Write texts that have a pattern to learn. Each has so many numbers, and at least as many tokens."""
    texts = [" ".join(str((start + step) % 10) for step in range(numbers)) for start in range(rows)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
