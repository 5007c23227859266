"""The older families: GPT-2 and its kin, GPT-NeoX, OPT, BLOOM, Falcon, MPT."""

from dataclasses import replace

from domain.models.architectures.assembly import assemble, repeated
from domain.models.architectures.parts import (
    Heads,
    dropout,
    fused_attention,
    is_positive,
    layer_norm,
    plain_mlp,
    separate_attention,
)
from domain.models.architectures.reader import ConfigReader, NotKnown
from domain.models.shape import Kept, Linear, ModelShape, Part


def _equal_heads(reader: ConfigReader, hidden: int) -> Heads:
    heads = reader.size("num_attention_heads", "n_head", "n_heads")
    dropped = is_positive(reader.value("attention_dropout", reader.value("attn_pdrop")))
    return Heads(heads, heads, max(hidden // heads, 1), dropped)


def build_gpt2(reader: ConfigReader, model_type: str) -> ModelShape:
    """GPT-2 and, with one head for keys and values, GPT-BigCode.

    Raises:
        NotKnown: The config lacks a dimension.
    """
    hidden = reader.size("n_embd")
    heads = _equal_heads(reader, hidden)
    if model_type == "gpt_bigcode" and reader.flag("multi_query", True):
        heads = replace(heads, kv_heads=1)
    layer = (
        fused_attention(hidden, heads, ("attn.c_attn", "attn.c_proj"), bias=True, output_bias=True)
        + layer_norm(hidden)
        + layer_norm(hidden)
        + plain_mlp(
            hidden,
            reader.size("n_inner", default=4 * hidden),
            reader.value("activation_function"),
            ("mlp.c_fc", "mlp.c_proj"),
        )
        + dropout(reader, "resid_pdrop", 2 * hidden)
    )
    return assemble(
        reader,
        model_type,
        repeated("transformer.h", layer, reader.layers("n_layer")),
        hidden=hidden,
        last_norm=layer_norm(hidden),
        positions=reader.size("n_positions"),
    )


def build_gpt_neo(reader: ConfigReader, model_type: str) -> ModelShape:
    """GPT-Neo: separate projections without biases.

    Raises:
        NotKnown: The config lacks a dimension.
    """
    hidden = reader.size("hidden_size")
    names = ("q_proj", "k_proj", "v_proj", "out_proj")
    layer = (
        separate_attention(
            hidden,
            Heads(heads := reader.size("num_heads"), heads, max(hidden // heads, 1)),
            prefix="attn.attention",
            names=names,
            output_bias=True,
        )
        + layer_norm(hidden)
        + layer_norm(hidden)
        + plain_mlp(
            hidden,
            reader.size("intermediate_size", default=4 * hidden),
            reader.value("activation_function"),
            ("mlp.c_fc", "mlp.c_proj"),
        )
    )
    return assemble(
        reader,
        model_type,
        repeated("transformer.h", layer, reader.layers("num_layers")),
        hidden=hidden,
        last_norm=layer_norm(hidden),
        positions=reader.size("max_position_embeddings"),
    )


def build_gptj(reader: ConfigReader, model_type: str) -> ModelShape:
    """GPT-J: attention and MLP side by side behind one norm.

    Raises:
        NotKnown: The config lacks a dimension.
    """
    hidden = reader.size("n_embd")
    layer = (
        separate_attention(
            hidden, _equal_heads(reader, hidden), prefix="attn", names=("q_proj", "k_proj", "v_proj", "out_proj")
        )
        + layer_norm(hidden)
        + plain_mlp(
            hidden,
            reader.size("n_inner", default=4 * hidden),
            reader.value("activation_function"),
            ("mlp.fc_in", "mlp.fc_out"),
            reads="attention",
        )
    )
    blocks = repeated("transformer.h", layer, reader.layers("n_layer"))
    return assemble(reader, model_type, blocks, hidden=hidden, last_norm=layer_norm(hidden), head_bias=True)


def build_gpt_neox(reader: ConfigReader, model_type: str) -> ModelShape:
    """GPT-NeoX and Pythia.

    Raises:
        NotKnown: The config lacks a dimension.
    """
    hidden = reader.size("hidden_size")
    bias = reader.flag("attention_bias", True)
    layer = (
        fused_attention(
            hidden,
            _equal_heads(reader, hidden),
            ("attention.query_key_value", "attention.dense"),
            bias=bias,
            output_bias=bias,
        )
        + layer_norm(hidden)
        # Side by side, both norms keep the same input.
        + (Part(others=2 * hidden) if reader.flag("use_parallel_residual", True) else layer_norm(hidden))
        + plain_mlp(
            hidden,
            reader.size("intermediate_size"),
            reader.value("hidden_act"),
            ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        )
    )
    blocks = repeated("gpt_neox.layers", layer, reader.layers())
    return assemble(reader, model_type, blocks, hidden=hidden, last_norm=layer_norm(hidden))


def build_opt(reader: ConfigReader, model_type: str) -> ModelShape:
    """OPT, whose smallest models have an embedding of another size than the layers.

    Raises:
        NotKnown: The config lacks a dimension, or switches biases or norm weights off.
    """
    if not (reader.flag("enable_bias", True) and reader.flag("layer_norm_elementwise_affine", True)):
        raise NotKnown("an OPT without biases")
    hidden = reader.size("hidden_size")
    layer = (
        separate_attention(
            hidden,
            _equal_heads(reader, hidden),
            names=("q_proj", "k_proj", "v_proj", "out_proj"),
            bias=True,
            output_bias=True,
            output_reads="own",
        )
        + layer_norm(hidden)
        + layer_norm(hidden)
        + plain_mlp(hidden, reader.size("ffn_dim"), reader.value("activation_function"), ("fc1", "fc2"))
        + dropout(reader, "dropout", 2 * hidden)
    )
    before = reader.flag("do_layer_norm_before", True) and not reader.flag("_remove_final_layer_norm")
    shape = assemble(
        reader,
        model_type,
        repeated("model.decoder.layers", layer, reader.layers()),
        hidden=hidden,
        last_norm=layer_norm(hidden) if before else Part(),
    )
    positions = (reader.size("max_position_embeddings") + 2) * hidden  # OPTLearnedPositionalEmbedding's offset
    width = reader.size("word_embed_proj_dim", default=hidden)
    shape = replace(
        shape,
        embedding_parameters=shape.vocab * width + positions,
        head_parameters=0 if shape.tied_embeddings else shape.vocab * width,
    )
    if width == hidden:
        return shape
    return replace(
        shape,
        loose_linears=(
            Linear("model.decoder.project_in", width, hidden, reads="kept"),
            Linear("model.decoder.project_out", hidden, width, reads="kept"),
        ),
    )


def build_bloom(reader: ConfigReader, model_type: str) -> ModelShape:
    """BLOOM: a norm behind the embedding, ALiBi instead of positions.

    Raises:
        NotKnown: The config lacks a dimension.
    """
    hidden = reader.size("hidden_size", "n_embed")
    layer = (
        fused_attention(
            hidden,
            _equal_heads(reader, hidden),
            ("self_attention.query_key_value", "self_attention.dense"),
            bias=True,
            output_bias=True,
        )
        + layer_norm(hidden)
        + layer_norm(hidden)
        + plain_mlp(hidden, 4 * hidden, "gelu_new", ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"))
    )
    blocks = repeated("transformer.h", layer, reader.layers("n_layer", "num_hidden_layers"))
    norms = layer_norm(hidden) + layer_norm(hidden)  # behind the embedding, and the last
    return assemble(reader, model_type, blocks, hidden=hidden, last_norm=norms, position_names=("seq_length",))


def build_falcon(reader: ConfigReader, model_type: str) -> ModelShape:
    """Falcon, in its three layouts: multi-query, multi-head (RW), and grouped keys (40B, 180B, Falcon 2).

    Raises:
        NotKnown: The config lacks a dimension.
    """
    hidden = reader.size("hidden_size")
    heads = _equal_heads(reader, hidden)
    grouped = reader.flag("new_decoder_architecture")
    if grouped:
        heads = replace(heads, kv_heads=reader.size("num_kv_heads", default=heads.heads))
    elif reader.flag("multi_query", True):
        heads = replace(heads, kv_heads=1)
    bias = reader.flag("bias")
    parallel = reader.flag("parallel_attn", True)
    norms = reader.size("num_ln_in_parallel_attn", default=2) if grouped else (1 if parallel else 2)
    layer = fused_attention(
        hidden, heads, ("self_attention.query_key_value", "self_attention.dense"), bias=bias, output_bias=bias
    ) + plain_mlp(
        hidden,
        reader.size("ffn_hidden_size", default=4 * hidden),
        reader.value("activation", "gelu"),
        ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        bias=bias,
        reads="attention" if norms == 1 else "mlp",
    )
    for _ in range(norms):
        layer += layer_norm(hidden)
    # transformers' Falcon hands SDPA a mask that keeps it from a fused kernel on a CPU.
    layer += Part(kept=Kept(squares=heads.heads))
    blocks = repeated("transformer.h", layer, reader.layers())
    return assemble(reader, model_type, blocks, hidden=hidden, last_norm=layer_norm(hidden))


def build_mpt(reader: ConfigReader, model_type: str) -> ModelShape:
    """MPT: ALiBi, norms and projections without biases.

    Raises:
        NotKnown: The config lacks a dimension, or has biases or head norms.
    """
    attention = ConfigReader(reader.part("attn_config")) if reader.value("attn_config") is not None else reader
    if not reader.flag("no_bias", True) or attention.flag("qk_ln"):
        raise NotKnown("an MPT with biases or head norms")
    hidden = reader.size("d_model")
    layer = (
        fused_attention(hidden, _equal_heads(reader, hidden), ("attn.Wqkv", "attn.out_proj"))
        + layer_norm(hidden, bias=False)
        + layer_norm(hidden, bias=False)
        + plain_mlp(
            hidden, reader.size("expansion_ratio") * hidden, "gelu", ("ffn.up_proj", "ffn.down_proj"), bias=False
        )
    )
    blocks = repeated("transformer.blocks", layer, reader.layers("n_layers"))
    norm = layer_norm(hidden, bias=False)
    return assemble(reader, model_type, blocks, hidden=hidden, last_norm=norm, position_names=("max_seq_len",))
