"""Peak memory of a fine-tune by component, from a model's shape and a configuration alone.

Symbols are those of `domain.memory.activations`. docs/memory-estimate.md compares the figures with measured ones.
"""

import math
from dataclasses import dataclass
from typing import Literal

from core import allocator
from domain.memory import unsloth as by_unsloth
from domain.memory.activations import (
    OURS,
    WIDTH_BYTES,
    Batch,
    Layers,
    Stack,
    kept_by_layers,
    largest_batch,
    logits_bytes,
    targeted,
    targeted_experts,
)
from domain.memory.unsloth import UnslothHere
from domain.models.shape import ModelShape, Role
from domain.peft.config import DECOMPOSED, PeftConfig
from domain.peft.objectives import SPECS as OBJECTIVES

# NF4 with double quantisation, bytes a parameter: 4 bits, one 8-bit scale a 64 block, one fp32 a 256 scales
# (QLoRA, arXiv 2305.14314, section 3).
_NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
# LLM.int8(): a byte a parameter; one fp32 scale a row is left out (arXiv 2208.07339, section 3).
_INT8 = 1.0


@dataclass(frozen=True)
class Platform:
    """What a device adds to the tensors.

    Attributes:
        on_gpu: Whether it is a CUDA GPU.
        overhead_bytes: Interpreter, libraries and context before any weight.
        training_bytes: What the first step adds to that once: autograd's and the optimizer's code and threads.
        slack_loading: What quantising holds beside the weights while they are loaded, as a part of those that it turns
            into fewer bits, as published.
        slack_layers: What the allocator holds and cannot reuse, as a part of all that a forward pass without dropout
            or DoRA allocates in the layers, checkpointed or not.
        slack_quantized: The same where each pass turns the weights back from 4 or 8 bits in between.
        slack_extras: The same as a part of what dropout and DoRA add to that.
        slack_passing: The same as a part of what passing tensors take in each layer beyond all that it keeps, as in a
            state space whose chunks plain torch computes.
        slack_steps: What part of `slack_layers` holds for layers that compute token by token: their many small tensors
            leave places that are used again.
        slack_adapters: The same as a part of adapters, gradients and optimizer.
        slack_pissa: The same as a part of the dense fp32 weights that PiSSA decomposes. OLoRA and LoftQ do alike; their
            decompositions have not been measured apart.
        low: The range's lower end as a part of the total.
        high: Its upper end.
    """

    on_gpu: bool
    overhead_bytes: int
    training_bytes: int
    slack_loading: float
    slack_layers: float
    slack_quantized: float
    slack_extras: float
    slack_passing: float
    slack_steps: float
    slack_adapters: float
    slack_pissa: float
    low: float
    high: float


# Fitted on one half of the points that bench/memory_estimate.py measures (torch 2.13, gperftools 2.10).
TCMALLOC = Platform(
    on_gpu=False,
    overhead_bytes=475 * 2**20,
    training_bytes=82 * 2**20,
    slack_loading=0.11,
    slack_layers=0.024,
    slack_quantized=0.012,
    slack_extras=0.02,
    slack_passing=0.0,
    slack_steps=1.0,
    slack_adapters=0.29,
    slack_pissa=0.09,
    low=0.95,
    high=1.05,
)
# glibc's heap does not reuse what is freed in it of aligned memory: after a first step it holds, free, about as much as
# the layers' temporaries were in sum, checkpointed or not (glibc 2.36, the engine's own thresholds). How much differs
# from run to run: one of the fitted points was seen at 991, 1,070 and 1,155 MiB. What is used leaves no fitted point
# more than 5 % under but that one in its highest run (10 %), and so is higher than what one series of points gives.
GLIBC = Platform(
    on_gpu=False,
    overhead_bytes=463 * 2**20,
    training_bytes=100 * 2**20,
    slack_loading=0.45,
    slack_layers=0.75,
    slack_quantized=1.2,
    slack_extras=0.2,
    slack_passing=1.25,  # chosen by the points of Nemotron-H and Mamba 2 in docs/memory-families.md
    slack_steps=0.3,  # chosen by the one point of a Mamba there
    slack_adapters=0.15,
    slack_pissa=0.2,
    low=0.75,
    high=1.13,
)
# The CUDA context and the libraries' workspaces, about 1.5 GiB beside nvidia-smi. torch's caching allocator reuses its
# blocks: published peaks of reserved memory are within some per cent of the tensors' sum (docs/memory-estimate.md).
GPU = Platform(
    on_gpu=True,
    overhead_bytes=1536 * 2**20,
    training_bytes=0,
    slack_loading=0.0,
    slack_layers=0.03,
    slack_quantized=0.03,
    slack_extras=0.03,
    slack_passing=0.0,
    slack_steps=1.0,
    slack_adapters=0.0,
    slack_pissa=0.0,
    low=0.9,
    high=1.1,
)


def platform(*, on_gpu: bool) -> Platform:
    """Return the constants of a device, on a CPU with the allocator that engines have."""
    if on_gpu:
        return GPU
    return TCMALLOC if allocator.engines_have_tcmalloc() else GLIBC


@dataclass(frozen=True)
class Estimate:
    """Bytes by component; the components add up to the total.

    Attributes:
        adapter_bytes: The adapter, and beside it the one that the run continues where preferences are compared with it.
        activations_bytes: What layers and adapters keep for the backward pass.
        overhead_bytes: Interpreter, libraries, context, and what the allocator cannot reuse.
        low_bytes: The range that held for the points in docs/memory-estimate.md.
        engine: What holds the base. Its own layers and loss are counted.
        host_bytes: What its checkpointing puts into host memory, beside the total, which is the device's.
    """

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
    engine: Literal["transformers", "unsloth"] = "transformers"
    host_bytes: int = 0


def adapter_parameters(shape: ModelShape, config: PeftConfig) -> int:
    """Count the trainable parameters: r·(in + out) a target, and out magnitudes with DoRA.

    Source: LoRA (arXiv 2106.09685), section 4.1; DoRA (arXiv 2402.09353), section 4.1.
    """
    return sum(trained.parameters for trained in trained_by_role(shape, config))


@dataclass(frozen=True)
class TrainedRole:
    """What an adapter trains in the modules of one role: how many modules, and how many parameters of its own.

    A tensor of stacked experts counts as one module.
    """

    role: Role
    modules: int
    parameters: int


def trained_by_role(shape: ModelShape, config: PeftConfig) -> list[TrainedRole]:
    """Count modules and trainable parameters by what the modules do, the most parameters first."""
    counts: dict[Role, tuple[int, int]] = {}
    for linear, count in targeted(shape, config):
        modules, parameters = counts.get(linear.role, (0, 0))
        each = config.rank * (linear.fan_in + linear.fan_out) + (linear.fan_out if config.use_dora else 0)
        counts[linear.role] = modules + count, parameters + count * each
    for block in shape.blocks:
        for tensor in targeted_experts(block.part, config):
            modules, parameters = counts.get("expert", (0, 0))
            each = tensor.experts * config.rank * (tensor.fan_in + tensor.fan_out)
            counts["expert"] = modules + block.count, parameters + block.count * each
    trained = [TrainedRole(role, *numbers) for role, numbers in counts.items()]
    return sorted(trained, key=lambda item: -item.parameters)


def weights_bytes(shape: ModelShape, config: PeftConfig) -> int:
    """Bytes of the base's weights in memory.

    bitsandbytes stores linear modules in fewer bits; biases, norms, embeddings, stacked experts and the head stay in
    the compute type.
    """
    width = WIDTH_BYTES[config.precision]
    if shape.stored is not None:
        linears = (shape.linear_parameters + shape.stacked_parameters) * shape.stored.bits / 8
        others = shape.parameters - shape.linear_parameters - shape.stacked_parameters
        return math.ceil(linears) + others * width
    linear_width = {"none": float(width), "nf4": _NF4, "int8": _INT8}[config.quantization]
    return math.ceil(shape.linear_parameters * linear_width) + (shape.parameters - shape.linear_parameters) * width


def loading_bytes(shape: ModelShape, config: PeftConfig, *, on_gpu: bool) -> int:
    """Estimate the peak while the base is loaded.

    On a CPU the file's pages count as resident while they are converted; where nothing is converted they are the
    weights. Quantising takes some more for a while.
    """
    device = platform(on_gpu=on_gpu)
    held = weights_bytes(shape, config)
    quantized = config.quantization != "none"
    converted = quantized or WIDTH_BYTES[config.precision] != shape.published_width
    mapped = shape.parameters * shape.published_width if converted and not on_gpu else 0
    quantizing = math.ceil(device.slack_loading * shape.linear_parameters * shape.published_width) if quantized else 0
    return device.overhead_bytes + held + mapped + quantizing


def estimate_loading(shape: ModelShape, config: PeftConfig, *, on_gpu: bool) -> Estimate:
    """Estimate the peak of loading the base alone: what it takes to generate with it."""
    device = platform(on_gpu=on_gpu)
    total, weights = loading_bytes(shape, config, on_gpu=on_gpu), weights_bytes(shape, config)
    return Estimate(
        total_bytes=total,
        weights_bytes=weights,
        adapter_bytes=0,
        gradients_bytes=0,
        optimizer_bytes=0,
        activations_bytes=0,
        logits_bytes=0,
        overhead_bytes=total - weights,
        low_bytes=math.floor(total * device.low),
        high_bytes=math.ceil(total * device.high),
    )


def estimate(
    shape: ModelShape,
    config: PeftConfig,
    *,
    on_gpu: bool,
    batch: Batch | None = None,
    stack: Stack = OURS,
    unsloth: UnslothHere | None = None,
    available_bytes: int | None = None,
) -> Estimate:
    """Estimate the peak of loading and training.

    Args:
        shape: The model.
        config: The configuration.
        on_gpu: Whether it trains on a CUDA GPU or on the CPU.
        batch: The largest forward pass, if more is known of the data than the configuration allows.
        stack: The training program.
        unsloth: Unsloth, where the device has it: it counts for what it would hold.
        available_bytes: What is free on the device, by which Unsloth's loss chooses its chunks; plenty where that is
            not known.
    """
    fast = on_gpu and by_unsloth.holds(shape, config, unsloth)
    stack = by_unsloth.STACK if fast else stack
    device, batch = platform(on_gpu=on_gpu), batch or largest_batch(config)
    weights, trained = weights_bytes(shape, config), adapter_parameters(shape, config)
    if fast:
        layers = by_unsloth.kept_by_layers(shape, config, batch)
        held = device.overhead_bytes + weights + trained * stack.adapter_width + layers.loss_bytes
        free = max(0, available_bytes - held) if available_bytes is not None else None
        loss = by_unsloth.logits_bytes(shape, config, batch, free)
    else:
        layers = kept_by_layers(shape, config, batch, stack, on_gpu=on_gpu)
        loss = logits_bytes(shape, config, batch, stack, on_gpu=on_gpu)
    activations, logits = _at_once(layers, loss, stack)
    adapter = trained * stack.adapter_width
    # Two moments a parameter, in 8 bits (arXiv 2110.02861) or in the parameter's type.
    optimizer = trained * 2 * (1 if config.optimizer == "adamw_8bit" else stack.adapter_width)
    # Gradients take the place of activations as these are freed, unless several passes add up to one step.
    gradients = adapter if config.gradient_accumulation > 1 else max(0, adapter - activations - logits)
    adapter += reference_bytes(config, adapter)
    training = weights + adapter + gradients + optimizer + activations + logits
    if fast:
        # It turns expandable segments on (unsloth_zoo/__init__.py), which leave nothing that cannot be used again.
        lost = by_unsloth.workspace_bytes(shape, config)
    else:
        lost = _lost(shape, config, device, layers, adapter + optimizer)
    fixed = device.overhead_bytes + device.training_bytes + lost
    # Loading may need more than a small training run.
    overhead = max(fixed, loading_bytes(shape, config, on_gpu=on_gpu) - training)
    total = training + overhead
    return Estimate(
        total_bytes=total,
        weights_bytes=weights,
        adapter_bytes=adapter,
        gradients_bytes=gradients,
        optimizer_bytes=optimizer,
        activations_bytes=activations,
        logits_bytes=logits,
        overhead_bytes=overhead,
        low_bytes=math.floor(total * device.low),
        high_bytes=math.ceil(total * device.high),
        engine="unsloth" if fast else "transformers",
        host_bytes=by_unsloth.host_bytes(shape, config, batch) if fast else 0,
    )


def reference_bytes(config: PeftConfig, adapter_bytes: int) -> int:
    """Bytes of what an objective compares with: nothing for the base alone, a copy of an adapter that is continued."""
    return adapter_bytes if config.init_weights == "adapter" and OBJECTIVES[config.objective].refers else 0


def _at_once(layers: Layers, logits: int, stack: Stack) -> tuple[int, int]:
    """Return the bytes of activations and of logits where both together take the most.

    That is while the loss is computed, or in a layer, before there are logits or, if they went by chunks, after them.
    """
    if not stack.chunks_loss:
        return layers.peak_bytes, logits
    later = layers.peak_bytes + layers.working_bytes
    return (layers.loss_bytes, logits) if layers.loss_bytes + logits >= later else (later, 0)


def _lost(shape: ModelShape, config: PeftConfig, device: Platform, layers: Layers, trained_bytes: int) -> int:
    """Bytes that the allocator holds and cannot reuse."""
    slack = device.slack_layers if config.quantization == "none" else device.slack_quantized
    extras = layers.all_bytes - layers.plain_bytes
    plain = layers.plain_bytes - (1 - device.slack_steps) * layers.steps_bytes
    lost = slack * plain + device.slack_extras * extras + device.slack_adapters * trained_bytes
    lost += device.slack_passing * layers.passing_bytes
    if config.init_weights in DECOMPOSED:
        lost += device.slack_pissa * dense_bytes(shape, config)
    return math.ceil(lost)


def dense_bytes(shape: ModelShape, config: PeftConfig) -> int:
    """Bytes of the targets' weights in fp32, which PiSSA and its like take apart target by target."""
    return sum(4 * linear.weights * count for linear, count in targeted(shape, config))
