"""What a model is made of: its layers, their linear modules, and what each keeps of a token for the backward pass.

`domain.models.architectures` builds these from a config.json; the memory estimate reads them. H is the hidden size.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

# What the input of a linear module is. It has to be kept until the backward pass:
#   a shared tensor ("attention", "mlp") that several modules read and nothing else keeps,
#   "kept", a tensor that another operation of the layer keeps anyway, or "own", a tensor only this module reads.
Input = Literal["attention", "mlp", "kept", "own"]
_WIDTHS = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Linear:
    """A linear module: what adapters sit on and quantisation stores in fewer bits.

    Attributes:
        path: Its name within the layer, e.g. `self_attn.q_proj`.
        fan_in: Input features.
        fan_out: Output features.
        bias: Whether it has one; biases are never quantised.
        reads: Who else keeps its input.
    """

    path: str
    fan_in: int
    fan_out: int
    bias: bool = False
    reads: Input = "own"

    @property
    def weights(self) -> int:
        """Elements of the weight matrix."""
        return self.fan_in * self.fan_out


@dataclass(frozen=True)
class Kept:
    """Elements that one layer keeps of one token for the backward pass. Adapters are left out.

    Attributes:
        fp32: Kept in four bytes for every compute type, such as the inputs of norms that compute in fp32.
        plain: Kept in the compute type.
        masked: More in the compute type when an attention mask is passed: SDPA is then given keys and values
            repeated to all heads (transformers, integrations/sdpa_attention.py, `use_gqa_in_sdpa`).
        attentions: Attention operations; each keeps its own copy of a mask of T × T elements a row.
        squares: Matrices of T × T elements a row, of all heads, that are kept where attention cannot run through a
            fused kernel: on a CPU with dropout on the attention weights, which are then kept before it and after,
            beside what drops them.
    """

    fp32: int = 0
    plain: int = 0
    masked: int = 0
    attentions: int = 0
    squares: int = 0

    def __add__(self, other: "Kept") -> "Kept":
        return Kept(
            self.fp32 + other.fp32,
            self.plain + other.plain,
            self.masked + other.masked,
            self.attentions + other.attentions,
            self.squares + other.squares,
        )


@dataclass(frozen=True)
class Part:
    """A part of a layer; parts add up to a layer.

    Attributes:
        others: Parameters outside linear modules: norms, routers, convolutions.
        stacked: Parameters of experts stacked in one tensor, which is no linear module: neither adapters nor
            bitsandbytes' quantisation reach it (transformers 5, e.g. `mlp.experts.gate_up_proj`).
    """

    linears: tuple[Linear, ...] = ()
    others: int = 0
    stacked: int = 0
    kept: Kept = Kept()

    def __add__(self, other: "Part") -> "Part":
        return Part(
            self.linears + other.linears,
            self.others + other.others,
            self.stacked + other.stacked,
            self.kept + other.kept,
        )

    @property
    def parameters(self) -> int:
        """All of them, biases included."""
        biases = sum(linear.fan_out for linear in self.linears if linear.bias)
        return sum(linear.weights for linear in self.linears) + biases + self.others + self.stacked


@dataclass(frozen=True)
class Block:
    """Layers of one kind.

    Attributes:
        container: Path of the list that they are in, e.g. `model.layers`.
        indexes: Their places in it.
        passed: Whether text passes through them; a vision tower is held and adapted, but never computes.
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
        blocks: Its layers, by kind.
        embedding_parameters: Token and learned position embeddings.
        head_parameters: The output head, 0 where it is the embedding itself.
        other_parameters: What belongs to no layer, e.g. the last norm.
        loose_linears: Linear modules outside the layers, e.g. a projection behind the embedding.
        adapts_experts: Whether PEFT puts adapters on the stacked experts when asked for all linear modules or for the
            experts' names of transformers 4; what that keeps in memory is not known here.
        rough: Whether a layer's kernels differ so much in what they keep that only a wide range can be given.
        softcapped: Whether the logits pass through a tanh, which keeps another copy of them.
        stored: How the weights are quantised as published, or None.
        dtype: What the config says the weights are published in, e.g. `bfloat16`, or None.
        obstacle: Why the engine cannot load this family, or None.
    """

    model_type: str
    hidden: int
    vocab: int
    max_positions: int | None
    tied_embeddings: bool
    blocks: tuple[Block, ...]
    embedding_parameters: int
    head_parameters: int
    other_parameters: int
    loose_linears: tuple[Linear, ...] = ()
    adapts_experts: bool = False
    rough: bool = False
    softcapped: bool = False
    stored: Stored | None = None
    dtype: str | None = None
    obstacle: str | None = None

    @property
    def published_width(self) -> int:
        """Bytes of a parameter as published; two where the config does not say, as nearly all have."""
        return _WIDTHS.get(self.dtype or "", 2)

    @property
    def layers(self) -> int:
        """Layers that text passes through."""
        return sum(block.count for block in self.blocks if block.passed)

    @property
    def linear_parameters(self) -> int:
        """Elements of the linear modules' weights, which quantisation stores in fewer bits."""
        in_layers = sum(block.count * linear.weights for block in self.blocks for linear in block.part.linears)
        return in_layers + sum(linear.weights for linear in self.loose_linears)

    @property
    def stacked_parameters(self) -> int:
        """Elements of stacked experts."""
        return sum(block.count * block.part.stacked for block in self.blocks)

    @property
    def parameters(self) -> int:
        """All parameters, exactly."""
        loose = Part(self.loose_linears).parameters
        in_layers = sum(block.count * block.part.parameters for block in self.blocks)
        return in_layers + loose + self.embedding_parameters + self.head_parameters + self.other_parameters

    def linears(self) -> Iterator[tuple[Linear, int]]:
        """Yield every kind of linear module but the head, with how many there are of it."""
        for block in self.blocks:
            for linear in block.part.linears:
                yield linear, block.count
        for linear in self.loose_linears:
            yield linear, 1
