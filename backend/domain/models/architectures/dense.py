"""Dense decoders in Llama's manner: an attention and an MLP a layer, with variations."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from domain.models.architectures.assembly import assemble, repeated
from domain.models.architectures.parts import (
    Heads,
    fused_attention,
    fused_gated_mlp,
    gated_mlp,
    layer_norm,
    plain_mlp,
    read_heads,
    rms_norm,
    separate_attention,
)
from domain.models.architectures.reader import ConfigReader, NotKnown
from domain.models.shape import Kept, ModelShape, Part

# A setting of the config that switches a bias on, or always or never one.
Switch = str | bool
Norm = Literal["rms", "layer", "layer_without_bias", "without_weights"]


@dataclass(frozen=True)
class Style:
    """What tells one family from another.

    Attributes:
        norms: How many norms of the hidden size a layer has.
        heads_normed: Queries and keys are normed, with one weight for all heads or with a weight each.
        partial_rotary: Queries are put together anew after rotation, so that the attention's output is copied.
        fused_mlp: Gate and up projection are one module.
        gated: Whether there is a gate.
    """

    qkv_bias: Switch = "attention_bias"
    output_bias: Switch = "attention_bias"
    mlp_bias: Switch = "mlp_bias"
    norm: Norm = "rms"
    norms: int = 2
    heads_normed: Literal["no", "alike", "each"] = "no"
    gated: bool = True
    partial_rotary: bool = False
    fused_mlp: bool = False
    mlp_names: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    activation: str = "hidden_act"


STYLES: dict[str, Style] = {
    "llama": Style(),
    "mistral": Style(qkv_bias=False, output_bias=False, mlp_bias=False),
    "ministral": Style(qkv_bias=False, output_bias=False, mlp_bias=False),
    "ministral3": Style(qkv_bias=False, output_bias=False, mlp_bias=False),
    "qwen2": Style(qkv_bias=True, output_bias=False, mlp_bias=False),
    "qwen3": Style(mlp_bias=False, heads_normed="alike"),
    "gemma": Style(mlp_bias=False),
    "gemma2": Style(mlp_bias=False, norms=4, activation="hidden_activation"),
    "gemma3_text": Style(mlp_bias=False, norms=4, heads_normed="alike", activation="hidden_activation"),
    "granite": Style(),
    "smollm3": Style(),
    "stablelm": Style(qkv_bias="use_qkv_bias", output_bias=False, mlp_bias=False, norm="layer", partial_rotary=True),
    "olmo": Style(mlp_bias=False, norm="without_weights"),
    "olmo2": Style(mlp_bias=False, heads_normed="each"),
    "olmo3": Style(mlp_bias=False, heads_normed="each"),
    "cohere": Style(mlp_bias=False, norm="layer_without_bias", norms=1),
    "cohere2": Style(mlp_bias=False, norm="layer_without_bias", norms=1),
    "starcoder2": Style(
        qkv_bias="use_bias",
        output_bias="use_bias",
        mlp_bias="use_bias",
        norm="layer",
        gated=False,
        mlp_names=("mlp.c_fc", "mlp.c_proj"),
    ),
    "exaone4": Style(qkv_bias=False, output_bias=False, mlp_bias=False, heads_normed="alike"),
    "glm": Style(
        output_bias=False,
        mlp_bias=False,
        partial_rotary=True,
        fused_mlp=True,
        mlp_names=("mlp.gate_up_proj", "mlp.down_proj"),
    ),
    "glm4": Style(
        output_bias=False,
        mlp_bias=False,
        norms=4,
        partial_rotary=True,
        fused_mlp=True,
        mlp_names=("mlp.gate_up_proj", "mlp.down_proj"),
    ),
    "helium": Style(output_bias=False),
    "hunyuan_v1_dense": Style(mlp_bias=False, heads_normed="alike"),
    "arcee": Style(gated=False, mlp_names=("mlp.up_proj", "mlp.down_proj")),
    "ernie4_5": Style(qkv_bias="use_bias", output_bias="use_bias", mlp_bias="use_bias"),
    "seed_oss": Style(output_bias="attention_out_bias"),
}


def build_dense(reader: ConfigReader, model_type: str) -> ModelShape:
    """Read one of the families in STYLES.

    Raises:
        NotKnown: The config lacks a dimension, or has a variation that is not known here.
    """
    _refuse_variations(reader, model_type)
    hidden = reader.size("hidden_size")
    layer = dense_layer(reader, STYLES[model_type], hidden=hidden)
    return assemble(
        reader,
        model_type,
        repeated("model.layers", layer, reader.layers()),
        hidden=hidden,
        last_norm=norm_of(STYLES[model_type].norm)(hidden),
    )


def _refuse_variations(reader: ConfigReader, model_type: str) -> None:
    """Head norms of their own and parallel residuals exist in code, in no model of these families worth a guess."""
    for name in ("qk_layernorm", "use_qk_norm", "use_parallel_residual"):
        if model_type in ("stablelm", "cohere") and reader.flag(name):
            raise NotKnown(f"{model_type} with {name}")


def dense_layer(reader: ConfigReader, style: Style, *, hidden: int, prefix: str = "self_attn") -> Part:
    """Put one layer together.

    Raises:
        NotKnown: As in `build_dense`.
    """
    heads = read_heads(reader, hidden=hidden)
    norm = norm_of(style.norm)
    layer = separate_attention(
        hidden,
        heads,
        prefix=prefix,
        bias=_switch(reader, style.qkv_bias),
        output_bias=_switch(reader, style.output_bias),
        output_reads="own" if style.partial_rotary else "kept",
    )
    for _ in range(style.norms):
        layer += norm(hidden)
    if style.heads_normed != "no":
        layer += heads_norm(heads, alike=style.heads_normed == "alike")
    width = reader.size("intermediate_size")
    activation = reader.value(style.activation)
    bias = _switch(reader, style.mlp_bias)
    if not style.gated:
        return layer + plain_mlp(hidden, width, activation, _two(style.mlp_names), bias=bias)
    if style.fused_mlp:
        return layer + fused_gated_mlp(hidden, width, activation, _two(style.mlp_names), bias=bias)
    gate, up, down = style.mlp_names
    return layer + gated_mlp(hidden, width, activation, names=(gate, up, down), bias=bias)


def heads_norm(heads: Heads, *, alike: bool) -> Part:
    """Norms of queries and keys, with one weight a feature of a head for all heads, or one a feature of each."""
    if alike:
        return rms_norm(heads.head_dim, elements=heads.query) + rms_norm(heads.head_dim, elements=heads.key)
    return rms_norm(heads.query) + rms_norm(heads.key)


def norm_of(kind: Norm) -> Callable[[int], Part]:
    """Return the function that makes a norm of some size."""
    if kind == "rms":
        return rms_norm
    if kind == "layer":
        return layer_norm
    if kind == "layer_without_bias":
        return _norm_without_bias
    return _norm_without_weights


def _norm_without_bias(size: int) -> Part:
    return Part(others=size, kept=Kept(fp32=size))  # CohereLayerNorm converts to fp32 and back


def _norm_without_weights(size: int) -> Part:
    return Part(kept=Kept(fp32=size))  # OlmoLayerNorm converts to fp32 and back


def _switch(reader: ConfigReader, switch: Switch) -> bool:
    return switch if isinstance(switch, bool) else reader.flag(switch)


def _two(names: tuple[str, ...]) -> tuple[str, str]:
    first, second = names
    return first, second


def build_phi3(reader: ConfigReader, model_type: str) -> ModelShape:
    """Phi-3: one projection for queries, keys and values, one for gate and up.

    Raises:
        NotKnown: The config lacks a dimension.
    """
    hidden = reader.size("hidden_size")
    layer = (
        fused_attention(hidden, read_heads(reader, hidden=hidden), ("self_attn.qkv_proj", "self_attn.o_proj"))
        + rms_norm(hidden)
        + rms_norm(hidden)
        + fused_gated_mlp(
            hidden,
            reader.size("intermediate_size"),
            reader.value("hidden_act"),
            ("mlp.gate_up_proj", "mlp.down_proj"),
        )
    )
    blocks = repeated("model.layers", layer, reader.layers())
    return assemble(reader, model_type, blocks, hidden=hidden, last_norm=rms_norm(hidden))


def build_phi(reader: ConfigReader, model_type: str) -> ModelShape:
    """Phi-1 and Phi-2: attention and MLP side by side behind one norm, biases everywhere.

    Raises:
        NotKnown: The config lacks a dimension, or norms its heads.
    """
    if reader.flag("qk_layernorm"):
        raise NotKnown("phi with qk_layernorm")
    hidden = reader.size("hidden_size")
    layer = (
        separate_attention(
            hidden,
            read_heads(reader, hidden=hidden),
            names=("q_proj", "k_proj", "v_proj", "dense"),
            bias=True,
            output_bias=True,
            output_reads="own",
        )
        + layer_norm(hidden)
        + plain_mlp(
            hidden,
            reader.size("intermediate_size"),
            reader.value("hidden_act"),
            ("mlp.fc1", "mlp.fc2"),
            reads="attention",
        )
    )
    blocks = repeated("model.layers", layer, reader.layers())
    return assemble(reader, model_type, blocks, hidden=hidden, last_norm=layer_norm(hidden), head_bias=True)
