"""What Unsloth's fast layers support. The rest goes to plain transformers + PEFT, with the reason.

Source: `unsloth/models/loader.py` and `llama.py` of unsloth 2026.10.7, read for what they refuse or quietly change;
tests/engine/test_unsloth_contract.py checks these rules against the installed version.
"""

from domain.peft.config import PeftConfig

LEAST_CAPABILITY = (7, 0)  # Unsloth's kernels are for Volta and later
# `FastLanguageModel` has layers of its own for these, on which it fuses the adapter's products (loader.py,
# `FastLanguageModel.from_pretrained`). Gemma 2 it has too, but with soft-capped logits in a loss of its own. Any other
# family it hands to its general loader, `FastModel`, which compiles transformers' own layers. That has not been tried
# here: nothing is known of its speed and its memory, or whether adapters on it equal PEFT's.
FAST_FAMILIES = frozenset({"llama", "mistral", "gemma", "qwen2", "qwen3"})
# Those of them that have run on a GPU here (docs/gpu.md). The others are known from Unsloth's source alone.
MEASURED_FAMILIES = frozenset({"llama"})
# Unsloth silently cuts rows that are longer than the length that the base was loaded for. Loading for a greater length
# costs little, and requests can then share a base.
SHARED_LENGTH = 2048


def obstacle(config: PeftConfig, model_type: str | None) -> str | None:
    """Return why Unsloth cannot load a base as requested; None if it can."""
    if model_type is None:
        return "the model's family is not known, and Unsloth is fast for known ones only"
    if model_type not in FAST_FAMILIES:
        return f"Unsloth has no fast layers for the family {model_type}, and its general loader has not been tried here"
    if config.objective != "sft":
        return "learning from preferences needs the log-probability of each token, which Unsloth's fused loss hides"
    if config.quantization == "int8":
        return "Unsloth hands 8-bit bases to a generic path without its fused kernels"
    if config.target_experts is True:
        return "adapters on experts have been tried with plain transformers + PEFT alone"
    if config.precision == "fp32":
        return "Unsloth's fused kernels take 16-bit bases only"
    return None


def unmeasured(model_type: str) -> str | None:
    """Say that nobody here has run a family through Unsloth on a GPU; None if somebody has."""
    if model_type in MEASURED_FAMILIES:
        return None
    return f"Unsloth has not been measured here with the family {model_type}"


def loaded_length(config: PeftConfig, max_positions: int | None) -> int:
    """Return the tokens to load a base for: never more than the model knows, or Unsloth would stretch its positions."""
    wanted = max(SHARED_LENGTH, config.max_seq_length)
    return wanted if max_positions is None else min(wanted, max_positions)


def not_fused(config: PeftConfig) -> str | None:
    """Say why an adapter runs through PEFT's own layers on a base that Unsloth loaded; None if it is fused."""
    if config.use_dora:
        return "Unsloth's fused kernels leave DoRA's magnitudes out"
    return None
