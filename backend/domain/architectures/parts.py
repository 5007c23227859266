"""The parts that layers are put together from: norms, attentions, MLPs, experts.

What each keeps for the backward pass is what torch's autograd saves when transformers' code of that part runs with
a frozen base; tests/engine/test_saved_activations.py compares both, family by family.
"""

from dataclasses import dataclass

from domain.architectures.reader import ConfigReader, NotKnown
from domain.model_shape import Input, Kept, Linear, Part

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
    """

    heads: int
    kv_heads: int
    head_dim: int

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
        """Queries and keys after rotation, values, the output; keys and values repeated where a mask is passed."""
        return Kept(
            plain=2 * self.query + 2 * self.key,
            masked=2 * (self.query - self.key),
            attentions=1,
        )


def read_heads(reader: ConfigReader, *, hidden: int) -> Heads:
    """Read an attention's dimensions under the names that most families use.

    Raises:
        NotKnown: The config does not say, or no model can be made so.
    """
    heads = reader.size("num_attention_heads", "n_head")
    kv_heads = reader.size("num_key_value_heads", default=heads)
    if heads % kv_heads:
        raise NotKnown(f"{heads} heads do not share {kv_heads} key heads")
    return Heads(heads, kv_heads, reader.size("head_dim", default=max(hidden // heads, 1)))


def separate_attention(
    hidden: int,
    heads: Heads,
    *,
    prefix: str = "self_attn",
    names: tuple[str, str, str, str] = ("q_proj", "k_proj", "v_proj", "o_proj"),
    bias: bool = False,
    output_bias: bool = False,
) -> Part:
    """Attention with a projection each for queries, keys, values and output."""
    query, key, value, output = (f"{prefix}.{name}" for name in names)
    return Part(
        (
            Linear(query, hidden, heads.query, bias, "attention"),
            Linear(key, hidden, heads.key, bias, "attention"),
            Linear(value, hidden, heads.key, bias, "attention"),
            Linear(output, heads.query, hidden, output_bias, "kept"),
        ),
        kept=heads.kept,
    )


def fused_attention(
    hidden: int, heads: Heads, names: tuple[str, str], *, bias: bool = False, output_bias: bool = False
) -> Part:
    """Attention with one projection for queries, keys and values.

    The values are a view of the projection's output, which is therefore kept whole.
    """
    width = heads.query + 2 * heads.key
    return Part(
        (
            Linear(names[0], hidden, width, bias, "attention"),
            Linear(names[1], heads.query, hidden, output_bias, "kept"),
        ),
        kept=heads.kept + Kept(plain=heads.query + heads.key),
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
        active: Experts a token passes through; each gets a copy of the token and its output is weighed.
    """
    weights = count * (3 * hidden * width + (2 * width + hidden if bias else 0))
    kept = active * ((activation_keeps(activation) + 3) * width + 2 * hidden)
    return Part(others=router, stacked=weights, kept=Kept(plain=kept))
