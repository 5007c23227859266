"""Peak memory of a fine-tune by component, from a model's shape and a configuration alone.

T is batch × sequence, a the bytes of an activation, H hidden, M the MLP's width, V the vocabulary, L layers.
"""

import math
from dataclasses import dataclass
from typing import Literal

from domain.model_shape import Block, Linear, ModelShape
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


def targeted(shape: ModelShape, config: PeftConfig) -> list[tuple[Linear, int]]:
    """Return the linear modules that the configuration adapts, with how many there are of each."""
    if config.target_modules == "all-linear":
        return list(shape.linears())
    return [
        (linear, count)
        for block in shape.blocks
        for linear in block.part.linears
        if (count := max(_matching(block, linear.path, wanted) for wanted in config.target_modules))
    ]


def _matching(block: Block, path: str, wanted: str) -> int:
    """Count the layers of a block in which a name means a module: the end of its path, from a dot on."""
    if path == wanted or path.endswith(f".{wanted}"):
        return block.count
    head, _, index = wanted.removesuffix(f".{path}").rpartition(".")
    if wanted == path or not wanted.endswith(f".{path}") or not index.isdigit() or int(index) not in block.indexes:
        return 0
    return 1 if block.container == head or block.container.endswith(f".{head}") or not head else 0


def adapter_parameters(shape: ModelShape, config: PeftConfig) -> int:
    """Count the trainable parameters: r·(in + out) a target, and out magnitudes with DoRA."""
    return sum(
        count * (config.rank * (linear.fan_in + linear.fan_out) + (linear.fan_out if config.use_dora else 0))
        for linear, count in targeted(shape, config)
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
    activations = tokens * _activations_per_token(shape, config, width)
    if config.gradient_checkpointing:
        # The boundaries of every layer are kept; one layer at a time is recomputed.
        activations = tokens * shape.layers * shape.hidden * width + activations // max(shape.layers, 1)
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
    return int(shape.linear_parameters * linear_width) + (shape.parameters - shape.linear_parameters) * width


def _activations_per_token(shape: ModelShape, config: PeftConfig, width: int) -> int:
    """Bytes all layers keep for a token until its backward pass.

    Source: what autograd saves of each part of a layer (`domain.architectures.parts`) and of PEFT's LoRA layer
    (its input, in fp32 where the base is in 16 bits, and A's output).
    """
    layers = sum(
        block.count * (4 * block.part.kept.fp32 + width * block.part.kept.plain)
        for block in shape.blocks
        if block.passed
    )
    return layers + sum(
        count * (4 * linear.fan_in + 4 * config.rank + (8 * linear.fan_out if config.use_dora else 0))
        for linear, count in targeted(shape, config)
    )


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
