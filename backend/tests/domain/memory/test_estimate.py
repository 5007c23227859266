"""The memory estimate: components add up and move the way they must."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core import allocator
from domain.configure import MachineFacts, configure
from domain.memory import estimate as estimate_module
from domain.memory.activations import Batch, Stack, kept_by_layers, logits_bytes, targeted
from domain.memory.estimate import (
    GLIBC,
    GPU,
    TCMALLOC,
    Platform,
    adapter_parameters,
    estimate,
    estimate_loading,
    loading_bytes,
    platform,
)
from domain.memory.loss_chunks import most_tokens
from domain.models.shape import Kept, ModelShape, Passing
from domain.peft.algorithms import Algorithm
from domain.peft.config import PeftConfig
from services.models.embedded import CONFIG, PARAMETERS
from tests.support.shapes import shape_of

CPU = MachineFacts(has_gpu=False, supports_bf16=False)


def _shape() -> ModelShape:
    return shape_of(CONFIG)


def _config(algorithm: Algorithm = Algorithm.LORA, **overrides: object) -> PeftConfig:
    return configure(algorithm, use_case=None, overrides=overrides, machine=CPU).config


def test_the_embedded_models_parameters_are_counted_exactly() -> None:
    assert _shape().parameters == PARAMETERS


def test_adapter_parameters_are_those_that_peft_counts() -> None:
    assert adapter_parameters(_shape(), _config()) == 4_884_480
    assert adapter_parameters(_shape(), _config(Algorithm.DORA)) == 5_040_000


def test_preferences_after_answers_keep_a_copy_of_the_adapter_that_is_continued() -> None:
    """Those of a new adapter are compared with the base, which is there anyway."""
    continued = {"init_weights": "adapter", "gradient_accumulation": 2}
    for objective, copies in (("dpo", 1), ("kto", 1), ("orpo", 0)):
        new = _config(objective=objective, rank=64, gradient_accumulation=2)
        before, after = (estimate(_shape(), config, on_gpu=True) for config in (new, new.model_copy(update=continued)))
        copy = copies * 4 * adapter_parameters(_shape(), new)
        assert after.adapter_bytes - before.adapter_bytes == after.total_bytes - before.total_bytes == copy
        assert (after.optimizer_bytes, after.gradients_bytes) == (before.optimizer_bytes, before.gradients_bytes)
    answers = _config(rank=64)
    assert estimate(_shape(), answers, on_gpu=True) == estimate(
        _shape(), answers.model_copy(update={"init_weights": "adapter"}), on_gpu=True
    )


@given(st.sampled_from(Algorithm), st.integers(1, 16), st.integers(8, 4096), st.integers(1, 64), st.booleans())
def test_the_components_are_the_total_and_lie_in_the_range(
    algorithm: Algorithm, batch: int, length: int, rank: int, checkpointing: bool
) -> None:
    config = _config(
        algorithm, batch_size=batch, max_seq_length=length, rank=rank, gradient_checkpointing=checkpointing
    )
    found = estimate(_shape(), config, on_gpu=False)
    parts = found.weights_bytes + found.adapter_bytes + found.gradients_bytes + found.optimizer_bytes
    assert parts + found.activations_bytes + found.logits_bytes + found.overhead_bytes == found.total_bytes
    assert found.low_bytes <= found.total_bytes <= found.high_bytes


@given(
    st.sampled_from(["batch_size", "max_seq_length", "rank"]), st.integers(8, 500), st.integers(1, 500), st.booleans()
)
def test_more_never_needs_less(name: str, value: int, more: int, checkpointing: bool) -> None:
    less: dict[str, Any] = {name: value, "gradient_checkpointing": checkpointing}
    small = estimate(_shape(), _config(**less), on_gpu=False)
    large = estimate(_shape(), _config(**less | {name: value + more}), on_gpu=False)
    assert small.total_bytes <= large.total_bytes  # equal where loading needs more than a small run


def test_four_bits_checkpointing_and_dora_move_the_estimate_the_right_way() -> None:
    plain = estimate(_shape(), _config(), on_gpu=False)
    assert estimate(_shape(), _config(Algorithm.QLORA), on_gpu=False).weights_bytes < plain.weights_bytes
    checkpointed = estimate(_shape(), _config(gradient_checkpointing=True), on_gpu=False)
    assert checkpointed.activations_bytes < plain.activations_bytes
    assert estimate(_shape(), _config(Algorithm.DORA), on_gpu=False).total_bytes > plain.total_bytes


@pytest.mark.parametrize(("has_tcmalloc", "constants"), [(True, TCMALLOC), (False, GLIBC)])
def test_a_cpu_is_judged_by_the_allocator_that_engines_have(
    monkeypatch: pytest.MonkeyPatch, has_tcmalloc: bool, constants: Platform
) -> None:
    monkeypatch.setattr(allocator, "engines_have_tcmalloc", lambda: has_tcmalloc)
    assert platform(on_gpu=False) is constants and platform(on_gpu=True) is GPU
    for config in (_config(), _config(Algorithm.QLORA)):
        found = estimate_loading(_shape(), config, on_gpu=False)
        assert found.low_bytes == int(found.total_bytes * constants.low)
        assert found.overhead_bytes >= constants.overhead_bytes


@pytest.mark.parametrize("algorithm", Algorithm)
def test_glibcs_heap_is_never_taken_for_the_smaller_one(monkeypatch: pytest.MonkeyPatch, algorithm: Algorithm) -> None:
    for checkpointing in (False, True):
        config = _config(algorithm, gradient_checkpointing=checkpointing)
        totals = []
        for has_tcmalloc in (True, False):
            monkeypatch.setattr(allocator, "engines_have_tcmalloc", lambda has=has_tcmalloc: has)
            totals.append(estimate(_shape(), config, on_gpu=False).total_bytes)
        assert totals[0] < totals[1]


def test_loading_needs_the_file_beside_the_weights_only_where_these_are_converted() -> None:
    shape = _shape()
    kept = loading_bytes(shape, _config(precision="bf16"), on_gpu=False)
    converted = loading_bytes(shape, _config(precision="fp32"), on_gpu=False)
    assert converted - kept == shape.parameters * (4 - 2 + 2)
    published = replace(shape, dtype="float32")
    assert loading_bytes(published, _config(precision="fp32"), on_gpu=False) == converted - shape.parameters * 2


@pytest.mark.parametrize(
    ("names", "layers"),
    [
        (["q_proj"], 30),
        (["self_attn.q_proj"], 30),
        (["model.layers.3.self_attn.q_proj"], 1),
        (["layers.3.self_attn.q_proj", "q_proj"], 30),
        (["3.self_attn.q_proj"], 1),
        (["model.layers.99.self_attn.q_proj"], 0),
        (["other.3.self_attn.q_proj"], 0),
        (["proj"], 0),
    ],
)
def test_a_name_means_the_modules_whose_path_ends_with_it(names: list[str], layers: int) -> None:
    found = targeted(_shape(), _config(target_modules=names))
    assert sum(count for _, count in found) == layers


@given(batch=st.integers(1, 32), length=st.integers(8, 4096), on_gpu=st.booleans())
def test_our_engine_has_the_logits_of_one_chunk_however_large_the_batch(batch: int, length: int, on_gpu: bool) -> None:
    shape, config = _shape(), _config()
    tokens, most = batch * length, most_tokens(shape.vocab, on_gpu=on_gpu)
    counted = logits_bytes(shape, config, Batch(batch, length, masked=False), on_gpu=on_gpu)
    hidden = 2 * tokens * shape.hidden * 4  # of all tokens, and their gradient
    assert counted - hidden <= 8 * min(tokens, most) * shape.vocab
    assert counted - hidden >= 4 * min(tokens, most) * shape.vocab


def test_a_class_that_is_not_taken_apart_and_other_programs_have_all_logits() -> None:
    shape, config, batch = _shape(), _config(), Batch(4, 1024, masked=False)
    everything = 12 * 4 * 1024 * shape.vocab
    assert logits_bytes(replace(shape, chunked_loss=False), config, batch) == everything
    assert logits_bytes(shape, config, batch, Stack()) == everything
    whole = estimate(replace(shape, chunked_loss=False), config, on_gpu=True, batch=batch)
    assert whole.logits_bytes == everything
    assert estimate(shape, config, on_gpu=True, batch=batch).total_bytes < whole.total_bytes - 0.8 * everything


def test_with_checkpointing_the_loss_and_the_layer_that_is_computed_again_do_not_add_up() -> None:
    config, batch = _config(gradient_checkpointing=True), Batch(1, 4096, masked=False)
    found = estimate(_shape(), config, on_gpu=True, batch=batch)
    layers = kept_by_layers(_shape(), config, batch, on_gpu=True)
    at_loss = layers.loss_bytes + logits_bytes(_shape(), config, batch, on_gpu=True)
    at_layer = layers.peak_bytes + layers.working_bytes
    assert found.activations_bytes + found.logits_bytes == max(at_loss, at_layer)


def test_what_passes_in_a_layer_counts_beside_what_the_layers_up_to_it_keep() -> None:
    """The first layer computes with a hundred times what it keeps; the others keep nothing while it does."""
    shape, config, batch = _shape(), _config(), Batch(1, 256, masked=False)
    (block,) = shape.blocks
    much = (Kept(100 * block.part.unfused.full.token),)
    wasteful = replace(block, indexes=(0,), part=replace(block.part, passing_unfused=Passing(much, much)))
    rest = replace(block, indexes=block.indexes[1:])
    before = replace(block, indexes=tuple(range(29)))
    none, plain, first, last = (
        kept_by_layers(replace(shape, blocks=blocks), config, batch, on_gpu=False)
        for blocks in ((), (block,), (wasteful, rest), (replace(wasteful, indexes=(29,)), before))
    )
    assert first.peak_bytes == last.peak_bytes == plain.peak_bytes
    a_layer = (plain.peak_bytes - none.peak_bytes) / 30
    assert last.working_bytes - first.working_bytes == pytest.approx(29 * a_layer, rel=1e-4)
    assert last.working_bytes == much[0].bytes(1, 256)
    beyond = much[0].bytes(1, 256) - block.part.unfused.full.bytes(1, 256)
    assert plain.passing_bytes == 0 and first.passing_bytes == pytest.approx(beyond, rel=0.01)


def test_glibc_loses_less_of_layers_that_compute_token_by_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate_module, "platform", lambda *, on_gpu: GLIBC)
    shape, config, batch = _shape(), _config(), Batch(4, 512, masked=False)
    (block,) = shape.blocks
    stepping = replace(shape, blocks=(replace(block, part=replace(block.part, by_token=True)),))
    layers = kept_by_layers(stepping, config, batch, on_gpu=False)
    outside = kept_by_layers(replace(shape, blocks=()), config, batch, on_gpu=False).plain_bytes
    assert layers.steps_bytes == layers.plain_bytes - outside > 0
    lost = [estimate(each, config, on_gpu=False, batch=batch).overhead_bytes for each in (shape, stepping)]
    assert lost[0] - lost[1] == pytest.approx((1 - GLIBC.slack_steps) * GLIBC.slack_layers * layers.steps_bytes, abs=2)


def test_a_layer_that_computes_by_chunks_pads_its_rows() -> None:
    shape, config = _shape(), _config()
    (block,) = shape.blocks
    chunked = replace(shape, blocks=(replace(block, part=replace(block.part, linears=(), chunk=64)),))
    held = [
        kept_by_layers(chunked, config, Batch(1, length, masked=False), on_gpu=False).working_bytes
        for length in (64, 65, 100, 128)
    ]
    assert held[0] < held[1] == held[2] == held[3]
