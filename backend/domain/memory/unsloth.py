"""What a base that Unsloth holds keeps for the backward pass, and what its checkpointing puts into host memory.

Symbols are those of `domain.memory.activations`. Sources are files and functions of unsloth and unsloth_zoo 2026.10.7.
docs/memory-estimate.md compares the figures with what was measured on a GPU, and says what nobody has measured.
"""

import math
from dataclasses import dataclass

from domain.memory.activations import (
    WIDTH_BYTES,
    Batch,
    Layers,
    Stack,
    adapters_working,
    kept_by_peft,
    targeted_in,
)
from domain.models.shape import Block, Linear, ModelShape
from domain.peft.config import PeftConfig
from domain.peft.unsloth_rules import loaded_length, not_fused, obstacle

# Adapters are plain PEFT's; the loss goes by chunks; padding on the right needs no mask (models/llama.py,
# `LlamaModel_fast_forward`: it is dropped in training, since attention looks back only).
STACK = Stack(chunks_loss=True, makes_masks=False)
# The fused loss counts 16 bytes a logit and takes as many chunks, in fours, as keep a chunk under half of the free
# memory, 4 GiB at most (unsloth_zoo/fused_losses/cross_entropy_loss.py, `_CE_BYTES_PER_LOGIT`, `_CE_TARGET_GB_CAP`,
# `get_chunk_size`).
_COUNTED_PER_LOGIT = 16
_CHUNK_BYTES = 4 * 2**30
# What a chunk holds at its peak: logits and their gradient in 16 bits, and one fp32 tensor (`compute_fused_ce_loss`,
# compiled with `torch.func.grad_and_value`: the softmax is not kept beside them).
_PER_LOGIT = 8
# Layers' inputs above this size are moved to the host (unsloth_zoo/gradient_checkpointing.py, `MINIMUM_SIZE`), but for
# the last layer's. Two buffers of that size on the GPU take them back (`GPU_BUFFERS`, `GPU_BUFFERS_B`).
_LEAST_MOVED = 2 * 2**20
_ON_GPU = 3
# Made at the start: `INITIAL_CPU_BUFFER_COUNT` of `INITIAL_CPU_BUFFER_SIZE` elements of two bytes.
_FIRST_BUFFERS = 200 * 128 * 1024 * 2
# A base that was loaded for shorter rows gets plain checkpointing (models/_utils.py,
# `apply_unsloth_gradient_checkpointing`).
_SHORTEST_MOVED = 512
# torch's allocator holds a workspace of 32 MiB each for cuBLAS and cuBLASLt on Hopper, 8 MiB and less on older GPUs
# (ATen, cuda/CublasHandlePool.cpp, `parseChosenWorkspaceSize`).
WORKSPACE_BYTES = 2 * 32 * 2**20
# The groups that its kernels fuse, if all modules of one have adapters and none has a bias (models/llama.py,
# `FastLlamaModel.patch_peft_model`).
_QKV, _OUT, _MLP = ("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class UnslothHere:
    """Unsloth can hold a base on the device.

    Attributes:
        host_available_bytes: Host memory that its checkpointing may take; None where that is not known.
    """

    host_available_bytes: int | None = None


def holds(shape: ModelShape, config: PeftConfig, unsloth: UnslothHere | None) -> bool:
    """Tell whether Unsloth would hold the base: it is there, and nothing of the configuration keeps it from that."""
    return unsloth is not None and obstacle(config, shape.family) is None


def kept_by_layers(shape: ModelShape, config: PeftConfig, batch: Batch) -> Layers:
    """Count what all layers keep on the GPU."""
    plain = config.model_copy(update={"dropout": 0.0, "use_dora": False})
    blocks = [block for block in shape.blocks if block.passed]
    kept, kept_plainly = (
        [(block.count, _kept_by_layer(shape, block, settings, batch)) for block in blocks]
        for settings in (config, plain)
    )
    # The last norm keeps its input (kernels/rms_layernorm.py, `Fast_RMS_Layernorm`).
    outside = _hidden_bytes(shape, config, batch)
    everything, plainly = (sum(count * size for count, size in sizes) + outside for sizes in (kept, kept_plainly))
    most = max((adapters_working(block, config, batch) for block in blocks), default=0)
    if not config.gradient_checkpointing:
        return Layers(everything, plainly, everything, everything, most)
    inputs = _inputs_on_gpu(shape, config, batch)
    largest = max((size for _, size in kept), default=0)
    return Layers(everything, plainly, inputs + outside + largest, inputs + outside, most)


def logits_bytes(shape: ModelShape, config: PeftConfig, batch: Batch, free_bytes: int | None = None) -> int:
    """Bytes of the loss at its peak: a chunk's logits, and the hidden states of all tokens with their gradient.

    Tokens that are not trained have logits as well. Since chunks come in fours, a pass that is just too large for one
    chunk needs a quarter of what a somewhat smaller one needs. So a run of mixed lengths is taken to fill a chunk.

    Args:
        free_bytes: What is free on the device when the first loss is computed; plenty where that is not known.
    """
    hidden, counted = _hidden_bytes(shape, config, batch), shape.vocab * _COUNTED_PER_LOGIT
    most = _CHUNK_BYTES if free_bytes is None else max(counted, min(_CHUNK_BYTES, free_bytes // 2))
    if batch.even:
        parts = batch.tokens * counted / (most - hidden if hidden < most else most)
        count = 1 if parts <= 1 else min(batch.tokens, 4 * math.ceil(parts / 4))
        chunk = math.ceil(batch.tokens / count)
    else:
        chunk = min(batch.tokens, math.ceil(most / counted))
    return chunk * shape.vocab * _PER_LOGIT + 2 * hidden


def workspace_bytes(shape: ModelShape, config: PeftConfig) -> int:
    """Bytes that products need beside their tensors, with the buffer into which 4-bit weights are turned back.

    Source: kernels/utils.py, `fast_dequantize`, `WEIGHT_BUFFERS`.
    """
    if config.quantization == "none":
        return WORKSPACE_BYTES
    largest = max((linear.weights for linear, _ in shape.linears()), default=0)
    return WORKSPACE_BYTES + largest * WIDTH_BYTES[config.precision]


def host_bytes(shape: ModelShape, config: PeftConfig, batch: Batch) -> int:
    """Bytes of host memory that checkpointing takes: the input of each layer, in a pinned block of a power of two.

    Source: unsloth_zoo/gradient_checkpointing.py, `UnslothCheckpointFunction.forward`, `_pinned_block_bytes`. The first
    step moves the last layer's input too. Where rows grow from step to step, blocks that have become too small may stay
    beside it, as much again at most.
    """
    if not config.gradient_checkpointing or not _recomputes_its_own_way(shape, config):
        return 0
    if not _moves_inputs(shape, config, batch):
        return _FIRST_BUFFERS
    return _FIRST_BUFFERS + shape.layers * (1 << (_hidden_bytes(shape, config, batch) - 1).bit_length())


def _recomputes_its_own_way(shape: ModelShape, config: PeftConfig) -> bool:
    return loaded_length(config, shape.max_positions) >= _SHORTEST_MOVED


def _inputs_on_gpu(shape: ModelShape, config: PeftConfig, batch: Batch) -> int:
    """Bytes of the layers' inputs that checkpointing leaves on the GPU, shorter passes of the run included."""
    one = _hidden_bytes(shape, config, batch)
    if not _recomputes_its_own_way(shape, config):
        return shape.layers * one
    return min(shape.layers * one, max(_ON_GPU * one, shape.layers * _LEAST_MOVED))


def _moves_inputs(shape: ModelShape, config: PeftConfig, batch: Batch) -> bool:
    return _recomputes_its_own_way(shape, config) and _hidden_bytes(shape, config, batch) > _LEAST_MOVED


def _hidden_bytes(shape: ModelShape, config: PeftConfig, batch: Batch) -> int:
    return batch.tokens * shape.hidden * WIDTH_BYTES[config.precision]


def _kept_by_layer(shape: ModelShape, block: Block, config: PeftConfig, batch: Batch) -> int:
    """Bytes that one layer keeps.

    - Each norm keeps its input (kernels/rms_layernorm.py, `Fast_RMS_Layernorm`), the fused products after it its output
      (kernels/fast_lora.py, `LoRA_QKV` and `LoRA_MLP`, `save_for_backward`).
    - Attention keeps queries, keys, values and its output, which the fused output product shares. Positions are turned
      in place (kernels/rope_embedding.py). Qwen 3's norm of queries and keys keeps them as they were before
      (kernels/qk_norm_rope.py).
    - The fused MLP keeps gate and up, and computes the rest again; an unfused one keeps the activation as well.
    - Fused dropout keeps a mask of one byte for each input (kernels/fast_lora.py, `_dropout_forward`); it is on unless
      UNSLOTH_FUSED_LORA_DROPOUT=0.
    - What is not fused goes through PEFT's own layers.
    """
    linears = {linear.path.rpartition(".")[2]: linear for linear in block.part.linears}
    adapted = {linear.path.rpartition(".")[2] for linear, _ in targeted_in(block, config)}
    fused = [group for group in (_QKV, _OUT, _MLP) if _is_fused(group, linears, adapted, config)]
    by_kernels = {name for group in fused for name in group}

    def outputs(*names: str) -> int:
        return sum(linears[name].fan_out for name in names if name in linears)

    elements = shape.hidden * (2 + (_QKV in fused) + (_MLP in fused))
    elements += outputs(*_QKV) + (outputs("q_proj", "k_proj") if shape.family == "qwen3" else 0)
    elements += linears["o_proj"].fan_in if "o_proj" in linears else 0
    elements += outputs("gate_proj", "up_proj") + (0 if _MLP in fused else outputs("gate_proj"))
    per_token = elements * WIDTH_BYTES[config.precision]
    if config.dropout > 0:
        per_token += sum(linears[name].fan_in for name in by_kernels)
    by_peft = [linears[name] for name in sorted(adapted - by_kernels)]
    return batch.tokens * per_token + kept_by_peft(by_peft, config, batch, STACK, on_gpu=True)


def _is_fused(group: tuple[str, ...], linears: dict[str, Linear], adapted: set[str], config: PeftConfig) -> bool:
    return not_fused(config) is None and all(name in adapted and not linears[name].bias for name in group)
