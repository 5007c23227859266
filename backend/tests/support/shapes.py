"""Llama's shape by hand, for tests that start no engine. tests/engine/test_outline.py holds it to the class."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from domain.models.shape import Block, Kept, Linear, ModelShape, Part, Passes, Passing, Role
from domain.models.storage import read_dtype, read_stored
from domain.results import Described
from services.hub.metadata_cache import Fetched
from services.models.shapes import shape_cache, shape_key


def shape_of(config: Mapping[str, Any]) -> ModelShape:
    """Return the shape of a Llama, in whose form every value of the config is there."""
    hidden, width, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, head = config["num_attention_heads"], config.get("head_dim") or hidden // config["num_attention_heads"]
    queries, keys = heads * head, config.get("num_key_value_heads", heads) * head
    tied = bool(config.get("tie_word_embeddings", False))
    layer = Part(
        linears=(
            _linear("self_attn.q_proj", hidden, queries, "self_attn.q_proj", "attention"),
            _linear("self_attn.k_proj", hidden, keys, "self_attn.q_proj", "attention"),
            _linear("self_attn.v_proj", hidden, keys, "self_attn.q_proj", "attention"),
            _linear("self_attn.o_proj", queries, hidden, "kept", "attention"),
            _linear("mlp.gate_proj", hidden, width, "mlp.gate_proj", "mlp"),
            _linear("mlp.up_proj", hidden, width, "mlp.gate_proj", "mlp"),
            _linear("mlp.down_proj", width, hidden, "own", "mlp"),
        ),
        others=2 * hidden,
        inputs=hidden,
        kept=_layer_keeps(hidden, width, heads, queries, keys),
        unfused=_layer_keeps(hidden, width, heads, queries, keys),
        passing=_layer_passes(hidden, width),
        passing_unfused=_layer_passes(hidden, width),
    )
    # The last norm's input, and the angles of the positions, which all layers share.
    half, full = Kept(4 * (hidden + 1) + 2 * head), Kept(4 * (hidden + 1) + 4 * head)
    last = Passes(half, half, full, full)
    return ModelShape(
        family=str(config["model_type"]),
        class_name="LlamaForCausalLM",
        attention="sdpa",
        hidden=hidden,
        vocab=vocab,
        max_positions=config.get("max_position_embeddings"),
        tied_embeddings=tied,
        blocks=(Block("model.layers", tuple(range(config["num_hidden_layers"])), layer),),
        outside=Part(others=hidden, kept=last, unfused=last),
        embedding_parameters=vocab * hidden,
        head_parameters=0 if tied else vocab * hidden,
        stored=read_stored(config),
        dtype=read_dtype(config),
    )


def give_positions(folder: Path, positions: int, cache_dir: Path) -> None:
    """Let a tiny model in a folder take so many tokens, and keep its new shape where servers look for it."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"max_position_embeddings": positions}
    path.write_text(json.dumps(config))
    keep_shape(cache_dir, config)


def keep_shape(cache_dir: Path, config: Mapping[str, Any]) -> None:
    """Put a Llama's description where a server with this cache folder finds it, so that it starts no engine for it."""
    said = Described(shape=replace(shape_of(config), stored=None, dtype=None))
    shape_cache(cache_dir).get(shape_key(config), TypeAdapter(Described), lambda _: Fetched(said, None), lambda _: None)


class KnownShapes:
    """Describes Llamas without an engine, in place of ModelShapes."""

    def describe(self, config: Mapping[str, Any]) -> Described:
        """Describe a model; of another family nothing is known."""
        shape = self.known(config)
        return Described(shape=shape, problem=None if shape is not None else "it is no Llama")

    def known(self, config: Mapping[str, Any]) -> ModelShape | None:
        """Return a model's shape."""
        return shape_of(config) if config.get("model_type") == "llama" else None

    def close(self) -> None:
        """Do nothing: there is no engine."""


def _linear(path: str, fan_in: int, fan_out: int, reads: str, role: Role) -> Linear:
    return Linear(path, fan_in, fan_out, False, reads, role)


def _layer_keeps(hidden: int, width: int, heads: int, queries: int, keys: int) -> Passes:
    """Norms keep their inputs in fp32; attention its operands, its output and a sum a head; the MLP three products."""
    fp32 = 2 * (hidden + 1) + heads
    plain = 2 * queries + 2 * keys + 3 * width
    repeated = 2 * (queries - keys)  # with a mask, keys and values are repeated for all heads
    return Passes(
        Kept(4 * fp32 + 2 * plain),
        Kept(4 * fp32 + 2 * (plain + repeated), 2.0),
        Kept(4 * (fp32 + plain)),
        Kept(4 * (fp32 + plain + repeated), 4.0),
    )


def _layer_passes(hidden: int, width: int) -> Passing:
    """The gradients of the layer's output and of the MLP's three products, while the products are still there."""
    return Passing((Kept(2.0 * (hidden + 3 * width)),), (Kept(4.0 * (hidden + 3 * width)),))
