"""What a model is made of: its layers, their linear modules, and what each keeps of a token for the backward pass.

An engine reads it off transformers' own class (engine/outline.py); the memory estimate computes with it. H is the
hidden size, T the tokens of a row.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

# What a linear module does. Those of `ADAPTED` get adapters when all linear modules are asked for. The others:
#   router     it chooses experts, or weighs them,
#   tower      it belongs to the part for pictures or sound, through which no text passes,
#   unreached  no gradient reaches it, as where its output only chooses what others attend to,
#   refused    PEFT does not put adapters there,
#   bypassed   it is not called: its weight is read past it, as in a state space, or text does not come there,
#   special    its class computes something else than a product with its weight.
Role = Literal[
    "attention", "mlp", "state_space", "shared_expert", "expert", "other",
    "router", "tower", "unreached", "refused", "bypassed", "special",
]  # fmt: skip
ADAPTED: tuple[Role, ...] = ("attention", "mlp", "state_space", "shared_expert", "expert", "other")
# bitsandbytes stores no other classes than torch's own, and what reads a weight past its module cannot read four bits.
IN_FULL: tuple[Role, ...] = ("bypassed", "special")
_WIDTHS = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Linear:
    """A linear module: what adapters sit on and quantisation stores in fewer bits.

    Attributes:
        path: Its name within the layer, e.g. `self_attn.q_proj`.
        fan_in: Input features.
        fan_out: Output features.
        bias: Whether it has one; biases are never quantised.
        reads: Who else keeps its input until the backward pass: `own` if nobody does, `kept` if another operation of
            the layer does, or else the path of the first of several modules that read the same tensor.
        role: What it does.
    """

    path: str
    fan_in: int
    fan_out: int
    bias: bool = False
    reads: str = "own"
    role: Role = "other"

    @property
    def weights(self) -> int:
        """Elements of the weight matrix."""
        return self.fan_in * self.fan_out


@dataclass(frozen=True)
class Stacked:
    """Experts' matrices in one tensor, which is no linear module: bitsandbytes does not reach it.

    Attributes:
        path: The parameter's name within the layer, e.g. `mlp.experts.gate_up_proj`.
        experts: How many matrices there are.
        fan_in: Input features of each.
        fan_out: Output features of each.
        reached: Whether a gradient reaches it, so that an adapter on it can learn.
    """

    path: str
    experts: int
    fan_in: int
    fan_out: int
    reached: bool = True

    @property
    def weights(self) -> int:
        """Elements of the tensor."""
        return self.experts * self.fan_in * self.fan_out


@dataclass(frozen=True)
class Kept:
    """What is kept for the backward pass, adapters left out.

    Attributes:
        token: Bytes for each token.
        square: Bytes for each of a row's T × T.
    """

    token: float = 0.0
    square: float = 0.0

    def bytes(self, rows: int, length: int) -> int:
        """Count the bytes of B rows of T tokens."""
        return round(rows * length * (self.token + length * self.square))


@dataclass(frozen=True)
class Passes:
    """What is kept in the kinds of forward pass that differ in it.

    Attributes:
        half: In a compute type of two bytes, without an attention mask.
        half_masked: With one: rows of different length, or several rows in one sequence.
        full: In fp32, without a mask.
        full_masked: In fp32, with one.
    """

    half: Kept = Kept()
    half_masked: Kept = Kept()
    full: Kept = Kept()
    full_masked: Kept = Kept()

    def of(self, width: int, *, masked: bool) -> Kept:
        """Return one of them, by the bytes of the compute type."""
        if width == 2:
            return self.half_masked if masked else self.half
        return self.full_masked if masked else self.full


@dataclass(frozen=True)
class Passing:
    """What a layer computes with beside all that it keeps, adapters left out.

    Each is of the moments of the forward and of the backward pass at which the most is there, at one length or another.

    Attributes:
        half: In a compute type of two bytes.
        full: In fp32.
    """

    half: tuple[Kept, ...] = ()
    full: tuple[Kept, ...] = ()

    def bytes(self, width: int, rows: int, length: int) -> int:
        """Count the most bytes that are there at once, by the bytes of the compute type, of B rows of T tokens."""
        return max((moment.bytes(rows, length) for moment in (self.half if width == 2 else self.full)), default=0)


def highest(moments: Iterable[Kept]) -> tuple[Kept, ...]:
    """Return those of some moments at which the most is there at some length, the shortest length's first."""
    found: list[Kept] = []
    for moment in sorted(moments, key=lambda moment: (moment.square, moment.token)):
        # Bytes a token are token + T · square: lines in T, the flattest first, of which the upper hull counts.
        while found and moment.token >= found[-1].token:
            found.pop()
        while len(found) > 1 and _meet(found[-2], moment) <= _meet(found[-2], found[-1]):
            found.pop()
        found.append(moment)
    return tuple(found)


def _meet(flatter: Kept, steeper: Kept) -> float:
    """Return the length from which on the steeper one is larger."""
    return (flatter.token - steeper.token) / (steeper.square - flatter.square)


@dataclass(frozen=True)
class Part:
    """A layer, or what belongs to none.

    Attributes:
        others: Parameters outside linear modules and stacked experts: norms, routers, convolutions.
        inputs: Elements a token of its input, which checkpointing keeps.
        window: Tokens that its attention looks back; a longer row needs a mask. None for all of them.
        chunk: Tokens that it computes at a time. A row is padded to a multiple of it.
        by_token: Whether it computes token by token and keeps tensors of each.
        kept: By attention as a GPU computes it.
        unfused: The same on a CPU, whose fused attention knows no dropout on the attention weights.
        by_experts: What is kept beside that where a gradient goes to stacked experts, their weights left out.
        passing: What is there for a while only, with attention as a GPU computes it.
        passing_unfused: The same on a CPU.
    """

    linears: tuple[Linear, ...] = ()
    stacked: tuple[Stacked, ...] = ()
    others: int = 0
    inputs: float = 0.0
    window: int | None = None
    chunk: int = 1
    by_token: bool = False
    kept: Passes = Passes()
    unfused: Passes = Passes()
    by_experts: Passes = Passes()
    passing: Passing = Passing()
    passing_unfused: Passing = Passing()

    def padded(self, length: int) -> int:
        """Return the tokens of a row of that length as the layer computes it."""
        return -(-length // self.chunk) * self.chunk

    @property
    def parameters(self) -> int:
        """All of them, biases included."""
        biases = sum(linear.fan_out for linear in self.linears if linear.bias)
        return sum(linear.weights for linear in self.linears) + biases + self.others + self.stacked_weights

    @property
    def stacked_weights(self) -> int:
        """Elements of stacked experts."""
        return sum(stacked.weights for stacked in self.stacked)


@dataclass(frozen=True)
class Block:
    """Layers of one kind.

    Attributes:
        container: Path of the list that they are in, e.g. `model.layers`.
        indexes: Their places in it.
        passed: Whether text passes through them; a vision tower is held, but never computes.
    """

    container: str
    indexes: tuple[int, ...]
    part: Part
    passed: bool = True

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.indexes)


@dataclass(frozen=True)
class Stored:
    """How a checkpoint that is already quantised holds its weights.

    Attributes:
        method: `quantization_config.quant_method`, e.g. `gptq`.
        bits: Bits a weight of the quantised modules, scales included.
    """

    method: str
    bits: float


@dataclass(frozen=True)
class ModelShape:
    """A causal language model.

    Attributes:
        family: The model type of config.json, e.g. `llama`.
        class_name: transformers' class that loads it.
        attention: `sdpa`, PyTorch's fused attention, or `eager`, the class' own.
        blocks: Its layers, by kind.
        outside: What belongs to no layer: loose linear modules, the last norm, and what is kept there.
        embedding_parameters: Token and learned position embeddings.
        head_parameters: The output head, 0 where it is the embedding itself.
        logits_kept: Copies of the logits that are kept, as where they pass through a tanh.
        chunked_loss: Whether the logits of some tokens can be computed without the others', so that a loss by chunks of
            them needs no more memory than a chunk takes (engine/logits.py).
        stored: How the weights are quantised as published, or None.
        dtype: What the config says the weights are published in, e.g. `bfloat16`, or None.
    """

    family: str
    class_name: str
    attention: Literal["sdpa", "eager"]
    hidden: int
    vocab: int
    max_positions: int | None
    tied_embeddings: bool
    blocks: tuple[Block, ...]
    outside: Part
    embedding_parameters: int
    head_parameters: int
    logits_kept: float = 0.0
    chunked_loss: bool = True
    stored: Stored | None = None
    dtype: str | None = None

    @property
    def published_width(self) -> int:
        """Bytes of a parameter as published; two where the config does not say, as nearly all have."""
        return _WIDTHS.get(self.dtype or "", 2)

    @property
    def layers(self) -> int:
        """Layers that text passes through."""
        return sum(block.count for block in self.blocks if block.passed)

    @property
    def carries_state(self) -> bool:
        """Whether layers carry a state from token to token, beside attention, and so from a row to the next in one."""
        return any(linear.role == "state_space" for linear, _ in self.linears())

    @property
    def linear_parameters(self) -> int:
        """Elements of the linear modules' weights, which quantisation stores in fewer bits."""
        return sum(linear.weights * count for linear, count in self.linears() if linear.role not in IN_FULL)

    @property
    def stacked_parameters(self) -> int:
        """Elements of stacked experts."""
        return sum(block.count * block.part.stacked_weights for block in self.blocks)

    @property
    def parameters(self) -> int:
        """All parameters, exactly."""
        in_layers = sum(block.count * block.part.parameters for block in self.blocks)
        return in_layers + self.outside.parameters + self.embedding_parameters + self.head_parameters

    @property
    def has_stacked_experts(self) -> bool:
        """Whether it has experts in one tensor that an adapter on them can teach something."""
        return any(tensor.reached for block in self.blocks for tensor in block.part.stacked)

    @property
    def has_experts(self) -> bool:
        """Whether it has experts that can be adapted, stacked ones or ones that are modules of a list."""
        return self.has_stacked_experts or any(linear.role == "expert" for linear, _ in self.linears())

    def linears(self) -> Iterator[tuple[Linear, int]]:
        """Yield every kind of linear module but the head, with how many there are of it."""
        for block in self.blocks:
            for linear in block.part.linears:
                yield linear, block.count
        for linear in self.outside.linears:
            yield linear, 1
