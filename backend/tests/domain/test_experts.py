"""Experts are adapted where that is asked for, or known to fit; what cannot be done says why."""

from dataclasses import replace
from typing import Any

import pytest

from core.errors import SettingRejected
from domain.configure import Configuration, MachineFacts, configure
from domain.memory.activations import kept_by_layers, largest_batch
from domain.memory.estimate import adapter_parameters, estimate
from domain.memory.verdict import assess
from domain.models.shape import Linear, ModelShape, Stacked, Stored
from domain.peft.algorithms import Algorithm
from services.models.embedded import CONFIG
from tests.support.shapes import shape_of

CPU = MachineFacts(has_gpu=False, supports_bf16=False)
DENSE = shape_of(CONFIG)
PLENTY = 2**45
LAYERS, EXPERTS, WIDE, NARROW = 30, 8, 1536, 576
PARAMETERS = LAYERS * EXPERTS * 16 * (WIDE + NARROW) * 2


def _mixture(*, reached: bool = True, stored: Stored | None = None) -> ModelShape:
    (block,) = DENSE.blocks
    stacked = (
        Stacked("mlp.experts.gate_up_proj", EXPERTS, NARROW, WIDE, reached=reached),
        Stacked("mlp.experts.down_proj", EXPERTS, WIDE, NARROW, reached=reached),
    )
    return replace(DENSE, blocks=(replace(block, part=replace(block.part, stacked=stacked)),), stored=stored)


def _list_of_experts() -> ModelShape:
    (block,) = DENSE.blocks
    expert = Linear("mlp.experts.0.w1", NARROW, WIDE, role="expert")
    return replace(DENSE, blocks=(replace(block, part=replace(block.part, linears=(*block.part.linears, expert))),))


def _configured(
    shape: ModelShape | None, available: int | None, algorithm: Algorithm = Algorithm.LORA, **overrides: Any
) -> Configuration:
    return configure(algorithm, use_case=None, overrides=overrides, machine=CPU, shape=shape, available_bytes=available)


def test_experts_are_adapted_where_their_memory_fits_and_are_listed_with_their_count() -> None:
    found = _configured(_mixture(), PLENTY)
    choice = found.choices["target_experts"]
    assert (found.config.target_experts, choice.value, choice.source) == (True, True, "hardware")
    assert "LoRA Without Regret" in choice.reason and "dropout 0.05 is left out on stacked experts" in choice.reason
    assert found.trained is not None
    (experts,) = [item for item in found.trained if item.role == "expert"]
    assert (experts.modules, experts.parameters) == (2 * LAYERS, PARAMETERS)
    without = _configured(_mixture(), PLENTY, target_experts=False).config
    assert adapter_parameters(_mixture(), found.config) == adapter_parameters(_mixture(), without) + PARAMETERS


def test_without_dropout_nothing_is_said_of_it() -> None:
    assert "dropout" not in _configured(_mixture(), PLENTY, dropout=0.0).choices["target_experts"].reason


def test_they_stay_where_they_do_not_fit_with_the_sizes() -> None:
    shape = _mixture()
    leanest: dict[str, Any] = {
        "batch_size": 1,
        "gradient_accumulation": 1,
        "gradient_checkpointing": True,
        "precision": "fp32",
        "max_seq_length": 8192,  # so that training takes more than loading, with either allocator
    }
    without = _configured(shape, PLENTY, target_experts=False, **leanest).config
    enough_without = round(estimate(shape, without, on_gpu=False).high_bytes * 1.01)
    found = _configured(shape, enough_without, **leanest)
    assert found.config.target_experts is False
    reason = found.choices["target_experts"].reason
    assert "do not fit safely" in reason and "GiB are estimated" in reason
    assert found.trained is not None and not [item for item in found.trained if item.role == "expert"]


def test_what_is_asked_for_is_kept_even_if_it_does_not_fit_and_leaving_them_out_is_suggested() -> None:
    shape = _mixture()
    found = _configured(shape, 2**30, target_experts=True)
    assert found.config.target_experts is True and found.choices["target_experts"].source == "override"
    assessment = assess(shape, found.config, 2**30, on_gpu=False)
    assert {"target_experts": False} in [dict(item.overrides) for item in assessment.suggestions]


@pytest.mark.parametrize(
    ("shape", "algorithm", "overrides", "words"),
    [
        (DENSE, Algorithm.LORA, {}, "the model has no experts"),
        (_mixture(reached=False), Algorithm.LORA, {}, "the model has no experts"),
        (_mixture(), Algorithm.DORA, {}, "no DoRA on stacked experts"),
        (_mixture(), Algorithm.LORA, {"use_dora": True}, "no DoRA on stacked experts"),
        (_mixture(), Algorithm.PISSA, {}, "the initialisation pissa"),
        (_mixture(stored=Stored("mxfp4", 4.25)), Algorithm.LORA, {}, "published in mxfp4"),
    ],
)
def test_what_cannot_be_done_is_refused_if_asked_for_and_the_reason_where_left_open(
    shape: ModelShape, algorithm: Algorithm, overrides: dict[str, Any], words: str
) -> None:
    with pytest.raises(SettingRejected, match=words) as caught:
        _configured(shape, PLENTY, algorithm, target_experts=True, **overrides)
    assert [item["location"] for item in caught.value.extras["errors"]] == [["target_experts"]]
    for asked in ({}, {"target_experts": "auto"}):
        found = _configured(shape, PLENTY, algorithm, **overrides, **asked)
        assert found.config.target_experts is False and words in found.choices["target_experts"].reason


def test_named_modules_and_unknown_memory_leave_them_out_unless_they_are_asked_for() -> None:
    named = _configured(_mixture(), PLENTY, target_modules=["q_proj"])
    assert named.config.target_experts is False and "target_modules" in named.choices["target_experts"].reason
    unknown = _configured(_mixture(), None)
    assert unknown.config.target_experts is False and "free" in unknown.choices["target_experts"].reason
    both = _configured(_mixture(), None, target_modules=["q_proj"], target_experts=True).config
    assert adapter_parameters(_mixture(), both) == PARAMETERS + LAYERS * 16 * 2 * NARROW
    assert _configured(None, PLENTY).config.target_experts == "auto"


def test_experts_of_a_list_follow_the_same_rule() -> None:
    shape = _list_of_experts()
    with_experts, without = _configured(shape, PLENTY), _configured(shape, None)
    assert (with_experts.config.target_experts, without.config.target_experts) == (True, False)
    assert "dropout" not in with_experts.choices["target_experts"].reason  # linear modules have it
    more = adapter_parameters(shape, with_experts.config) - adapter_parameters(shape, without.config)
    assert more == LAYERS * 16 * (WIDE + NARROW)
    dora = _configured(shape, PLENTY, Algorithm.DORA)
    assert dora.config.target_experts is True


def test_on_a_base_in_four_bits_it_is_said_that_experts_are_not() -> None:
    reason = _configured(_mixture(), PLENTY, Algorithm.QLORA).choices["target_experts"].reason
    assert "stacked experts stay in fp32, since nf4 reaches linear layers alone" in reason


def test_experts_named_as_modules_are_told_of_the_setting() -> None:
    with pytest.raises(SettingRejected, match="target_experts asks for stacked experts"):
        _configured(_mixture(), PLENTY, target_modules=["gate_up_proj"])


def test_the_estimate_counts_the_sums_of_weights_and_adapters() -> None:
    """Without checkpointing every layer's W + B·A is kept, with it one layer's."""
    shape, weights = _mixture(), 2 * EXPERTS * WIDE * NARROW * 4
    for checkpointing, layers in ((False, LAYERS), (True, 1)):
        kept = [
            estimate(
                shape,
                _configured(
                    shape, None, target_experts=experts, dropout=0.0, gradient_checkpointing=checkpointing
                ).config,
                on_gpu=False,
            ).activations_bytes
            for experts in (False, True)
        ]
        assert kept[1] - kept[0] >= layers * weights


def test_a_layer_computes_with_the_gradient_of_its_largest_stack() -> None:
    working = []
    for experts in (False, True):
        config = _configured(_mixture(), None, target_experts=experts).config
        working.append(kept_by_layers(_mixture(), config, largest_batch(config), on_gpu=False).working_bytes)
    assert working[1] - working[0] == EXPERTS * WIDE * NARROW * 4


def test_the_allocator_loses_nothing_of_the_sums() -> None:
    """Measured with glibc's heap, which holds most of smaller tensors: 635 MiB more for 600 MiB of sums."""
    lost = []
    for experts in (False, True):
        config = _configured(_mixture(), None, target_experts=experts, dropout=0.0).config
        lost.append(kept_by_layers(_mixture(), config, largest_batch(config), on_gpu=False))
    assert lost[1].all_bytes == lost[0].all_bytes and lost[1].plain_bytes == lost[0].plain_bytes
    assert lost[1].peak_bytes - lost[0].peak_bytes == LAYERS * 2 * EXPERTS * WIDE * NARROW * 4
