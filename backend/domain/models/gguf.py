"""Which models are written as GGUF, and the metadata that llama.cpp needs for them.

Source: llama.cpp's sources of September 2026: its converter (conversion/base.py, conversion/llama.py,
conversion/qwen.py) and the reader of the converter's files (src/llama-vocab.cpp).
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from core.errors import ExportRejected

GgufType = Literal["f32", "f16", "bf16", "q8_0"]


@dataclass(frozen=True)
class _Family:
    """One architecture of llama.cpp.

    Attributes:
        name: Its name in llama.cpp.
        permuted: Whether llama.cpp rotates neighbouring pairs of q and k. transformers rotates halves.
    """

    name: str
    permuted: bool


_FAMILIES: MappingProxyType[str, _Family] = MappingProxyType(
    {
        "LlamaForCausalLM": _Family("llama", permuted=True),
        "MistralForCausalLM": _Family("llama", permuted=True),
        "Qwen2ForCausalLM": _Family("qwen2", permuted=False),
        "Qwen3ForCausalLM": _Family("qwen3", permuted=False),
    }
)


@dataclass(frozen=True)
class RopeScaling:
    """How positions are stretched beyond those that the model was trained on.

    Attributes:
        frequency_factors: Each rotation's frequency is divided by its factor (Llama 3); empty for the other kinds.
        yarn: The YaRN parameters that are set, under llama.cpp's names.
    """

    kind: Literal["none", "linear", "yarn", "llama3"]
    factor: float = 1.0
    original_positions: int | None = None
    frequency_factors: tuple[float, ...] = ()
    yarn: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class GgufModel:
    """A model in llama.cpp's terms. Sizes are numbers of elements."""

    architecture: str
    permuted: bool
    layers: int
    positions: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    rms_norm_epsilon: float
    rope_base: float
    rope: RopeScaling
    notes: tuple[str, ...]


def read_gguf_model(config: Mapping[str, Any]) -> GgufModel:
    """Read a config.json.

    Raises:
        ExportRejected: llama.cpp has no such model, or this service does not write it yet.
    """
    names = config.get("architectures") or []
    family = next((_FAMILIES[name] for name in names if name in _FAMILIES), None)
    if family is None:
        raise ExportRejected(
            f"{', '.join(map(str, names)) or 'a model without a named architecture'} cannot be written as GGUF here; "
            f"{', '.join(_FAMILIES)} can. format=merged works for every architecture."
        )
    if config.get("hidden_act", "silu") != "silu":
        raise ExportRejected(f"llama.cpp computes {family.name} with silu, and this one uses {config['hidden_act']}.")
    if config.get("num_local_experts") or config.get("num_experts"):
        raise ExportRejected("A model of experts is not written as GGUF here yet; format=merged works.")
    try:
        heads = int(config["num_attention_heads"])
        head_size = int(config.get("head_dim") or config["hidden_size"] // heads)
        rope, base = _rope(config, head_size)
        return GgufModel(
            architecture=family.name,
            permuted=family.permuted,
            layers=int(config["num_hidden_layers"]),
            positions=int(config["max_position_embeddings"]),
            hidden_size=int(config["hidden_size"]),
            intermediate_size=int(config["intermediate_size"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_size=head_size,
            vocabulary=int(config["vocab_size"]),
            rms_norm_epsilon=float(config["rms_norm_eps"]),
            rope_base=base,
            rope=rope,
            notes=tuple(_notes(config)),
        )
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise ExportRejected(f"config.json lacks what GGUF needs: {type(error).__name__}: {error}.") from error


def _notes(config: Mapping[str, Any]) -> list[str]:
    window = config.get("sliding_window")
    windowed = window is not None and config.get("use_sliding_window", True)
    if windowed and window < config.get("max_position_embeddings", 0):
        return [
            f"The model attends to the last {window} tokens; llama.cpp attends to all, so that beyond {window} tokens "
            "its answers differ."
        ]
    return []


def _rope(config: Mapping[str, Any], head_size: int) -> tuple[RopeScaling, float]:
    """Read how positions are encoded. transformers 5 writes `rope_parameters`, earlier releases `rope_scaling`."""
    said = config.get("rope_parameters") or config.get("rope_scaling") or {}
    base = float(said.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = said.get("rope_type") or said.get("type") or "default"
    if kind == "default":
        return RopeScaling("none"), base
    factor = float(said.get("factor", 1.0))
    if kind == "linear":
        return RopeScaling("linear", factor), base
    original = said.get("original_max_position_embeddings")
    if kind == "yarn":
        names = {
            "extrapolation_factor": "ext_factor", "attention_factor": "attn_factor",
            "beta_fast": "beta_fast", "beta_slow": "beta_slow",
        }  # fmt: skip
        told = {name: float(said[key]) for key, name in names.items() if said.get(key) is not None}
        positions = int(original or config["max_position_embeddings"])
        return RopeScaling("yarn", factor, positions, yarn=told), base
    if kind == "llama3":
        factors = _llama3_factors(said, head_size, base)
        return RopeScaling("llama3", factor, int(original or 8192), factors), base
    raise ExportRejected(
        f"Positions are scaled by {kind!r:.40}, which is not written as GGUF here; format=merged works."
    )


def _llama3_factors(said: Mapping[str, Any], head_size: int, base: float) -> tuple[float, ...]:
    """Return the factor by which each rotation's frequency is divided.

    Source: Llama 3.1's `apply_scaling`, as in transformers' `_compute_llama3_parameters`.
    """
    factor = float(said.get("factor", 8.0))
    low, high = float(said.get("low_freq_factor", 1.0)), float(said.get("high_freq_factor", 4.0))
    original = float(said.get("original_max_position_embeddings") or 8192)
    factors = []
    for index in range(0, head_size, 2):
        wavelength = 2 * math.pi * base ** (index / head_size)
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return tuple(factors)


# The expressions with which tokenizers split text, as in their tokenizer.json.
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s"
)
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_TEKKEN = _CASED % ("", "") + rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
_GPT4O = (
    _CASED % (f"{_CONTRACTIONS}?", f"{_CONTRACTIONS}?") + rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
# (expression, whether a word that is a token of the vocabulary is taken without merging) → llama.cpp's name.
_SPLITS: MappingProxyType[tuple[str, bool], str] = MappingProxyType(
    {
        (_LLAMA3, True): "llama-bpe",
        (_LLAMA3, False): "smaug-bpe",
        (_QWEN2, False): "qwen2",
        (_TEKKEN, True): "tekken",
        (_GPT4O, False): "gpt-4o",
    }
)

# Other names that llama.cpp has for the same way of splitting.
# Source: llama.cpp, src/llama-vocab.cpp, `llama_vocab::impl::load` and the constructor of `llm_tokenizer_bpe`.
_ALIASES: MappingProxyType[str, str] = MappingProxyType(
    {
        "llama3": "llama-bpe",
        "llama-v3": "llama-bpe",
        "dbrx": "smaug-bpe",
        "phi-2": "gpt-2",
        "starcoder": "smollm",
        "refact": "smollm",
        "llama4": "gpt-4o",
    }
)
# The version of the conversion from GGUF. A change that makes other files of the same GGUF file raises it, and then
# files that were converted before are converted again.
CONVERSION, GGUF_CONVERSION = "conversion.json", 2


@dataclass(frozen=True)
class PreTokenizer:
    """How a byte-level tokenizer splits text before it merges, in the terms of tokenizer.json.

    Attributes:
        steps: In order. The last is ByteLevel.
        ignores_merges: Whether a word that is a token of the vocabulary is taken without merging.
        composes: Whether text is normalised to NFC first, as in all published tokenizers of this kind.
        adds_bos: Whether a text gets the beginning-of-text token if the file does not say so.
    """

    steps: tuple[dict[str, Any], ...]
    ignores_merges: bool
    composes: bool
    adds_bos: bool


def pre_tokenizer_of(name: str) -> PreTokenizer | None:
    """Return the way of splitting with a name of llama.cpp's; None for an unknown name.

    This is the inverse of `pre_tokenizer_name`.
    """
    name = _ALIASES.get(name, name)
    whole, bytes_alone = (
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": whole} for whole in (True, False)
    )
    if name == "gpt-2":
        return PreTokenizer((whole,), ignores_merges=False, composes=False, adds_bos=False)
    if name == "smollm":
        digits = {"type": "Digits", "individual_digits": True}
        return PreTokenizer((digits, whole), ignores_merges=False, composes=False, adds_bos=False)
    for (expression, ignores_merges), known in _SPLITS.items():
        if known == name:
            split = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
            adds_bos = name in ("llama-bpe", "tekken")
            return PreTokenizer((split, bytes_alone), ignores_merges, composes=name == "qwen2", adds_bos=adds_bos)
    return None


def pre_tokenizer_name(tokenizer: Mapping[str, Any]) -> str:
    """Return llama.cpp's name for the way in which a tokenizer splits text before it merges.

    Args:
        tokenizer: tokenizer.json, parsed.

    Raises:
        ExportRejected: It is no byte-level BPE, or llama.cpp has no name for its way of splitting. In llama.cpp a text
            would become other tokens.
    """
    model = tokenizer.get("model") or {}
    steps = _steps(tokenizer.get("pre_tokenizer"), "pretokenizers")
    if model.get("type") != "BPE" or not steps or steps[-1].get("type") != "ByteLevel":
        raise ExportRejected(
            "The tokenizer is no byte-level BPE (Llama 2 and its kin have another), and is not written as GGUF here "
            "yet; format=merged works."
        )
    changes = {step.get("type") for step in _steps(tokenizer.get("normalizer"), "normalizers")} - {"NFC"}
    if changes:
        raise ExportRejected(f"The tokenizer normalises text by {sorted(map(str, changes))}; llama.cpp does not.")
    name = _name_of_steps(steps, bool(model.get("ignore_merges")))
    if name is None:
        raise ExportRejected(f"llama.cpp has no pre-tokenizer like {json.dumps(steps)[:300]}; format=merged works.")
    return name


def _steps(said: Mapping[str, Any] | None, parts: str) -> list[Mapping[str, Any]]:
    """Return the steps of a part of tokenizer.json: none, one, or those of a sequence."""
    if said is None:
        return []
    return list(said.get(parts) or []) if said.get("type") == "Sequence" else [said]


def _name_of_steps(steps: list[Mapping[str, Any]], ignore_merges: bool) -> str | None:
    kinds = [step.get("type") for step in steps]
    bytes_step = steps[-1]
    if bytes_step.get("add_prefix_space"):
        return None
    splits_itself = bytes_step.get("use_regex", True)
    if kinds == ["ByteLevel"]:
        return "gpt-2" if splits_itself and not ignore_merges else None
    if kinds == ["Digits", "ByteLevel"]:
        return "smollm" if splits_itself and steps[0].get("individual_digits") and not ignore_merges else None
    if kinds != ["Split", "ByteLevel"] or splits_itself:
        return None
    split = steps[0]
    expression = (split.get("pattern") or {}).get("Regex")
    isolated = split.get("behavior") == "Isolated" and not split.get("invert")
    return _SPLITS.get((str(expression), ignore_merges)) if isolated else None
