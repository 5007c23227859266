"""What a forward pass leaves in memory for the backward pass.

Symbols: B rows, T tokens a row, L layers, H hidden size, V vocabulary, r rank, a bytes of the compute type.
What a layer itself keeps was read off the layer (engine/outline.py); what adapters add to it is counted here.
tests/engine/test_saved_activations.py compares both with what autograd really holds, family by family.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from domain.memory.loss_chunks import chunks, most_tokens
from domain.models.shape import Block, Linear, ModelShape, Part, Stacked
from domain.peft.config import PeftConfig
from domain.peft.objectives import SPECS as OBJECTIVES
from domain.peft.targets import is_adapted

WIDTH_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Stack:
    """How a training program differs from others in what it keeps.

    Attributes:
        adapter_width: Bytes of an adapter's numbers, gradients included. Four in our engine: over a 16-bit base, PEFT
            keeps adapters in fp32 (`autocast_adapter_dtype=True`).
        loss_width: Bytes a logit at the peak, where all are there at once. Twelve by default: at the first step of the
            backward pass three fp32 tensors of the logits' size are there: log-softmax's output, the gradient of the
            loss, and log-softmax's gradient (ATen, `_log_softmax_backward_data`).
        chunks_loss: Whether the loss goes by chunks of tokens, as in our engine (engine/loss.py), in a class that lets
            it.
        makes_masks: Whether a batch of rows of different length needs a mask of T × T.
    """

    adapter_width: int = 4
    loss_width: int = 12
    makes_masks: bool = True
    chunks_loss: bool = False


OURS = Stack(chunks_loss=True)


@dataclass(frozen=True)
class Batch:
    """One forward pass.

    Attributes:
        rows: B.
        length: T, the longest row's; the others are padded to it.
        masked: Whether an attention mask is passed: rows of different length, or several rows in one sequence.
        trained: Part of the positions whose logits are computed, 0..1.
        even: Whether every pass of the run is as large as this one.
    """

    rows: int
    length: int
    masked: bool
    trained: float = 1.0
    even: bool = False

    @property
    def tokens(self) -> int:
        """B · T."""
        return self.rows * self.length


def largest_batch(config: PeftConfig) -> Batch:
    """Return the largest forward pass a configuration allows: every row as long as is permitted.

    Rows of one batch are rarely equally long, so a batch of several is assumed to need a mask; one row never does.
    """
    rows = config.batch_size * OBJECTIVES[config.objective].sequences
    return Batch(rows, config.max_seq_length, config.packing or rows > 1)


def targeted(shape: ModelShape, config: PeftConfig) -> list[tuple[Linear, int]]:
    """Return the linear modules that the configuration adapts, with how many there are of each."""
    in_blocks = [pair for block in shape.blocks for pair in targeted_in(block, config)]
    return in_blocks + [(linear, 1) for linear in _targeted_outside(shape, config)]


def missing_targets(shape: ModelShape, names: str | Sequence[str]) -> list[str]:
    """Return the target modules that name no linear module of the model, by the engine's rule for names."""
    if isinstance(names, str):
        return []
    return [name for name in names if not _is_there(shape, name)]


def _is_there(shape: ModelShape, name: str) -> bool:
    in_layers = any(_matching(block, linear.path, name) for block in shape.blocks for linear in block.part.linears)
    return in_layers or any(_means(name, linear.path) for linear in shape.outside.linears)


def targeted_in(block: Block, config: PeftConfig) -> list[tuple[Linear, int]]:
    """Return the adapted linear modules of a block's layers, with how many there are of each."""
    targets = []
    for linear in block.part.linears:
        named = 0
        if config.target_modules != "all-linear":
            named = max(_matching(block, linear.path, wanted) for wanted in config.target_modules)
        if is_adapted(config, linear.role, named=named > 0):
            # A name may mean some of the layers; what the role decides holds for all of them.
            everywhere = config.target_modules == "all-linear" or (
                linear.role == "expert" and config.target_experts is True
            )
            targets.append((linear, block.count if everywhere else named))
    return targets


def _targeted_outside(shape: ModelShape, config: PeftConfig) -> list[Linear]:
    names = () if config.target_modules == "all-linear" else config.target_modules
    return [
        linear
        for linear in shape.outside.linears
        if is_adapted(config, linear.role, named=any(_means(name, linear.path) for name in names))
    ]


def targeted_experts(part: Part, config: PeftConfig) -> list[Stacked]:
    """Return a layer's stacked experts that the configuration adapts."""
    return [stacked for stacked in part.stacked if stacked.reached] if config.target_experts is True else []


def _means(name: str, path: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _matching(block: Block, path: str, wanted: str) -> int:
    """Count the layers of a block in which a name means a module. A name is the end of a path, from a dot on."""
    if _means(wanted, path):
        return block.count
    if not wanted.endswith(f".{path}"):
        return 0
    head, dot, index = wanted.removesuffix(f".{path}").rpartition(".")
    if not _is_one_of(index, block.indexes):
        return 0
    return 1 if not dot or head == block.container or block.container.endswith(f".{head}") else 0


def _is_one_of(text: str, indexes: tuple[int, ...]) -> bool:
    """Tell whether a text is one of the numbers, as written in a path. The text may have any length."""
    return text.isdecimal() and len(text) < 9 and str(int(text)) == text and int(text) in indexes


@dataclass(frozen=True)
class Layers:
    """Bytes that layers keep, adapters included.

    Attributes:
        all_bytes: Of every layer as it is computed, whether it is kept or computed again. The sums W + B·A of stacked
            experts are left out: tensors so large are mapped on their own, and their memory goes back as it was.
        plain_bytes: The same without dropout and DoRA.
        peak_bytes: What is there at once. Without checkpointing, all of it; with it, the input of each layer (Chen et
            al., arXiv 1604.06174, with a checkpoint a layer as transformers sets them), and one layer as it is
            computed again.
        loss_bytes: What is there while the loss is computed. With checkpointing no layer is computed again yet.
        working_bytes: What is there at most beside `peak_bytes` while a layer computes, forward or backward. In a layer
            that is not the last one the layers behind it keep nothing yet, or no more.
        passing_bytes: What the tensors that are there for a while take in a layer beyond all that it keeps, of all
            layers together but those that compute token by token; 0 in most.
        steps_bytes: What of `plain_bytes` is in layers that compute token by token.
    """

    all_bytes: int
    plain_bytes: int
    peak_bytes: int
    loss_bytes: int
    working_bytes: int
    passing_bytes: int = 0
    steps_bytes: int = 0


def kept_by_layers(shape: ModelShape, config: PeftConfig, batch: Batch, stack: Stack = OURS, *, on_gpu: bool) -> Layers:
    """Count what all layers keep."""
    plain = config.model_copy(update={"dropout": 0.0, "use_dora": False})
    kept, kept_plainly = (
        [
            (block.count, _kept_by_block(block, settings, batch, stack, on_gpu=on_gpu))
            for block in shape.blocks
            if block.passed
        ]
        for settings in (config, plain)
    )
    outside = _kept_by_part(shape.outside, config, batch, stack, on_gpu=on_gpu)
    everything, plainly = (sum(count * size for count, size in sizes) + outside for sizes in (kept, kept_plainly))
    blocks = [block for block in shape.blocks if block.passed]
    sums = sum(block.count * _sums_of_stacks(block.part, config) for block in blocks)
    sizes = [size for _, size in kept]
    held = sizes
    if config.gradient_checkpointing:
        held = [round(block.part.inputs * batch.tokens * WIDTH_BYTES[config.precision]) for block in blocks]
    at_loss = outside + sum(block.count * size for block, size in zip(blocks, held, strict=True))
    peak = at_loss + (max(sizes, default=0) if config.gradient_checkpointing else 0)
    most, beyond, steps = peak, 0, 0
    for block, size, (_, plain_size) in zip(blocks, sizes, kept_plainly, strict=True):
        if block.part.by_token:
            steps += block.count * plain_size
        else:
            beyond += block.count * max(0, _passing(block, config, batch, on_gpu=on_gpu) - plain_size)
        # A layer without checkpointing is among those that are held.
        own = size if config.gradient_checkpointing else 0
        here = outside + _held_at(block, blocks, held) + own + _working(block, config, batch, on_gpu=on_gpu)
        most = max(most, here)
    return Layers(everything - sums, plainly - sums, peak, at_loss, most - peak, beyond, steps)


def _held_at(block: Block, blocks: list[Block], held: list[int]) -> int:
    """Bytes that the layers hold up to a block's last one, itself included.

    Lists of layers are passed in the order in which they stand; layers of one list by their places.
    """
    containers = list(dict.fromkeys(other.container for other in blocks))
    place, last = containers.index(block.container), max(block.indexes)
    total = 0
    for other, size in zip(blocks, held, strict=True):
        if other.container == block.container:
            total += size * sum(index <= last for index in other.indexes)
        elif containers.index(other.container) < place:
            total += size * other.count
    return total


def _working(block: Block, config: PeftConfig, batch: Batch, *, on_gpu: bool) -> int:
    """Bytes that one layer of a block computes with: its own tensors, or an adapted module's where those are more.

    Where stacked experts are adapted, the gradient of the largest W + B·A is there as well.
    """
    gradient = max((tensor.weights for tensor in targeted_experts(block.part, config)), default=0)
    own = max(_passing(block, config, batch, on_gpu=on_gpu), adapters_working(block, config, batch))
    return own + gradient * WIDTH_BYTES[config.precision]


def _passing(block: Block, config: PeftConfig, batch: Batch, *, on_gpu: bool) -> int:
    """Bytes that one layer of a block computes with beside what it keeps, adapters left out."""
    passing = block.part.passing if on_gpu else block.part.passing_unfused
    return passing.bytes(WIDTH_BYTES[config.precision], batch.rows, block.part.padded(batch.length))


def adapters_working(block: Block, config: PeftConfig, batch: Batch) -> int:
    """Bytes that an adapted module computes with: some tensors as wide as the widest linear module.

    Source: the profiler's peaks beside what is kept, of layers of two proportions: 0.9 to 2 of them; with DoRA, whose
    forward pass scales each output, 6 to 7.
    """
    widest = max((max(linear.fan_in, linear.fan_out) for linear in block.part.linears), default=0)
    return (7 if config.use_dora else 2) * widest * batch.tokens * WIDTH_BYTES[config.precision]


def _kept_by_block(block: Block, config: PeftConfig, batch: Batch, stack: Stack, *, on_gpu: bool) -> int:
    """Bytes that one layer of a block keeps."""
    own = _kept_by_part(block.part, config, batch, stack, on_gpu=on_gpu)
    experts = _kept_by_experts(block.part, config, batch, stack)
    return own + experts + _kept_by_adapters(block, config, batch, stack, on_gpu=on_gpu)


def _kept_by_part(part: Part, config: PeftConfig, batch: Batch, stack: Stack, *, on_gpu: bool) -> int:
    """Bytes that a layer keeps without adapters; a row longer than its attention looks back needs a mask as well."""
    windowed = part.window is not None and batch.length >= part.window
    masked = (batch.masked or windowed) and stack.makes_masks
    passes = part.kept if on_gpu else part.unfused
    return passes.of(WIDTH_BYTES[config.precision], masked=masked).bytes(batch.rows, part.padded(batch.length))


def _kept_by_adapters(block: Block, config: PeftConfig, batch: Batch, stack: Stack, *, on_gpu: bool) -> int:
    """Bytes that the adapters of one layer keep."""
    return kept_by_peft([linear for linear, _ in targeted_in(block, config)], config, batch, stack, on_gpu=on_gpu)


def kept_by_peft(targets: list[Linear], config: PeftConfig, batch: Batch, stack: Stack, *, on_gpu: bool) -> int:
    """Count the bytes that PEFT's layers on some modules keep: their input as they see it, and A's output.

    Source: PEFT, tuners/lora/layer.py, `Linear.forward`: `lora_B(lora_A(dropout(x)))` with x in the adapter's type.
    """
    if config.dropout > 0:
        # The dropped input, and what drops it: a mask of one byte on a GPU, one in fp32 on a CPU (ATen, Dropout.cpp).
        per_token = sum((stack.adapter_width + (1 if on_gpu else 4)) * linear.fan_in for linear in targets)
    elif WIDTH_BYTES[config.precision] < stack.adapter_width:
        per_token = sum(stack.adapter_width * linear.fan_in for linear in targets)  # each makes its own fp32 copy
    else:
        shared = {linear.reads: linear.fan_in for linear in targets if linear.reads not in ("own", "kept")}
        own = sum(linear.fan_in for linear in targets if linear.reads == "own")
        per_token = stack.adapter_width * (sum(shared.values()) + own)
    per_token += stack.adapter_width * config.rank * len(targets)
    if not config.use_dora:
        return batch.tokens * per_token
    return batch.tokens * (per_token + _dora_per_token(targets, config, stack))


def _kept_by_experts(part: Part, config: PeftConfig, batch: Batch, stack: Stack) -> int:
    """Bytes that adapters on one layer's stacked experts keep.

    PEFT computes W + B·A of all experts on each pass, which the products keep, and with it their inputs, as for any
    weight that a gradient goes to. A and B are copied to the weight's type where they are held in another.

    Source: PEFT 0.21, tuners/lora/layer.py, `ParamWrapper._activate_lora` and `_LoraFactorsProxy`.
    """
    targets = targeted_experts(part, config)
    if not targets:
        return 0
    width = WIDTH_BYTES[config.precision]
    copies = sum(width * config.rank * tensor.experts * (tensor.fan_in + tensor.fan_out) for tensor in targets)
    inputs = part.by_experts.of(width, masked=batch.masked and stack.makes_masks).bytes(batch.rows, batch.length)
    return _sums_of_stacks(part, config) + (copies if width != stack.adapter_width else 0) + inputs


def _sums_of_stacks(part: Part, config: PeftConfig) -> int:
    """Bytes of W + B·A of one layer's stacked experts."""
    return sum(WIDTH_BYTES[config.precision] * tensor.weights for tensor in targeted_experts(part, config))


def _dora_per_token(targets: list[Linear], config: PeftConfig, stack: Stack) -> int:
    """Bytes a token that DoRA keeps beside LoRA: the base's output and the adapter's, which the magnitudes multiply.

    Source: PEFT, tuners/lora/dora.py, `DoraLinearLayer.forward`; no dense weight (engine/dora.py).
    """
    base = stack.adapter_width if config.dropout > 0 else WIDTH_BYTES[config.precision]
    return sum((base + stack.adapter_width) * linear.fan_out for linear in targets)


def logits_bytes(
    shape: ModelShape, config: PeftConfig, batch: Batch, stack: Stack = OURS, *, on_gpu: bool = False
) -> int:
    """Bytes of logits and loss at their peak. Capped logits keep their tanh as well.

    By chunks there are the logits and the scores in fp32 of one chunk, which become its gradient (in 16 bits a copy of
    it has the logits' type), and the hidden states of all trained tokens with their gradient. Tokens that are just too
    many for one chunk come in two that are half as large. So a run of mixed lengths is taken to fill a chunk.
    """
    positions, width = batch.rows * max(1, round(batch.length * batch.trained)), WIDTH_BYTES[config.precision]
    if not (stack.chunks_loss and shape.chunked_loss):
        return round(positions * shape.vocab * (stack.loss_width + width * shape.logits_kept))
    most = most_tokens(shape.vocab, on_gpu=on_gpu)
    chunk = max(high - low for low, high in chunks(positions, most)) if batch.even else min(positions, most)
    per_logit = (8 if width == 4 else 4 + 2 * width) + 2 * width * shape.logits_kept
    return round(chunk * shape.vocab * per_logit) + 2 * positions * shape.hidden * width
