"""Verdicts and what to do about them."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.configure import MachineFacts, configure
from domain.memory.activations import Batch
from domain.memory.estimate import estimate, estimate_loading
from domain.memory.verdict import Sibling, assess, assess_loading, judge, savings
from domain.models.shape import ModelShape
from domain.peft.algorithms import Algorithm
from domain.peft.config import PeftConfig
from services.models.embedded import CONFIG
from tests.support.shapes import shape_of

CPU = MachineFacts(has_gpu=False, supports_bf16=False)
GIB = 2**30
LARGE = {
    "hidden_size": 4096,
    "num_hidden_layers": 60,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
}


def _shape(**values: Any) -> ModelShape:
    return shape_of({**CONFIG, **values})


def _config(algorithm: Algorithm = Algorithm.LORA, **overrides: Any) -> PeftConfig:
    return configure(algorithm, use_case=None, overrides=overrides, machine=CPU).config


def test_the_verdict_is_tight_between_the_estimate_and_its_upper_end() -> None:
    found = replace(estimate(_shape(), _config(), on_gpu=False), total_bytes=100, high_bytes=120)
    verdicts = [judge(found, free) for free in (99, 100, 119, 120)]
    assert verdicts == ["does_not_fit", "tight", "tight", "fits"]


@pytest.mark.parametrize(
    ("values", "overrides"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, {}),
        ({"quantization_config": {"load_in_4bit": True}}, {"quantization": "nf4"}),
        ({}, {"target_modules": ["w1"]}),
    ],
)
def test_what_cannot_be_trained_or_is_not_known_never_fits(values: dict[str, Any], overrides: dict[str, Any]) -> None:
    found = assess(_shape(**values), _config(**overrides), 2**50, on_gpu=False)
    assert found.verdict == "unknown"
    assert found.blockers or found.reasons


def test_a_shape_or_a_memory_that_is_not_known_is_unknown() -> None:
    assert assess(None, _config(), 2**50, on_gpu=False).verdict == "unknown"
    assert assess_loading(None, _config(), 2**50, on_gpu=False).verdict == "unknown"
    found = assess(_shape(), _config(), None, on_gpu=False)
    assert found.verdict == "unknown" and found.estimate is not None


def test_suggestions_come_in_the_order_a_practitioner_tries_them() -> None:
    shape = _shape(hidden_size=2048, num_attention_heads=32, num_key_value_heads=8, intermediate_size=8192)
    config = _config(batch_size=2, max_seq_length=256, rank=256)
    needed = estimate(shape, config, on_gpu=False).total_bytes
    found = assess(shape, config, needed - 1, on_gpu=False).suggestions
    names = [next(iter(item.overrides)) for item in found]
    assert names == ["quantization", "gradient_checkpointing", "batch_size", "max_seq_length", "rank"]
    assert any(item.verdict != "does_not_fit" for item in found)


@given(
    st.sampled_from([Algorithm.LORA, Algorithm.QLORA, Algorithm.DORA, Algorithm.PISSA, Algorithm.RSLORA]),
    st.integers(1, 16),
    st.sampled_from([128, 500, 2048, 8192]),
    st.sampled_from([2, 8, 64, 300]),
    st.booleans(),
    st.integers(0, 60),
)
def test_a_suggestion_needs_what_it_says_when_it_is_made(
    algorithm: Algorithm, batch: int, length: int, rank: int, checkpointing: bool, gib: int
) -> None:
    config = _config(
        algorithm, batch_size=batch, max_seq_length=length, rank=rank, gradient_checkpointing=checkpointing
    )
    found = assess(_shape(), config, gib * GIB, on_gpu=False)
    assert found.estimate is not None
    assert (found.verdict == "fits") <= (not found.suggestions)
    for item in found.suggestions:
        changed = PeftConfig.model_validate(config.model_dump() | dict(item.overrides))
        needed = estimate(_shape(), changed, on_gpu=False)
        assert needed.total_bytes == item.estimate_bytes < found.estimate.total_bytes
        assert judge(needed, gib * GIB) == item.verdict


@given(st.integers(1, 64), st.integers(1, 64))
def test_a_smaller_batch_keeps_at_least_the_effective_one(batch: int, passes: int) -> None:
    config = _config(batch_size=batch, gradient_accumulation=passes)
    for item in assess(_shape(), config, GIB, on_gpu=False).suggestions:
        rows = item.overrides.get("batch_size", batch)
        together = rows * item.overrides.get("gradient_accumulation", passes)
        assert batch * passes <= together < batch * passes + rows


def test_changes_are_put_together_when_none_is_enough() -> None:
    config = _config(batch_size=16, max_seq_length=8192)
    found = assess(_shape(), config, 5 * GIB, on_gpu=False).suggestions
    assert [item.verdict for item in found[:-1]] == ["does_not_fit"] * (len(found) - 1)
    assert found[-1].verdict in ("fits", "tight")
    assert len(found[-1].overrides) > 2


def test_the_largest_smaller_model_that_fits_is_suggested() -> None:
    siblings = [
        Sibling("me/tiny", _shape(num_hidden_layers=2)),
        Sibling("me/half", _shape(num_hidden_layers=15)),
        Sibling("me/huge", _shape(num_hidden_layers=300)),
    ]
    config = _config(max_seq_length=1024)
    needed = estimate(_shape(), config, on_gpu=False).total_bytes
    found = assess(_shape(), config, needed - 1, on_gpu=False, siblings=lambda _: siblings).suggestions
    assert found[-1].change == "the smaller model me/half"
    assert not found[-1].overrides


GPTQ = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}


def test_a_target_module_that_the_model_lacks_fits_nothing() -> None:
    found = assess(_shape(), _config(target_modules=["q_proj", "no_such_module"]), 2**50, on_gpu=False)
    assert found.verdict == "unknown"
    assert found.blockers[0].startswith("the model has no linear layer named no_such_module; it has down_proj")


def test_a_smaller_model_without_a_targeted_layer_is_not_suggested() -> None:
    config = _config(target_modules=["layers.20.self_attn.q_proj"])
    siblings = [Sibling(f"me/{layers}", _shape(num_hidden_layers=layers)) for layers in (2, 20)]
    found = assess(_shape(**LARGE), config, 20 * GIB, on_gpu=False, siblings=lambda _: siblings)
    assert found.verdict == "does_not_fit" and found.suggestions
    assert not any("me/" in item.change for item in found.suggestions)


@pytest.mark.parametrize(
    ("judged", "values"),
    [
        (assess, GPTQ),
        (assess, {"max_position_embeddings": 7}),
        (assess_loading, GPTQ),
        (assess_loading, {"max_position_embeddings": 7}),
    ],
)
def test_a_smaller_model_that_would_be_refused_itself_is_not_suggested(judged: Any, values: dict[str, Any]) -> None:
    siblings = [
        Sibling("me/plain", _shape(num_hidden_layers=2)),
        Sibling("me/refused", _shape(num_hidden_layers=15, **values)),
    ]
    found = judged(_shape(**LARGE), _config(), 20 * GIB, on_gpu=False, siblings=lambda _: siblings).suggestions
    assert found[-1].change == "the smaller model me/plain"


def test_a_smaller_model_is_judged_by_the_data_as_the_model_itself_is() -> None:
    config, batch = _config(max_seq_length=4096, batch_size=8), Batch(8, 32, masked=True)
    half = _shape(num_hidden_layers=15)
    needed = estimate(half, config, on_gpu=False, batch=batch)
    assert needed.high_bytes < estimate(half, config, on_gpu=False).total_bytes
    siblings = [Sibling("me/half", half)]
    found = assess(
        _shape(**LARGE), config, needed.high_bytes, on_gpu=False, batch=batch, siblings=lambda _: siblings
    ).suggestions[-1]
    assert found.change == "the smaller model me/half"
    assert (found.estimate_bytes, found.verdict) == (needed.total_bytes, "fits")


def test_a_smaller_model_to_load_is_judged_by_what_loading_it_takes() -> None:
    config, half = _config(), _shape(num_hidden_layers=15)
    needed = estimate_loading(half, config, on_gpu=False)
    assert needed.high_bytes < estimate(half, config, on_gpu=False).total_bytes
    siblings = [Sibling("me/half", half)]
    found = assess_loading(_shape(**LARGE), config, needed.high_bytes, on_gpu=False, siblings=lambda _: siblings)
    assert found.suggestions[-1].change == "the smaller model me/half"
    assert (found.suggestions[-1].estimate_bytes, found.suggestions[-1].verdict) == (needed.total_bytes, "fits")


def test_a_load_that_does_not_fit_is_suggested_in_4_bits() -> None:
    found = assess_loading(_shape(**LARGE), _config(), 20 * GIB, on_gpu=False)
    assert found.verdict == "does_not_fit"
    assert [dict(item.overrides) for item in found.suggestions] == [{"quantization": "nf4"}]


@pytest.mark.parametrize("section", [{"load_in_4bit": True}, {"load_in_8bit": True}])
def test_weights_that_are_published_in_few_bits_are_not_suggested_in_4(section: dict[str, Any]) -> None:
    shape, config = _shape(**LARGE, quantization_config=section), _config()
    assert assess(shape, config.model_copy(update={"quantization": "nf4"}), GIB, on_gpu=False).blockers
    found = assess(shape, config, GIB, on_gpu=False)
    assert found.verdict == "does_not_fit" and found.suggestions
    assert all("quantization" not in item.overrides for item in found.suggestions)
    assert assess_loading(shape, config, GIB, on_gpu=False).verdict == "does_not_fit"
    assert assess_loading(shape, config, GIB, on_gpu=False).suggestions == []
    assert not any("quantization" in text for text in savings(shape, config, on_gpu=False))


def test_after_a_lack_of_memory_each_change_says_what_it_saves() -> None:
    config = _config(batch_size=4, gradient_accumulation=1, max_seq_length=2048)
    found = savings(_shape(), config, on_gpu=False)
    (halved,) = [text for text in found if text.startswith("batch_size=2 with gradient_accumulation=2")]
    changed = config.model_copy(update={"batch_size": 2, "gradient_accumulation": 2})
    saved = estimate(_shape(), config, on_gpu=False).total_bytes - estimate(_shape(), changed, on_gpu=False).total_bytes
    assert f"(needs about {saved / 1e9:.2g} GB less)" in halved
    assert any(text.startswith("gradient_checkpointing=true") for text in found)
    assert all("GB less)" in text and "-" not in text.rpartition("(")[2] for text in found)
