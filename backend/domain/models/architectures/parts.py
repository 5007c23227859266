"""The parts that layers are put together from: norms, attentions, MLPs, experts.

What each keeps for the backward pass is what torch's autograd saves when transformers' code of that part runs with
a frozen base; tests/engine/test_saved_activations.py compares both, family by family.
"""

from dataclasses import dataclass

from domain.models.architectures.reader import ConfigReader, NotKnown
from domain.models.shape import Input, Kept, Linear, Part

# Elements an activation function keeps for each of its inputs: torch's fused ones keep the input, ReLU its output;
# `gelu_new` is written out in transformers/activations.py (NewGELUActivation) and keeps every factor.
_KEPT_BY_ACTIVATION = {
    "silu": 1,
    "swish": 1,
    "gelu": 1,
    "gelu_pytorch_tanh": 1,
    "gelu_new": 4,
    "relu": 1,
    "relu2": 1,
}


def activation_keeps(name: object) -> int:
    """Return how many elements an activation function keeps for each of its inputs.

    Raises:
        NotKnown: The function is not one whose backward pass is known here.
    """
    if not isinstance(name, str) or name not in _KEPT_BY_ACTIVATION:
        raise NotKnown(f"the activation function {name!r}"[:200])
    return _KEPT_BY_ACTIVATION[name]


def dropout(reader: ConfigReader, name: str, size: int) -> Part:
    """A dropout of the model's own on `size` features of a token: what drops them is kept."""
    return Part(kept=Kept(plain=size)) if is_positive(reader.value(name)) else Part()


def is_positive(value: object) -> bool:
    """Tell whether a probability is above 0.

    Raises:
        NotKnown: It is no number.
    """
    if value is not None and (not isinstance(value, int | float) or isinstance(value, bool)):
        raise NotKnown("a probability that is no number")
    return value is not None and value > 0


def rms_norm(size: int, *, elements: int | None = None) -> Part:
    """A norm with one weight a feature that computes in fp32 and keeps its input so.

    Args:
        size: Its weights.
        elements: Features of a token that pass through it, if it is applied to several heads with one weight.
    """
    return Part(others=size, kept=Kept(fp32=elements if elements is not None else size))


def layer_norm(size: int, *, bias: bool = True, weight: bool = True) -> Part:
    """torch's LayerNorm: computes in the type of its input and keeps it."""
    return Part(others=size * (weight + bias), kept=Kept(plain=size))


@dataclass(frozen=True)
class Heads:
    """An attention's dimensions.

    Attributes:
        heads: Query heads.
        kv_heads: Key and value heads.
        head_dim: Features of one.
        dropped: Whether the attention weights pass through dropout.
    """

    heads: int
    kv_heads: int
    head_dim: int
    dropped: bool = False

    @property
    def query(self) -> int:
        """Features of all query heads."""
        return self.heads * self.head_dim

    @property
    def key(self) -> int:
        """Features of all key heads; the value heads have as many."""
        return self.kv_heads * self.head_dim

    @property
    def kept(self) -> Kept:
        """Queries and keys after rotation, values, the output, and the log-sum of each head.

        Keys and values are repeated to all heads where a mask is passed.
        """
        return Kept(
            fp32=self.heads,
            plain=2 * self.query + 2 * self.key,
            masked=2 * (self.query - self.key),
            attentions=1,
            squares=3 * self.heads if self.dropped else 0,
        )

    @property
    def kept_fused(self) -> Kept:
        """The same where one projection makes all three: the values are a view of its output, kept whole.

        Unless they are repeated, which makes a copy.
        """
        extra = self.query + self.key
        repeated = extra if self.heads > self.kv_heads else 0
        return self.kept + Kept(plain=extra, masked=-repeated)


def read_heads(reader: ConfigReader, *, hidden: int) -> Heads:
    """Read an attention's dimensions under the names that most families use.

    Raises:
        NotKnown: The config does not say, or no model can be made so.
    """
    heads = reader.size("num_attention_heads", "n_head")
    kv_heads = reader.size("num_key_value_heads", default=heads)
    if heads % kv_heads:
        raise NotKnown(f"{heads} heads do not share {kv_heads} key heads")
    dropped = is_positive(reader.value("attention_dropout", reader.value("attn_pdrop")))
    return Heads(heads, kv_heads, reader.size("head_dim", default=max(hidden // heads, 1)), dropped)


def separate_attention(
    hidden: int,
    heads: Heads,
    *,
    prefix: str = "self_attn",
    names: tuple[str, str, str, str] = ("q_proj", "k_proj", "v_proj", "o_proj"),
    bias: bool = False,
    output_bias: bool = False,
    output_reads: Input = "kept",
) -> Part:
    """Attention with a projection each for queries, keys, values and output.

    Args:
        output_reads: `own` where the attention's output is copied before the last projection reads it.
    """
    query, key, value, output = (f"{prefix}.{name}" for name in names)
    return Part(
        (
            Linear(query, hidden, heads.query, bias, "attention"),
            Linear(key, hidden, heads.key, bias, "attention"),
            Linear(value, hidden, heads.key, bias, "attention"),
            Linear(output, heads.query, hidden, output_bias, output_reads),
        ),
        kept=heads.kept,
    )


def fused_attention(
    hidden: int, heads: Heads, names: tuple[str, str], *, bias: bool = False, output_bias: bool = False
) -> Part:
    """Attention with one projection for queries, keys and values."""
    width = heads.query + 2 * heads.key
    return Part(
        (
            Linear(names[0], hidden, width, bias, "attention"),
            Linear(names[1], heads.query, hidden, output_bias, "own"),
        ),
        kept=heads.kept_fused,
    )


def gated_mlp(
    hidden: int,
    width: int,
    activation: object,
    *,
    names: tuple[str, str, str] = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    bias: bool = False,
) -> Part:
    """down(act(gate(x)) · up(x)): keeps what the activation keeps, its output and the up projection."""
    gate, up, down = names
    return Part(
        (
            Linear(gate, hidden, width, bias, "mlp"),
            Linear(up, hidden, width, bias, "mlp"),
            Linear(down, width, hidden, bias, "own"),
        ),
        kept=Kept(plain=width * (activation_keeps(activation) + 2)),
    )


def fused_gated_mlp(hidden: int, width: int, activation: object, names: tuple[str, str], *, bias: bool = False) -> Part:
    """The same with gate and up in one projection."""
    return Part(
        (
            Linear(names[0], hidden, 2 * width, bias, "mlp"),
            Linear(names[1], width, hidden, bias, "own"),
        ),
        kept=Kept(plain=width * (activation_keeps(activation) + 2)),
    )


def plain_mlp(
    hidden: int, width: int, activation: object, names: tuple[str, str], *, bias: bool = True, reads: Input = "mlp"
) -> Part:
    """down(act(up(x))).

    Args:
        reads: Who else keeps the input; in a parallel block the attention reads the same.
    """
    # ReLU keeps its output, which is what the second module reads.
    second: Input = "kept" if activation == "relu" else "own"
    return Part(
        (Linear(names[0], hidden, width, bias, reads), Linear(names[1], width, hidden, bias, second)),
        kept=Kept(plain=width * activation_keeps(activation)),
    )


def experts(
    hidden: int, width: int, *, count: int, active: int, activation: object, bias: bool = False, router: int
) -> Part:
    """Experts with gated MLPs, stacked in two tensors, and their router's parameters.

    Args:
        width: An expert's.
        active: Experts a token passes through; the output of each is kept, since it is weighed.
    """
    weights = count * (3 * hidden * width + (2 * width + hidden if bias else 0))
    kept = active * ((activation_keeps(activation) + 2) * width + hidden)
    return Part(others=router, stacked=weights, kept=Kept(plain=kept))
