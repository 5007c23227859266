"""What of a config and a tokenizer has a place in GGUF; the rest is refused with the reason."""

from typing import Any

import pytest

from core.errors import ExportRejected
from domain.models import gguf
from domain.models.gguf import pre_tokenizer_name, read_gguf_model

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "vocab_size": 400,
    "rms_norm_eps": 1e-5,
}


def test_a_llama_is_read_and_what_it_leaves_open_is_what_transformers_takes() -> None:
    model = read_gguf_model(CONFIG)
    assert (model.architecture, model.permuted, model.head_size, model.rope_base) == ("llama", True, 16, 10000.0)
    without = {key: value for key, value in CONFIG.items() if key != "num_key_value_heads"}
    assert read_gguf_model(without).kv_heads == 4
    assert read_gguf_model(CONFIG | {"head_dim": 32}).head_size == 32
    assert not read_gguf_model(CONFIG | {"architectures": ["Qwen2ForCausalLM"]}).permuted


@pytest.mark.parametrize("where", ["rope_scaling", "rope_parameters"])
def test_positions_are_read_from_where_any_version_of_transformers_writes_them(where: str) -> None:
    said = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16}
    model = read_gguf_model(CONFIG | {where: said, "rope_theta": 5e5})
    assert (model.rope.kind, model.rope.factor, model.rope.original_positions) == ("yarn", 4.0, 64)
    assert (dict(model.rope.yarn), model.rope_base) == ({"beta_fast": 16.0}, 5e5)
    assert read_gguf_model(CONFIG | {where: {"type": "linear", "factor": 2.0}}).rope.kind == "linear"
    llama3 = read_gguf_model(CONFIG | {where: {"rope_type": "llama3", "factor": 8.0}}).rope.frequency_factors
    assert len(llama3) == 8 and min(llama3) == 1.0 and max(llama3) <= 8.0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["Phi3ForCausalLM"]}, "Phi3ForCausalLM"),
        ({"architectures": []}, "without a named architecture"),
        ({"architectures": None}, "without a named architecture"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"num_local_experts": 8}, "experts"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "longrope"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"hidden_size": None}, "lacks"),
        ({"rms_norm_eps": None}, "lacks"),
        ({"num_attention_heads": 0}, "lacks"),
    ],
)
def test_what_has_no_place_is_refused_with_the_reason(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ExportRejected, match=words):
        read_gguf_model(CONFIG | changes)


def test_a_window_is_told_where_it_matters() -> None:
    assert "4096 tokens" in read_gguf_model(CONFIG | {"sliding_window": 4096, "max_position_embeddings": 8192}).notes[0]
    for changes in (
        {"sliding_window": None},
        {"sliding_window": 4096},
        {"sliding_window": 8, "use_sliding_window": False},
    ):
        assert read_gguf_model(CONFIG | changes).notes == ()


def tokenizer(
    *steps: dict[str, Any], normalizer: Any = None, ignore_merges: bool = False, **model: Any
) -> dict[str, Any]:
    pre = {"type": "Sequence", "pretokenizers": list(steps)} if len(steps) != 1 else steps[0]
    body = {"type": "BPE", "ignore_merges": ignore_merges} | model
    return {"model": body, "normalizer": normalizer, "pre_tokenizer": pre}


def split(expression: str, **changes: Any) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False} | changes


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
RAW = BYTES | {"use_regex": False}
DIGITS = {"type": "Digits", "individual_digits": True}
LLAMA3, QWEN2 = gguf._LLAMA3, gguf._QWEN2


@pytest.mark.parametrize(
    ("said", "name"),
    [
        (tokenizer(BYTES), "gpt-2"),
        (tokenizer(DIGITS, BYTES), "smollm"),
        (tokenizer(split(LLAMA3), RAW, ignore_merges=True), "llama-bpe"),
        (tokenizer(split(LLAMA3), RAW), "smaug-bpe"),
        (tokenizer(split(QWEN2), RAW, normalizer={"type": "NFC"}), "qwen2"),
        (tokenizer(BYTES, normalizer={"type": "Sequence", "normalizers": []}), "gpt-2"),
    ],
)
def test_ways_of_splitting_have_names(said: dict[str, Any], name: str) -> None:
    assert pre_tokenizer_name(said) == name


@pytest.mark.parametrize(
    "said",
    [
        tokenizer(BYTES | {"add_prefix_space": True}),
        tokenizer(RAW),
        tokenizer(BYTES, ignore_merges=True),
        tokenizer(DIGITS | {"individual_digits": False}, BYTES),
        tokenizer(split(QWEN2), RAW, ignore_merges=True),
        tokenizer(split(QWEN2), BYTES),
        tokenizer(split(QWEN2, invert=True), RAW),
        tokenizer(split(QWEN2, behavior="Removed"), RAW),
        tokenizer(split("x"), RAW),
        tokenizer(split(QWEN2, pattern={"String": "x"}), RAW),
        tokenizer(BYTES, normalizer={"type": "Lowercase"}),
        tokenizer(BYTES, type="Unigram"),
        tokenizer({"type": "Metaspace"}),
        tokenizer(),
        {"model": {"type": "BPE"}, "pre_tokenizer": None},
        {},
    ],
)
def test_a_way_that_llama_cpp_does_not_know_is_refused(said: dict[str, Any]) -> None:
    with pytest.raises(ExportRejected):
        pre_tokenizer_name(said)


def test_the_expressions_are_those_of_the_published_tokenizers() -> None:
    assert LLAMA3 == (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    assert LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}") == QWEN2
    assert gguf._TEKKEN == (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
