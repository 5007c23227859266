"""A merged model answers as base and adapter do, and the base does not notice."""

import copy
import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from core.errors import StorageFull
from core.manifest import verify
from domain.exports import MergedModel
from domain.peft.algorithms import Algorithm
from domain.peft.config import PeftConfig
from domain.protocol import AboutExport, Merge, Progress
from engine import merge as module
from engine import methods
from engine.base import Base
from engine.channel import Channel, Stopped
from engine.errors import BadSetting
from engine.merge import merge
from tests.engine.test_methods import PROBE, config_for, create, disturb, kept, load, logits
from tests.support.training_command import TestChannel

# Of fp32 weights: the sum of base and correction rounds once, and a product of sums is not a sum of products.
TOLERANCE = 5e-6
ABOUT = AboutExport(
    adapter_id="adp", adapter_name="adapter", adapter_version=1, base_model_id="tests/tiny", base_revision=None,
    format="merged", created_at="2026-01-01T00:00:00.000000Z",
)  # fmt: skip


def make_adapter(base: Base, config: PeftConfig, folder: Path, size: float = 0.02) -> torch.Tensor:
    """Write an adapter that changes much, and return the logits that it gives; the base is left without it."""
    folder.mkdir(parents=True)
    with kept(base, config, folder.parent):
        initial = create(base, config)
        disturb(base, size)
        state, lora = methods.adapter_state(base.model, "adp"), base.model.peft_config["adp"]
        if initial:
            state, lora = methods.as_plain_lora(state, initial, lora)
    base.detach("adp")
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    lora.save_pretrained(str(folder))
    base.tokenizer.save_pretrained(folder)
    base.attach("adp", folder)
    with base.using("adp"):
        given = logits(base)
    base.detach("adp")
    return given


def command_for(folder: Path, adapter: Path) -> Merge:
    return Merge(
        request_id="r", adapter_id="adp", adapter_path=str(adapter), output_path=str(folder / "merged"),
        base_model_id="tests/tiny", about=ABOUT,
    )  # fmt: skip


def run(base: Base, folder: Path, adapter: Path, channel: Channel | None = None) -> MergedModel:
    return merge(base, command_for(folder, adapter), channel or TestChannel())


def logits_of(folder: Path, dtype: torch.dtype | None = None) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        return model(input_ids=PROBE, use_cache=False).logits.float()


def state_of(base: Base) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in base.model.state_dict().items()}


@pytest.mark.parametrize("algorithm", Algorithm)
def test_the_merged_model_gives_the_adapters_logits_and_the_base_stays_as_it_was(
    tiny_path: Path, tmp_path: Path, algorithm: Algorithm
) -> None:
    config = config_for(algorithm)
    base = load(tiny_path, config)
    bare, before = logits(base), state_of(base)
    expected = make_adapter(base, config, tmp_path / "adapter")
    result = run(base, tmp_path, tmp_path / "adapter")

    assert (expected - bare).abs().max() > 0.05  # an adapter that changes nothing would prove nothing
    found = logits_of(tmp_path / "merged")
    assert (found - expected).abs().max() <= TOLERANCE
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
    after = state_of(base)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert base.adapters == [] and torch.equal(logits(base), bare)
    assert (result.dtype, result.adapted_layers) == ("float32", 14)
    assert any("4-bit NF4" in note for note in result.notes) == (config.quantization == "nf4")


def test_a_base_in_eight_bits_is_dequantised_and_left_alone(tiny_path: Path, tmp_path: Path) -> None:
    # Training in 8 bits is offered on a GPU only, but bitsandbytes computes the same on a CPU.
    config = config_for(Algorithm.LORA).model_copy(update={"quantization": "int8"})
    base = load(tiny_path, config)
    bare, before = logits(base), state_of(base)
    expected = make_adapter(base, config, tmp_path / "adapter")
    result = run(base, tmp_path, tmp_path / "adapter")
    # An 8-bit layer also rounds its input, which no merged weight can repeat.
    assert (logits_of(tmp_path / "merged") - expected).abs().max() < 0.05 < (expected - bare).abs().max()
    after = state_of(base)
    assert all(torch.equal(before[name], after[name]) for name in before) and torch.equal(logits(base), bare)
    assert "8-bit" in result.notes[0]


def test_other_adapters_on_the_base_are_left_there_and_are_not_merged(tiny_path: Path, tmp_path: Path) -> None:
    config = config_for(Algorithm.LORA)
    base = load(tiny_path, config)
    expected = make_adapter(base, config, tmp_path / "adapter")
    other = config_for(Algorithm.RSLORA, target_modules=["q_proj"])
    base.create("other", methods.lora_config(other, base.model, "tests/tiny", None))
    disturb(base, 0.1)
    base.model.eval()
    with base.using("other"):
        others = logits(base)
    run(base, tmp_path, tmp_path / "adapter")
    assert (logits_of(tmp_path / "merged") - expected).abs().max() <= TOLERANCE
    assert base.adapters == ["other"]
    with base.using("other"):
        assert torch.equal(logits(base), others)


def test_a_sixteen_bit_base_is_written_in_its_own_type_and_untouched_weights_to_the_bit(
    tiny_path: Path, tmp_path: Path
) -> None:
    source = tmp_path / "bf16"
    AutoModelForCausalLM.from_pretrained(tiny_path, dtype=torch.bfloat16).save_pretrained(source)
    AutoTokenizer.from_pretrained(tiny_path).save_pretrained(source)
    config = config_for(Algorithm.LORA, target_modules=["q_proj"])
    assert config.precision == "fp32"
    base = load(source, config)
    expected = make_adapter(base, config, tmp_path / "adapter")
    result = run(base, tmp_path, tmp_path / "adapter")

    merged, original = load_file(tmp_path / "merged/model.safetensors"), load_file(source / "model.safetensors")
    assert merged.keys() == original.keys()
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    for name, tensor in merged.items():
        assert torch.equal(tensor, original[name]) == ("q_proj" not in name)
    # bf16 keeps 8 bits: each merged weight is off by at most 2^-9 of itself.
    assert (logits_of(tmp_path / "merged", torch.float32) - expected).abs().max() <= 0.02
    assert json.loads((tmp_path / "merged/config.json").read_text())["dtype"] == "bfloat16"
    assert result.notes == [
        "Base and adapter were added in fp32 and rounded to bfloat16, the type of the base's own files."
    ]


def test_the_folder_is_whole_documented_and_loads_with_the_trained_template(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SHARD_BYTES", 2**18)
    config = config_for(Algorithm.DORA)
    base = load(tiny_path, config)
    expected = make_adapter(base, config, tmp_path / "adapter")
    (tmp_path / "adapter/chat_template.jinja").write_text("{{ messages }}")
    channel = TestChannel()
    result = run(base, tmp_path, tmp_path / "adapter", channel)
    folder = tmp_path / "merged"

    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1 and result.size_bytes == sum(
        tensor.nbytes for shard in shards for tensor in load_file(shard).values()
    )
    assert (logits_of(folder) - expected).abs().max() <= TOLERANCE
    assert AutoTokenizer.from_pretrained(folder).chat_template == "{{ messages }}"
    about = verify(folder)
    assert about == json.loads((folder / "export.json").read_text())
    assert about["adapter_id"] == "adp" and about["packages"]["peft"]
    fractions = [event.fraction for event in channel.events if isinstance(event, Progress) and event.fraction]
    assert fractions == sorted(fractions) and fractions[-1] == 1.0
    assert "base_model: tests/tiny" in (folder / "README.md").read_text()


def test_an_adapter_without_a_tokenizer_gets_the_bases_with_its_own_template(tiny_path: Path, tmp_path: Path) -> None:
    config = config_for(Algorithm.LORA)
    base = load(tiny_path, config)
    make_adapter(base, config, tmp_path / "adapter")
    (tmp_path / "adapter/tokenizer.json").unlink()
    (tmp_path / "adapter/chat_template.jinja").write_text("{{ messages }}")
    run(base, tmp_path, tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.chat_template == "{{ messages }}"
    assert tokenizer("the quick").input_ids == base.tokenizer("the quick").input_ids


def test_tied_tensors_are_saved_once_unless_the_adapter_changes_one_of_them(tiny_path: Path, tmp_path: Path) -> None:
    config = config_for(Algorithm.LORA)
    model = AutoModelForCausalLM.from_pretrained(tiny_path)
    tied = copy.deepcopy(model.config)
    tied.tie_word_embeddings = True
    tied_model = type(model)(tied)
    tied_model.load_state_dict(model.state_dict())
    tied_model.tie_weights()
    tied_model.save_pretrained(tmp_path / "tied")
    AutoTokenizer.from_pretrained(tiny_path).save_pretrained(tmp_path / "tied")

    base = load(tmp_path / "tied", config)
    expected = make_adapter(base, config, tmp_path / "adapter")
    run(base, tmp_path, tmp_path / "adapter")
    assert "lm_head.weight" not in load_file(tmp_path / "merged/model.safetensors")
    assert (logits_of(tmp_path / "merged") - expected).abs().max() <= TOLERANCE

    with pytest.warns(UserWarning, match="ensure_weight_tying"):
        base.create("adp", LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["lm_head", "q_proj"]))
    disturb(base)
    base.model.eval()
    expected = logits(base)
    result = run(base, tmp_path, tmp_path / "adapter")
    assert "lm_head.weight" in load_file(tmp_path / "merged/model.safetensors")
    assert (logits_of(tmp_path / "merged") - expected).abs().max() <= TOLERANCE
    assert any("one tensor" in note for note in result.notes)
    assert base.adapters == ["adp"]


def test_a_merge_that_is_stopped_or_has_no_room_leaves_nothing(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(Algorithm.LORA)
    base = load(tiny_path, config)
    make_adapter(base, config, tmp_path / "adapter")
    bare = logits(base)
    with pytest.raises(Stopped):
        run(base, tmp_path, tmp_path / "adapter", TestChannel(stop_at=5, mode="discard"))
    assert base.adapters == [] and torch.equal(logits(base), bare)
    monkeypatch.setattr(module, "_RESERVE_BYTES", 2**62)
    with pytest.raises(StorageFull, match="free"):
        run(base, tmp_path, tmp_path / "adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"] and base.adapters == []


def test_an_adapter_that_is_not_finite_is_not_merged(tiny_path: Path, tmp_path: Path) -> None:
    config = config_for(Algorithm.LORA)
    base = load(tiny_path, config)
    make_adapter(base, config, tmp_path / "adapter")
    state = load_file(tmp_path / "adapter/adapter_model.safetensors")
    next(iter(state.values()))[0, 0] = float("nan")
    save_file(state, tmp_path / "adapter/adapter_model.safetensors")
    with pytest.raises(BadSetting, match="not finite"):
        run(base, tmp_path, tmp_path / "adapter")
    assert not (tmp_path / "merged").exists() and base.adapters == []


def test_a_class_that_takes_one_end_alone_keeps_its_own_in_config_json() -> None:
    assert module._is_taken({"model_type": "llama", "eos_token_id": [0, 2]})
    assert not module._is_taken({"model_type": "inkling_text", "eos_token_id": [0, 2]})


@pytest.mark.parametrize(("tokens", "own", "refused"), [(8, 8, False), (9, 9, False), (9, 8, True), (10, 9, True)])
def test_tokens_without_embeddings_are_refused_but_for_those_that_the_base_has(
    tokens: int, own: int, *, refused: bool
) -> None:
    def tokenizer(count: int) -> Any:
        return SimpleNamespace(get_vocab=lambda: {str(number): number for number in range(count)})

    served: Any = SimpleNamespace(tokenizer=tokenizer(tokens))
    with pytest.raises(BadSetting, match="it has grown") if refused else nullcontext():
        module.require_embeddings(served, 8, tokenizer(own))
