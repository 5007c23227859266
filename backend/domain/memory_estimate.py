"""Peak memory of a fine-tune by component, from a model's shape and a configuration alone.

T is batch × sequence, a the bytes of an activation, H hidden, M the MLP's width, V the vocabulary, L layers.
"""

import math
from dataclasses import dataclass
from typing import Literal

from domain.model_shape import ModelShape
from domain.peft_config import PeftConfig

Verdict = Literal["fits", "tight", "does_not_fit", "unknown"]
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# NF4 with double quantisation, bytes a parameter: 4 bits, one 8-bit scale a 64 block, one fp32 a 256 scales
# (QLoRA, arXiv 2305.14314, section 3).
_NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
# Python, torch, transformers and PEFT resident in an engine before any weight: 0.46-0.52 GiB, measured with
# psutil on Linux x86-64 with torch 2.13 (CPU build). On a GPU the CUDA context takes its place.
_OVERHEAD_CPU = 512 * 2**20
_OVERHEAD_GPU = 1536 * 2**20
# Allocator slack and temporaries of the largest operation, as a fraction of what moves (activations, logits).
_FRAGMENTATION = 0.1
_SPREAD_LOW, _SPREAD_HIGH = 0.8, 1.2


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by component. `low_bytes` and `high_bytes` bound the total by 20 % either way."""

    total_bytes: int
    weights_bytes: int
    adapter_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    logits_bytes: int
    overhead_bytes: int
    low_bytes: int
    high_bytes: int


@dataclass(frozen=True)
class Suggestion:
    """A change with what it would need."""

    change: str
    estimate_bytes: int
    verdict: Verdict


def targeted(shape: ModelShape, config: PeftConfig) -> dict[str, tuple[int, int]]:
    """Return the linear modules of one layer that the configuration adapts."""
    if config.target_modules == "all-linear":
        return dict(shape.linears)
    return {
        name: size
        for name, size in shape.linears.items()
        if any(
            wanted == name or wanted.endswith(f".{name}") or name.endswith(f".{wanted}")
            for wanted in config.target_modules
        )
    }


def adapter_parameters(shape: ModelShape, config: PeftConfig) -> int:
    """Count the trainable parameters: r·(in + out) a target, and out magnitudes with DoRA."""
    return shape.layers * sum(
        config.rank * (fan_in + fan_out) + (fan_out if config.use_dora else 0)
        for fan_in, fan_out in targeted(shape, config).values()
    )


def estimate(shape: ModelShape, config: PeftConfig, *, on_gpu: bool) -> MemoryEstimate:
    """Estimate the peak while training.

    Args:
        shape: The model.
        config: The configuration; batch_size rows of max_seq_length tokens are assumed.
        on_gpu: Whether a CUDA context or a host process is the overhead.
    """
    width = _BYTES[config.precision]
    weights = _weights(shape, config, width)
    trained = adapter_parameters(shape, config)
    state = 2 if config.optimizer == "adamw_8bit" else 8  # two moments, in 8 or in 32 bits
    tokens = config.batch_size * config.max_seq_length
    per_layer = _activations_per_token(shape, config, width)
    if config.gradient_checkpointing:
        # The boundaries of every layer are kept; one layer at a time is recomputed.
        activations = tokens * (shape.layers * shape.hidden * width + per_layer)
    else:
        activations = tokens * shape.layers * per_layer
    # Logits in the compute type, their fp32 copy, and its gradient.
    logits = tokens * shape.vocab * (width + 8)
    overhead = (_OVERHEAD_GPU if on_gpu else _OVERHEAD_CPU) + int(_FRAGMENTATION * (activations + logits))
    total = weights + trained * (4 + 4 + state) + activations + logits + overhead
    return MemoryEstimate(
        total_bytes=total,
        weights_bytes=weights,
        adapter_bytes=trained * 4,
        gradients_bytes=trained * 4,
        optimizer_bytes=trained * state,
        activations_bytes=activations,
        logits_bytes=logits,
        overhead_bytes=overhead,
        low_bytes=int(total * _SPREAD_LOW),
        high_bytes=math.ceil(total * _SPREAD_HIGH),
    )


def loading_bytes(shape: ModelShape, config: PeftConfig, *, on_gpu: bool) -> int:
    """Estimate what holding the base needs, without training."""
    overhead = _OVERHEAD_GPU if on_gpu else _OVERHEAD_CPU
    return _weights(shape, config, _BYTES[config.precision]) + overhead


def _weights(shape: ModelShape, config: PeftConfig, width: int) -> int:
    linear_width = {"none": float(width), "nf4": _NF4, "int8": 1.0}[config.quantization]
    return int(shape.linear_parameters * linear_width) + shape.embedding_parameters * width


def _activations_per_token(shape: ModelShape, config: PeftConfig, width: int) -> int:
    """Bytes one layer keeps for a token until its backward pass.

    Source: the saved tensors of a Llama layer in transformers (two fp32 norms, queries and keys before and
    after the rotation, the MLP's three products) and of PEFT's LoRA layer (its input, in fp32 where the base
    is in 16 bits, and A's output).
    """
    attention = 2 * width * shape.head_dim * (shape.heads + shape.kv_heads) + width * shape.head_dim * shape.kv_heads
    norms = 2 * 4 * shape.hidden
    mlp = (3 if shape.gated_mlp else 2) * width * shape.intermediate
    adapters = sum(
        4 * fan_in + 4 * config.rank + (8 * fan_out if config.use_dora else 0)
        for fan_in, fan_out in targeted(shape, config).values()
    )
    return attention + norms + mlp + adapters


def judge(needed_bytes: int, high_bytes: int, available_bytes: int) -> Verdict:
    """Compare an estimate with what is free: tight where only the range's upper end does not fit."""
    if needed_bytes > available_bytes:
        return "does_not_fit"
    return "tight" if high_bytes > available_bytes else "fits"


def suggest(shape: ModelShape, config: PeftConfig, available_bytes: int, *, on_gpu: bool) -> list[Suggestion]:
    """Propose changes in the order a practitioner would try them, each with its own estimate."""
    changes: list[tuple[str, dict[str, object]]] = []
    if config.quantization == "none" and config.init_weights != "pissa":
        changes.append(("store the base in 4 bits: algorithm qlora", {"quantization": "nf4"}))
    if not config.gradient_checkpointing:
        changes.append(("gradient_checkpointing=true", {"gradient_checkpointing": True}))
    if config.batch_size > 1:
        steps = config.gradient_accumulation * config.batch_size
        if steps <= 1024:
            changes.append(
                (
                    f"batch_size 1 with gradient_accumulation {steps}: the effective batch stays",
                    {"batch_size": 1, "gradient_accumulation": steps},
                )
            )
    if config.max_seq_length > 512:
        half = config.max_seq_length // 2
        changes.append((f"max_seq_length {half}", {"max_seq_length": half}))
    if config.rank > 8:
        changes.append(("rank 8", {"rank": 8}))
    suggestions = []
    for change, values in changes:
        changed = estimate(shape, PeftConfig.model_validate(config.model_dump() | values), on_gpu=on_gpu)
        verdict = judge(changed.total_bytes, changed.high_bytes, available_bytes)
        suggestions.append(Suggestion(change, changed.total_bytes, verdict))
    return suggestions
