"""Families whose code comes with the model, so that nothing here runs it: their parameters can still be counted."""

from dataclasses import replace

from domain.models.architectures.assembly import assemble, repeated
from domain.models.architectures.parts import (
    Heads,
    fused_attention,
    fused_gated_mlp,
    gated_mlp,
    layer_norm,
    read_heads,
    rms_norm,
    separate_attention,
)
from domain.models.architectures.reader import ConfigReader
from domain.models.shape import ModelShape


def build_qwen(reader: ConfigReader, model_type: str) -> ModelShape:
    """Qwen of 2023. Source: modeling_qwen.py of Qwen/Qwen-7B; `intermediate_size` counts gate and up together.

    Raises:
        NotKnown: The config lacks a dimension.
    """
    hidden = reader.size("hidden_size")
    heads = reader.size("num_attention_heads")
    channels = Heads(heads, heads, reader.size("kv_channels"))
    plain = not reader.flag("no_bias", True)
    layer = (
        fused_attention(hidden, channels, ("attn.c_attn", "attn.c_proj"), bias=True, output_bias=plain)
        + rms_norm(hidden)
        + rms_norm(hidden)
        + gated_mlp(
            hidden,
            reader.size("intermediate_size") // 2,
            "silu",
            names=("mlp.w2", "mlp.w1", "mlp.c_proj"),
            bias=plain,
        )
    )
    blocks = repeated("transformer.h", layer, reader.layers())
    return assemble(reader, model_type, blocks, hidden=hidden, last_norm=rms_norm(hidden))


def build_fused_llama(reader: ConfigReader, model_type: str) -> ModelShape:
    """Baichuan and InternLM2: Llama with queries, keys and values in one projection.

    Source: modeling_baichuan.py of baichuan-inc/Baichuan2-7B-Base, modeling_internlm2.py of internlm/internlm2-7b.

    Raises:
        NotKnown: The config lacks a dimension.
    """
    hidden = reader.size("hidden_size")
    internlm = model_type == "internlm2"
    attention = ("attention.wqkv", "attention.wo") if internlm else ("self_attn.W_pack", "self_attn.o_proj")
    mlp = (
        ("feed_forward.w1", "feed_forward.w3", "feed_forward.w2")
        if internlm
        else ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    )
    bias = reader.flag("bias")
    layer = (
        fused_attention(hidden, read_heads(reader, hidden=hidden), attention, bias=bias, output_bias=bias)
        + rms_norm(hidden)
        + rms_norm(hidden)
        + gated_mlp(hidden, reader.size("intermediate_size"), reader.value("hidden_act"), names=mlp)
    )
    blocks = repeated("model.layers", layer, reader.layers())
    return assemble(
        reader,
        model_type,
        blocks,
        hidden=hidden,
        last_norm=rms_norm(hidden),
        position_names=("max_position_embeddings", "model_max_length"),
    )


def build_exaone(reader: ConfigReader, model_type: str) -> ModelShape:
    """EXAONE 3. Source: modeling_exaone.py of LGAI-EXAONE/EXAONE-3.5-7.8B-Instruct.

    Raises:
        NotKnown: The config lacks a dimension.
    """
    hidden = reader.size("hidden_size")
    layer = (
        separate_attention(
            hidden,
            read_heads(reader, hidden=hidden),
            prefix="attn.attention",
            names=("q_proj", "k_proj", "v_proj", "out_proj"),
        )
        + rms_norm(hidden)
        + rms_norm(hidden)
        + gated_mlp(
            hidden,
            reader.size("intermediate_size"),
            reader.value("activation_function"),
            names=("mlp.c_fc_0", "mlp.c_fc_1", "mlp.c_proj"),
        )
    )
    blocks = repeated("transformer.h", layer, reader.layers("num_layers"))
    return assemble(reader, model_type, blocks, hidden=hidden, last_norm=rms_norm(hidden))


def build_phi3_small(reader: ConfigReader, model_type: str) -> ModelShape:
    """Phi-3-small. Source: modeling_phi3_small.py of microsoft/Phi-3-small-8k-instruct.

    Raises:
        NotKnown: The config lacks a dimension.
    """
    hidden = reader.size("hidden_size")
    layer = (
        fused_attention(
            hidden,
            read_heads(reader, hidden=hidden),
            ("self_attn.query_key_value", "self_attn.dense"),
            bias=True,
            output_bias=True,
        )
        + layer_norm(hidden)
        + layer_norm(hidden)
        + fused_gated_mlp(
            hidden, reader.size("ff_intermediate_size"), "gelu", ("mlp.up_proj", "mlp.down_proj"), bias=True
        )
    )
    blocks = repeated("model.layers", layer, reader.layers())
    return assemble(reader, model_type, blocks, hidden=hidden, last_norm=layer_norm(hidden))


def build_mimo(reader: ConfigReader, model_type: str) -> ModelShape:
    """MiMo-7B: Qwen2 with layers that predict further tokens. Source: modeling_mimo.py of XiaomiMiMo/MiMo-7B-Base.

    Raises:
        NotKnown: The config lacks a dimension.
    """
    hidden = reader.size("hidden_size")
    layer = (
        separate_attention(hidden, read_heads(reader, hidden=hidden), bias=reader.flag("attention_bias", True))
        + rms_norm(hidden)
        + rms_norm(hidden)
        + gated_mlp(hidden, reader.size("intermediate_size"), reader.value("hidden_act"))
    )
    blocks = repeated("model.layers", layer, reader.layers())
    further = reader.count("num_nextn_predict_layers", default=0)
    # Each further layer: a whole layer, three more norms, and a projection from two hidden states to one.
    ahead = further * (layer.parameters + 3 * hidden + 2 * hidden * hidden)
    shape = assemble(reader, model_type, blocks, hidden=hidden, last_norm=rms_norm(hidden))
    return replace(shape, other_parameters=shape.other_parameters + ahead)
