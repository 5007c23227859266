"""Checks what a repository's JSON files ask of the program that loads them."""

from collections.abc import Iterator, Mapping
from typing import Any

from core.errors import ModelRejected, NeedsRemoteCode

# Implementations that transformers ships. Any other name is looked up on the Hub as a kernel, that is, as code.
# Source: transformers 5.17, integrations/hub_kernels.py, `is_kernel`.
_IMPLEMENTATIONS = frozenset(
    {"eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention", "grouped_mm", "batched_mm"}
)
_IMPLEMENTATION_KEYS = tuple(
    f"{prefix}{part}_implementation{suffix}"
    for part in ("attn", "experts")
    for prefix, suffix in (("", ""), ("_", ""), ("_", "_internal"))
)
_MAX_LAYERS = 10_000  # of either; the deepest model there is has some hundred
_MAX_WIDTH = 100_000_000
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers")
_WIDTHS = (
    *("hidden_size", "n_embd", "d_model", "intermediate_size", "n_inner", "ffn_dim", "d_ff", "vocab_size", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "n_head", "n_heads"),
    *("num_local_experts", "num_experts", "n_routed_experts"),
)
_MAX_DEPTH = 32  # of objects within objects; real configs have three


def check_asks_for_no_code(model_id: str, name: str, content: Mapping[str, Any]) -> None:
    """Refuse a JSON file of a model that would make a loader run code from elsewhere.

    Args:
        model_id: For the message.
        name: The file's.
        content: Parsed.

    Raises:
        NeedsRemoteCode: It maps classes to the repository's Python, or names an attention kernel of the Hub.
    """
    for part in _objects(content):
        if part.get("auto_map"):
            raise NeedsRemoteCode(f"{model_id} asks to run its own Python ({name} has auto_map); it is never run here.")
        for key in _IMPLEMENTATION_KEYS:
            value = part.get(key)
            for wanted in value.values() if isinstance(value, Mapping) else (value,):
                if wanted is not None and not (isinstance(wanted, str) and wanted in _IMPLEMENTATIONS):
                    raise NeedsRemoteCode(
                        f"{model_id} asks for the kernel {str(wanted)[:100]!r} ({key} in {name}); kernels are code, "
                        "and none is fetched here."
                    )


def check_dimensions(model_id: str, config: Mapping[str, Any]) -> None:
    """Refuse a config.json with dimensions so large that building the model would never end.

    Raises:
        ModelRejected: A dimension is larger than that of any model.
    """
    for part in _objects(config):
        for names, limit in ((_LAYERS, _MAX_LAYERS), (_WIDTHS, _MAX_WIDTH)):
            for name in names:
                value = part.get(name)
                if isinstance(value, int | float) and not isinstance(value, bool) and not 0 <= value <= limit:
                    shown = f"{max(min(value, 1e300), -1e300):.6g}"  # an int may be beyond what a float can be
                    raise ModelRejected(f"{model_id}: {name} in config.json is {shown}; no model has that many.")


def _objects(content: Mapping[str, Any], depth: int = 0) -> Iterator[Mapping[str, Any]]:
    """Yield an object and those in it."""
    yield content
    if depth < _MAX_DEPTH:
        for value in content.values():
            if isinstance(value, Mapping):
                yield from _objects(value, depth + 1)
