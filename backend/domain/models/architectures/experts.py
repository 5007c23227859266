"""Mixtures of experts: layers whose MLP is a router and many small MLPs, and multi-head latent attention."""

from domain.models.architectures.assembly import assemble, blocks_by_kind, repeated
from domain.models.architectures.dense import heads_norm
from domain.models.architectures.parts import (
    experts,
    gated_mlp,
    layer_norm,
    read_heads,
    rms_norm,
    separate_attention,
)
from domain.models.architectures.reader import ConfigReader, NotKnown
from domain.models.shape import Kept, Linear, ModelShape, Part


def build_mixtral(reader: ConfigReader, model_type: str) -> ModelShape:
    """Mixtral, OLMoE, Granite MoE and Phi-3.5-MoE: every layer has experts.

    Raises:
        NotKnown: The config lacks a dimension.
    """
    hidden, width = reader.size("hidden_size"), reader.size("intermediate_size")
    count = reader.size("num_experts" if model_type == "olmoe" else "num_local_experts")
    heads = read_heads(reader, hidden=hidden)
    bias = reader.flag("attention_bias") if model_type != "mixtral" else False
    phi = model_type == "phimoe"
    norm = layer_norm if phi else rms_norm
    # Phi's router is a subclass of nn.Linear: adapters and quantisation reach it.
    router = Part((Linear("mlp.router", hidden, count, False, "mlp"),)) if phi else Part(others=hidden * count)
    layer = (
        separate_attention(hidden, heads, bias=bias, output_bias=bias)
        + norm(hidden)
        + norm(hidden)
        + (heads_norm(heads, alike=False) if model_type == "olmoe" else Part())
        + router
        + _experts(reader, hidden, width, count)
    )
    blocks = repeated("model.layers", layer, reader.layers())
    head_bias = phi and reader.flag("lm_head_bias")
    return assemble(reader, model_type, blocks, hidden=hidden, last_norm=norm(hidden), head_bias=head_bias)


def _experts(reader: ConfigReader, hidden: int, width: int, count: int) -> Part:
    active = reader.size("num_experts_per_tok")
    if active > count:
        raise NotKnown(f"{active} of {count} experts")
    return experts(hidden, width, count=count, active=active, activation=reader.value("hidden_act"), router=0)


def sparse_qwen_mlp(reader: ConfigReader, hidden: int, *, shared: bool) -> Part:
    """Qwen's experts, with or without one that every token passes.

    Raises:
        NotKnown: The config lacks a dimension.
    """
    count = reader.size("num_experts", "num_local_experts")
    part = _experts(reader, hidden, reader.size("moe_intermediate_size"), count) + Part(others=hidden * count)
    if not shared:
        return part
    names = ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj")
    width = reader.size("shared_expert_intermediate_size")
    gate = Linear("mlp.shared_expert_gate", hidden, 1, False, "mlp")
    return part + gated_mlp(hidden, width, reader.value("hidden_act"), names=names) + Part((gate,))


def build_qwen_moe(reader: ConfigReader, model_type: str) -> ModelShape:
    """Qwen2-MoE and Qwen3-MoE: some layers may be dense.

    Raises:
        NotKnown: The config lacks a dimension.
    """
    hidden, layers = reader.size("hidden_size"), reader.layers()
    heads = read_heads(reader, hidden=hidden)
    second = model_type == "qwen2_moe"
    bias = reader.flag("qkv_bias", True) if second else reader.flag("attention_bias")
    attention = separate_attention(hidden, heads, bias=bias, output_bias=bias and not second)
    attention += rms_norm(hidden) + rms_norm(hidden)
    if not second:
        attention += heads_norm(heads, alike=True)
    sparse = attention + sparse_qwen_mlp(reader, hidden, shared=second)
    dense = attention + gated_mlp(hidden, reader.size("intermediate_size"), reader.value("hidden_act"))
    step, only_dense = reader.size("decoder_sparse_step", default=1), reader.indexes("mlp_only_layers", layers)
    parts = [sparse if index not in only_dense and (index + 1) % step == 0 else dense for index in range(layers)]
    blocks = blocks_by_kind("model.layers", parts)
    return assemble(reader, model_type, blocks, hidden=hidden, last_norm=rms_norm(hidden))


def latent_attention(reader: ConfigReader, hidden: int) -> Part:
    """Multi-head latent attention: queries, and keys with values, pass through narrow projections.

    Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1; modules as in transformers' modeling_deepseek_v3.py.

    Raises:
        NotKnown: The config lacks a dimension.
    """
    heads = reader.size("num_attention_heads")
    rope, plain = reader.size("qk_rope_head_dim"), reader.size("qk_nope_head_dim")
    value, latent = reader.size("v_head_dim", default=plain), reader.size("kv_lora_rank")
    bias = reader.flag("attention_bias")
    query = heads * (plain + rope)
    narrow = reader.value("q_lora_rank")
    if narrow is None:
        part = Part((Linear("self_attn.q_proj", hidden, query, False, "attention"),))
    else:
        narrow = reader.size("q_lora_rank")
        part = rms_norm(narrow) + Part(
            (
                Linear("self_attn.q_a_proj", hidden, narrow, bias, "attention"),
                Linear("self_attn.q_b_proj", narrow, query, False, "own"),
            )
        )
    return (
        part
        + rms_norm(latent)
        + Part(
            (
                Linear("self_attn.kv_a_proj_with_mqa", hidden, latent + rope, bias, "attention"),
                Linear("self_attn.kv_b_proj", latent, heads * (plain + value), False, "own"),
                Linear("self_attn.o_proj", heads * value, hidden, bias, "own"),
            ),
            # Queries, keys, values (a view of kv_b_proj's output) and the attention's output.
            kept=Kept(plain=2 * query + heads * (plain + value) + heads * value, attentions=1),
        )
    )


def build_deepseek(reader: ConfigReader, model_type: str) -> ModelShape:
    """DeepSeek-V2, V3, R1 and Kimi-K2: latent attention, some dense layers, then experts with shared ones.

    Raises:
        NotKnown: The config lacks a dimension, or places its experts in a way that transformers does not follow.
    """
    hidden, layers = reader.size("hidden_size"), reader.layers()
    if reader.size("moe_layer_freq", default=1) != 1:
        raise NotKnown("experts in every other layer")
    attention = latent_attention(reader, hidden) + rms_norm(hidden) + rms_norm(hidden)
    parts = _dense_then_sparse(reader, attention, hidden, layers)
    blocks = blocks_by_kind("model.layers", parts)
    return assemble(reader, model_type, blocks, hidden=hidden, last_norm=rms_norm(hidden))


def _dense_then_sparse(reader: ConfigReader, attention: Part, hidden: int, layers: int) -> list[Part]:
    first = reader.count("first_k_dense_replace", default=0)
    count, width = reader.size("n_routed_experts"), reader.size("moe_intermediate_size")
    names = ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj", "mlp.shared_experts.down_proj")
    activation = reader.value("hidden_act")
    shared = gated_mlp(hidden, width * reader.size("n_shared_experts", default=1), activation, names=names)
    sparse = attention + _experts(reader, hidden, width, count) + Part(others=hidden * count) + shared
    dense = attention + gated_mlp(hidden, reader.size("intermediate_size"), activation)
    return [dense if index < first else sparse for index in range(layers)]


def build_minicpm3(reader: ConfigReader, model_type: str) -> ModelShape:
    """MiniCPM3: latent attention with dense layers.

    Raises:
        NotKnown: The config lacks a dimension.
    """
    hidden = reader.size("hidden_size")
    layer = (
        latent_attention(reader, hidden)
        + rms_norm(hidden)
        + rms_norm(hidden)
        + gated_mlp(hidden, reader.size("intermediate_size"), reader.value("hidden_act"))
    )
    blocks = repeated("model.layers", layer, reader.layers())
    return assemble(reader, model_type, blocks, hidden=hidden, last_norm=rms_norm(hidden))


def build_glm4_moe(reader: ConfigReader, model_type: str) -> ModelShape:
    """GLM-4.5: grouped-query attention, then as DeepSeek.

    Raises:
        NotKnown: The config lacks a dimension.
    """
    hidden, layers = reader.size("hidden_size"), reader.layers()
    heads = read_heads(reader, hidden=hidden)
    attention = separate_attention(hidden, heads, bias=reader.flag("attention_bias"))
    attention += rms_norm(hidden) + rms_norm(hidden)
    if reader.flag("use_qk_norm"):
        attention += heads_norm(heads, alike=True)
    parts = _dense_then_sparse(reader, attention, hidden, layers)
    blocks = blocks_by_kind("model.layers", parts)
    return assemble(reader, model_type, blocks, hidden=hidden, last_norm=rms_norm(hidden))


def build_gpt_oss(reader: ConfigReader, model_type: str) -> ModelShape:
    """gpt-oss: biases everywhere, in the stacked experts too, and an attention sink a head.

    Raises:
        NotKnown: The config lacks a dimension.
    """
    hidden, width = reader.size("hidden_size"), reader.size("intermediate_size")
    count, active = reader.size("num_local_experts"), reader.size("num_experts_per_tok", "experts_per_token")
    heads = read_heads(reader, hidden=hidden)
    bias = reader.flag("attention_bias", True)
    layer = (
        separate_attention(hidden, heads, bias=bias, output_bias=bias)
        + rms_norm(hidden)
        + rms_norm(hidden)
        + Part(others=heads.heads + count * (hidden + 1))
        + experts(hidden, width, count=count, active=active, activation="silu", bias=True, router=0)
    )
    blocks = repeated("model.layers", layer, reader.layers())
    return assemble(reader, model_type, blocks, hidden=hidden, last_norm=rms_norm(hidden))
