"""A GGUF file holds what llama.cpp needs, and transformers reads the adapter's answers out of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from core.manifest import verify
from domain.exports import GgufFile
from domain.peft.algorithms import Algorithm
from domain.protocol import ExportGguf
from engine.base import Base
from engine.channel import Channel, Stopped
from engine.errors import BadSetting
from engine.gguf_export import export_gguf
from tests.engine.test_merge import ABOUT, make_adapter
from tests.engine.test_methods import PROBE, config_for, load, logits
from tests.support.training_command import TestChannel

SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
# What a type's rounding does to logits of size 1: measured, with room for another processor's order of sums.
TOLERANCE = {"f32": 2e-5, "f16": 5e-3, "bf16": 4e-2, "q8_0": 6e-2}


def make_base(tiny_path: Path, folder: Path, family: str, **changes: Any) -> Path:
    """Write a random model of another family with the tiny model's tokenizer."""
    kinds: dict[str, tuple[Any, Any]] = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "mistral": (MistralConfig, MistralForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }
    config, model = kinds[family]
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    torch.manual_seed(1)
    eos = tokenizer.eos_token_id
    # Room for the token that transformers adds to the tokenizer of a Qwen.
    made = model(config(vocab_size=len(tokenizer) + 4, eos_token_id=eos, **SHAPE | changes))
    for name, parameter in made.named_parameters():
        if name.endswith("bias"):  # zero at first: a bias that got lost would not be noticed
            torch.nn.init.normal_(parameter, std=0.5)
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(base: Base, folder: Path, quantization: Any = "f32", channel: Channel | None = None) -> GgufFile:
    command = ExportGguf(
        request_id="r", adapter_id="adp", adapter_path=str(folder / "adapter"), output_path=str(folder / "out"),
        base_model_id="tests/tiny", quantization=quantization, about=ABOUT.model_copy(update={"format": "gguf"}),
    )  # fmt: skip
    return export_gguf(base, command, channel or TestChannel())


def logits_of(folder: Path, filename: str) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=filename, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=PROBE, use_cache=False).logits


def text(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


@pytest.mark.parametrize("algorithm", Algorithm)
def test_transformers_reads_the_adapters_logits_from_the_file(
    tiny_path: Path, tmp_path: Path, algorithm: Algorithm
) -> None:
    config = config_for(algorithm)
    base = load(tiny_path, config)
    bare, before = logits(base), {name: value.clone() for name, value in base.model.state_dict().items()}
    expected = make_adapter(base, config, tmp_path / "adapter")
    result = run(base, tmp_path)
    found = logits_of(tmp_path / "out", result.filename)
    assert (found - expected).abs().max() <= TOLERANCE["f32"] < 0.05 < (expected - bare).abs().max()
    after = base.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert any("4-bit NF4" in note for note in result.notes) == (config.quantization == "nf4")


@pytest.mark.parametrize("quantization", ["f16", "bf16", "q8_0"])
def test_each_type_is_stored_and_rounds_as_it_should(tiny_path: Path, tmp_path: Path, quantization: str) -> None:
    config = config_for(Algorithm.LORA)
    base = load(tiny_path, config)
    expected = make_adapter(base, config, tmp_path / "adapter")
    result = run(base, tmp_path, quantization)
    kinds = {"f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
    assert result.tensors == {"F32": 5, kinds[quantization]: 16}  # the norms, and all matrices
    reader = GGUFReader(tmp_path / "out" / result.filename)
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {"F32", kinds[quantization]}
    difference = (logits_of(tmp_path / "out", result.filename) - expected).abs().max()
    assert 0 < difference <= TOLERANCE[quantization]


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mistral", {"sliding_window": 64}),
        ("qwen2", {}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {"head_dim": 128}),  # transformers' reader knows no other size for it
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"head_dim": 32}),
        ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True, "rms_norm_eps": 1e-4}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    ],
)
def test_every_family_is_read_back(tiny_path: Path, tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    source = make_base(tiny_path, tmp_path / "base", family, **changes)
    config = config_for(Algorithm.LORA)
    base = load(source, config)
    expected = make_adapter(base, config, tmp_path / "adapter")
    result = run(base, tmp_path)
    reader = GGUFReader(tmp_path / "out" / result.filename)
    names = {tensor.name for tensor in reader.tensors}
    assert ("output.weight" in names) != changes.get("tie_word_embeddings", False)
    biased = family == "qwen2" or "attention_bias" in changes
    assert ("blk.0.attn_q.bias" in names) == biased
    if "mlp_bias" in changes:
        # transformers' reader knows no biases of a Llama; the rows are compared with the model's own instead.
        return _check_permuted_biases(reader, base)
    found = logits_of(tmp_path / "out", result.filename)
    assert (found - expected).abs().max() <= 5e-5
    assert any("64 tokens" in note for note in result.notes) == ("sliding_window" in changes)


def _check_permuted_biases(reader: GGUFReader, base: Base) -> None:
    """llama.cpp's order: of a head, the first of one half, the first of the other, the second of each and so on."""
    stored = {tensor.name: torch.tensor(tensor.data.copy()) for tensor in reader.tensors}
    attention = base.model.model.layers[1].self_attn
    for name, module, heads in (("attn_q", attention.q_proj, 4), ("attn_k", attention.k_proj, 2)):
        rows = [16 * head + half * 8 + pair for head in range(heads) for pair in range(8) for half in range(2)]
        assert torch.equal(stored[f"blk.1.{name}.bias"], module.bias.detach()[rows])
        assert not torch.equal(stored[f"blk.1.{name}.bias"], module.bias.detach())
    assert torch.equal(stored["blk.1.attn_v.bias"], attention.v_proj.bias.detach())
    assert torch.equal(stored["blk.1.ffn_up.bias"], base.model.model.layers[1].mlp.up_proj.bias.detach())


def test_llama_3s_frequencies_are_those_of_transformers(tiny_path: Path, tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    source = make_base(tiny_path, tmp_path / "base", "llama", rope_parameters=scaling)
    config = config_for(Algorithm.LORA)
    base = load(source, config)
    make_adapter(base, config, tmp_path / "adapter")
    result = run(base, tmp_path)
    reader = GGUFReader(tmp_path / "out" / result.filename)
    factors = next(torch.tensor(tensor.data) for tensor in reader.tensors if tensor.name == "rope_freqs.weight")
    plain = 500.0 ** (-torch.arange(0, 16, 2) / 16)
    assert torch.allclose(plain / factors, base.model.model.rotary_emb.inv_freq, rtol=1e-6)
    assert len(set(factors.tolist())) > 2


def test_the_metadata_says_what_the_model_and_its_tokenizer_are(tiny_path: Path, tmp_path: Path) -> None:
    config = config_for(Algorithm.LORA)
    base = load(tiny_path, config)
    make_adapter(base, config, tmp_path / "adapter")
    result = run(base, tmp_path, "q8_0")
    assert result.filename == "tiny-adp-q8_0.gguf"
    reader = GGUFReader(tmp_path / "out" / result.filename)
    expected = {
        "general.architecture": "llama",
        "general.file_type": 7,
        "general.base_model.0.name": "tests/tiny",
        "llama.block_count": 2,
        "llama.context_length": 256,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 128,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.eos_token_id": base.tokenizer.eos_token_id,
        "tokenizer.ggml.padding_token_id": base.tokenizer.pad_token_id,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": base.tokenizer.chat_template,
    }
    assert {key: text(reader, key) for key in expected} == expected
    tokens, kinds = text(reader, "tokenizer.ggml.tokens"), text(reader, "tokenizer.ggml.token_type")
    assert tokens == base.tokenizer.convert_ids_to_tokens(range(len(base.tokenizer)))
    assert [kinds[number] for number in base.tokenizer.all_special_ids] == [3] * len(base.tokenizer.all_special_ids)
    merges = json.loads((tmp_path / "adapter/tokenizer.json").read_text())["model"]["merges"]
    assert text(reader, "tokenizer.ggml.merges") == [" ".join(pair) for pair in merges]
    read = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file=result.filename)
    sample = "the quick brown fox say 3 twice"
    assert read(sample).input_ids == base.tokenizer(sample).input_ids
    about = verify(tmp_path / "out")
    assert about["adapter_id"] == "adp" and about["packages"]["gguf"]


def test_rows_that_cannot_be_packed_are_stored_otherwise_and_it_is_said(tiny_path: Path, tmp_path: Path) -> None:
    source = make_base(tiny_path, tmp_path / "base", "llama", intermediate_size=72)
    config = config_for(Algorithm.LORA)
    base = load(source, config)
    expected = make_adapter(base, config, tmp_path / "adapter")
    result = run(base, tmp_path, "q8_0")
    assert result.tensors == {"F16": 2, "F32": 5, "Q8_0": 14}
    assert any("blk.0.ffn_down.weight" in note for note in result.notes)
    assert (logits_of(tmp_path / "out", result.filename) - expected).abs().max() <= TOLERANCE["q8_0"]


def test_more_embeddings_than_tokens_are_named_and_fewer_refused(tiny_path: Path, tmp_path: Path) -> None:
    count = len(AutoTokenizer.from_pretrained(tiny_path))
    config = config_for(Algorithm.LORA)
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=count + 3, eos_token_id=tokenizer.eos_token_id, **SHAPE))
    for folder, size in (("more", count + 3), ("fewer", count - 1)):
        model.resize_token_embeddings(size)
        model.save_pretrained(tmp_path / folder / "base")
        tokenizer.save_pretrained(tmp_path / folder / "base")
    base = load(tmp_path / "more/base", config)
    make_adapter(base, config, tmp_path / "more/adapter")
    reader = GGUFReader(tmp_path / "more/out" / run(base, tmp_path / "more").filename)
    assert text(reader, "tokenizer.ggml.tokens")[count:] == [f"[PAD{count + number}]" for number in range(3)]
    assert text(reader, "tokenizer.ggml.token_type")[count:] == [5] * 3
    base = load(tmp_path / "fewer/base", config)
    make_adapter(base, config, tmp_path / "fewer/adapter")
    with pytest.raises(BadSetting, match="embeddings"):
        run(base, tmp_path / "fewer")


def test_what_llama_cpp_would_read_otherwise_is_refused_and_nothing_is_left(tiny_path: Path, tmp_path: Path) -> None:
    config = config_for(Algorithm.LORA)
    base = load(tiny_path, config)
    make_adapter(base, config, tmp_path / "adapter")
    with pytest.raises(Stopped):
        run(base, tmp_path, channel=TestChannel(stop_at=5, mode="discard"))
    path = tmp_path / "adapter/tokenizer.json"
    tokenizer = json.loads(path.read_text())
    split = {"type": "Split", "pattern": {"Regex": "x"}, "behavior": "Isolated", "invert": False}
    bytes_step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, bytes_step]}
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(BadSetting, match="no pre-tokenizer like"):
        run(base, tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["adapter"] and base.adapters == []


def test_values_beyond_f16_are_refused(tiny_path: Path, tmp_path: Path) -> None:
    config = config_for(Algorithm.LORA)
    base = load(tiny_path, config)
    make_adapter(base, config, tmp_path / "adapter")
    with torch.no_grad():
        base.model.lm_head.weight[0, 0] = 1e5
    with pytest.raises(BadSetting, match="bf16"):
        run(base, tmp_path, "f16")
    run(base, tmp_path, "bf16")
