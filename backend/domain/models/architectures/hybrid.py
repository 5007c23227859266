"""Models that mix attention with linear attention or state spaces, and models with a vision tower."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from domain.models.architectures.assembly import assemble, blocks_by_kind
from domain.models.architectures.dense import build_dense, heads_norm
from domain.models.architectures.experts import sparse_qwen_mlp
from domain.models.architectures.parts import (
    experts,
    gated_mlp,
    layer_norm,
    plain_mlp,
    read_heads,
    rms_norm,
    separate_attention,
)
from domain.models.architectures.reader import ConfigReader, NotKnown
from domain.models.shape import Block, Kept, Linear, ModelShape, Part

# Source: transformers 5.17, models/gemma3/configuration_gemma3.py and models/siglip/configuration_siglip.py. Gemma's
# published configs leave out what these classes assume.
GEMMA3_TEXT: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 262_208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 131_072,
        "tie_word_embeddings": True,
    }
)
SIGLIP: Mapping[str, Any] = MappingProxyType({"num_channels": 3, "hidden_act": "gelu_pytorch_tanh"})


def build_qwen_hybrid(reader: ConfigReader, model_type: str) -> ModelShape:
    """Qwen3-Next and the text model of Qwen3.5: three layers of gated delta nets, one of gated attention.

    Raises:
        NotKnown: The config lacks a dimension.
    """
    hidden, layers = reader.size("hidden_size"), reader.layers()
    sparse = model_type == "qwen3_next"
    mlp = (
        sparse_qwen_mlp(reader, hidden, shared=True)
        if sparse
        else gated_mlp(hidden, reader.size("intermediate_size"), reader.value("hidden_act"))
    )
    around = mlp + rms_norm(hidden) + rms_norm(hidden)
    full = around + _gated_attention(reader, hidden)
    linear = around + _delta_net(reader, hidden, fused=sparse)
    interval = reader.size("full_attention_interval", default=4)
    kinds = reader.kinds("layer_types", layers) or [
        "full_attention" if (index + 1) % interval == 0 else "linear_attention" for index in range(layers)
    ]
    blocks = blocks_by_kind("model.layers", [full if kind == "full_attention" else linear for kind in kinds])
    shape = assemble(reader, model_type, blocks, hidden=hidden, last_norm=rms_norm(hidden))
    return replace(shape, rough=True)


def _gated_attention(reader: ConfigReader, hidden: int) -> Part:
    heads = read_heads(reader, hidden=hidden)
    bias = reader.flag("attention_bias")
    part = separate_attention(hidden, heads, bias=bias, output_bias=bias) + heads_norm(heads, alike=True)
    query, *rest = part.linears
    # The query projection also makes a gate for each query feature; the gated product is what o_proj reads.
    doubled = replace(query, fan_out=2 * query.fan_out)
    output = replace(rest[-1], reads="own")
    return replace(part, linears=(doubled, *rest[:-1], output), kept=part.kept + Kept(plain=2 * heads.query))


def _delta_net(reader: ConfigReader, hidden: int, *, fused: bool) -> Part:
    """A gated delta net. What its kernel keeps differs from implementation to implementation: an upper bound.

    Source: transformers' modeling_qwen3_next.py, Qwen3NextGatedDeltaNet.
    """
    key_heads, value_heads = reader.size("linear_num_key_heads"), reader.size("linear_num_value_heads")
    key_dim, value_dim = reader.size("linear_key_head_dim"), reader.size("linear_value_head_dim")
    keys, values = key_heads * key_dim, value_heads * value_dim
    mixed = 2 * keys + values
    prefix = "linear_attn"
    inputs = (
        (("in_proj_qkvz", mixed + values), ("in_proj_ba", 2 * value_heads))
        if fused
        else (("in_proj_qkv", mixed), ("in_proj_z", values), ("in_proj_b", value_heads), ("in_proj_a", value_heads))
    )
    linears = tuple(Linear(f"{prefix}.{name}", hidden, width, False, "attention") for name, width in inputs)
    convolution = mixed * reader.size("linear_conv_kernel_dim")
    return Part(
        (*linears, Linear(f"{prefix}.out_proj", values, hidden, False, "own")),
        others=convolution + 2 * value_heads + value_dim,
        # Convolution's input and output, queries, keys and values normed in fp32, the gated norm.
        kept=Kept(fp32=2 * value_heads * key_dim + 3 * values, plain=2 * mixed + 2 * values),
    )


def build_granite_hybrid(reader: ConfigReader, model_type: str) -> ModelShape:
    """Granite 4: Mamba-2 or attention layers, with a shared MLP and perhaps experts.

    Raises:
        NotKnown: The config lacks a dimension.
    """
    hidden, layers = reader.size("hidden_size"), reader.layers()
    kinds = reader.kinds("layer_types", layers) or ["mamba"] * layers
    around = _granite_mlp(reader, hidden) + rms_norm(hidden) + rms_norm(hidden)
    bias = reader.flag("attention_bias")
    attention = separate_attention(hidden, read_heads(reader, hidden=hidden), bias=bias, output_bias=bias)
    # transformers 5 renames the kinds of published configs (configuration_utils.py, remap_legacy_layer_types).
    mamba, full = {"mamba", "linear_attention"}, {"attention", "full_attention"}
    layer_of = dict.fromkeys(full, around + attention)
    if mamba & set(kinds):
        layer_of |= dict.fromkeys(mamba, around + _mamba2(reader, hidden))
    if not set(kinds) <= set(layer_of):
        raise NotKnown("a kind of layer that is not known")
    blocks = blocks_by_kind("model.layers", [layer_of[kind] for kind in kinds])
    shape = assemble(reader, model_type, blocks, hidden=hidden, last_norm=rms_norm(hidden))
    return replace(shape, rough=bool(mamba & set(kinds)))


def _granite_mlp(reader: ConfigReader, hidden: int) -> Part:
    width = reader.size("shared_intermediate_size")
    shared = Part(
        (
            Linear("shared_mlp.input_linear", hidden, 2 * width, False, "mlp"),
            Linear("shared_mlp.output_linear", width, hidden, False, "own"),
        ),
        kept=Kept(plain=3 * width),
    )
    count = reader.count("num_local_experts", default=0)
    if count == 0:
        return shared
    return shared + experts(
        hidden,
        reader.size("intermediate_size"),
        count=count,
        active=reader.size("num_experts_per_tok"),
        activation=reader.value("hidden_act"),
        router=hidden * count,
    )


def _mamba2(reader: ConfigReader, hidden: int) -> Part:
    """A Mamba-2 mixer (arXiv 2405.21060). What its scan keeps depends on the kernel: an upper bound."""
    heads = reader.size("mamba_n_heads")
    inner = reader.size("mamba_expand") * hidden
    state, groups = reader.size("mamba_d_state"), reader.size("mamba_n_groups")
    convolved = inner + 2 * groups * state
    bias = reader.flag("mamba_conv_bias", True)
    projection_bias = reader.flag("mamba_proj_bias")
    return Part(
        (
            Linear("mamba.in_proj", hidden, inner + convolved + heads, projection_bias, "attention"),
            Linear("mamba.out_proj", inner, hidden, projection_bias, "own"),
        ),
        others=3 * heads + convolved * (reader.size("mamba_d_conv") + bias) + inner,
        kept=Kept(fp32=3 * inner, plain=2 * (inner + convolved) + heads),
    )


def build_gemma3(reader: ConfigReader, model_type: str) -> ModelShape:
    """Gemma 3 with its vision tower, which a text fine-tune holds in memory and never runs.

    Raises:
        NotKnown: The config lacks a dimension.
    """
    text = build_dense(ConfigReader(reader.part("text_config"), GEMMA3_TEXT), "gemma3_text")
    vision = ConfigReader(reader.part("vision_config"), SIGLIP)
    if vision.flag("vision_use_head", True):
        raise NotKnown("a vision tower with a pooling head")
    width, layers = vision.size("hidden_size"), vision.layers()
    heads = read_heads(vision, hidden=width)
    layer = (
        separate_attention(width, heads, names=("q_proj", "k_proj", "v_proj", "out_proj"), bias=True, output_bias=True)
        + layer_norm(width)
        + layer_norm(width)
        + plain_mlp(width, vision.size("intermediate_size"), vision.value("hidden_act"), ("mlp.fc1", "mlp.fc2"))
    )
    patch, image = vision.size("patch_size"), vision.size("image_size")
    patches = vision.size("num_channels") * patch * patch * width + width
    positions = (image // patch) ** 2 * width
    projector = width * text.hidden + width
    tower = Block("model.vision_tower.encoder.layers", tuple(range(layers)), layer, passed=False)
    blocks = tuple(replace(block, container="model.language_model.layers") for block in text.blocks)
    others = text.other_parameters + patches + positions + layer_norm(width).others + projector
    return replace(text, model_type=model_type, blocks=(*blocks, tower), other_parameters=others)
