"""What a model's config.json says of its shape, for the decoder families whose layers we know."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelShape:
    """Dimensions of a dense decoder.

    Attributes:
        linears: One layer's linear modules, name → (in, out) features.
        gated_mlp: Whether the MLP has a gate beside the up projection.
    """

    model_type: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    max_positions: int | None
    tied_embeddings: bool
    gated_mlp: bool
    linears: Mapping[str, tuple[int, int]]

    @property
    def linear_parameters(self) -> int:
        """Parameters in the linear layers, which quantisation stores in fewer bits."""
        return self.layers * sum(fan_in * fan_out for fan_in, fan_out in self.linears.values())

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the token embedding and, where it is separate, the output head."""
        return self.vocab * self.hidden * (1 if self.tied_embeddings else 2)


# Families with q, k, v, o projections and a gated MLP under Llama's names.
_LLAMA_LIKE = frozenset(
    {
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma",
        "gemma2",
        "gemma3_text",
        "granite",
        "smollm3",
        "stablelm",
        "olmo2",
    }
)
_TIED_BY_DEFAULT = frozenset({"gemma", "gemma2", "gemma3_text", "gpt2"})
_LIMIT = 10_000_000  # no real dimension is near it; a config with more is an attack on whoever multiplies


def read_shape(config: Mapping[str, Any]) -> ModelShape | None:
    """Read the dimensions from a config.json.

    Returns:
        The shape, or None where the family is not one whose layers are known here: unknown is never guessed.
    """
    model_type = config.get("model_type")
    if model_type in _LLAMA_LIKE:
        return _llama_like(str(model_type), config)
    if model_type == "gpt2":
        return _gpt2(config)
    return None


def _dimension(config: Mapping[str, Any], name: str, default: int | None = None) -> int | None:
    value = config.get(name, default)
    value = default if value is None else value
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _LIMIT else None


def _llama_like(model_type: str, config: Mapping[str, Any]) -> ModelShape | None:
    hidden, layers = _dimension(config, "hidden_size"), _dimension(config, "num_hidden_layers")
    heads, intermediate = _dimension(config, "num_attention_heads"), _dimension(config, "intermediate_size")
    vocab = _dimension(config, "vocab_size")
    if hidden is None or layers is None or heads is None or intermediate is None or vocab is None or layers > 10_000:
        return None
    kv_heads = _dimension(config, "num_key_value_heads", heads)
    head_dim = _dimension(config, "head_dim", max(hidden // heads, 1))
    if kv_heads is None or head_dim is None:
        return None
    return ModelShape(
        model_type,
        hidden,
        layers,
        heads,
        kv_heads,
        head_dim,
        intermediate,
        vocab,
        _dimension(config, "max_position_embeddings"),
        bool(config.get("tie_word_embeddings", model_type in _TIED_BY_DEFAULT)),
        True,
        {
            "q_proj": (hidden, heads * head_dim),
            "k_proj": (hidden, kv_heads * head_dim),
            "v_proj": (hidden, kv_heads * head_dim),
            "o_proj": (heads * head_dim, hidden),
            "gate_proj": (hidden, intermediate),
            "up_proj": (hidden, intermediate),
            "down_proj": (intermediate, hidden),
        },
    )


def _gpt2(config: Mapping[str, Any]) -> ModelShape | None:
    hidden, layers = _dimension(config, "n_embd"), _dimension(config, "n_layer")
    heads, vocab = _dimension(config, "n_head"), _dimension(config, "vocab_size")
    if hidden is None or layers is None or heads is None or vocab is None or layers > 10_000:
        return None
    inner = _dimension(config, "n_inner", 4 * hidden) or 4 * hidden
    return ModelShape(
        "gpt2",
        hidden,
        layers,
        heads,
        heads,
        max(hidden // heads, 1),
        inner,
        vocab,
        _dimension(config, "n_positions"),
        True,
        False,
        {
            "c_attn": (hidden, 3 * hidden),
            "attn.c_proj": (hidden, hidden),
            "c_fc": (hidden, inner),
            "mlp.c_proj": (inner, hidden),
        },
    )
