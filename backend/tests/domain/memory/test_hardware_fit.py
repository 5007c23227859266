"""The default batch fits the memory at hand."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.configure import Configuration, Fit, MachineFacts, configure
from domain.memory.estimate import estimate
from domain.memory.hardware_fit import FITTED
from domain.memory.verdict import assess, judge
from domain.models.shape import ModelShape
from domain.peft.algorithms import Algorithm
from domain.peft.config import PeftConfig
from domain.peft.use_cases import UseCaseId
from services.models.embedded import CONFIG
from tests.support.shapes import shape_of

CPU = MachineFacts(has_gpu=False, supports_bf16=False)
GPU = MachineFacts(has_gpu=True, supports_bf16=True)
GIB = 2**30


def _shape(**values: Any) -> ModelShape:
    return shape_of({**CONFIG, **values})


def _make(
    available: int | None, machine: MachineFacts = CPU, algorithm: Algorithm = Algorithm.LORA, **overrides: Any
) -> Configuration:
    return configure(
        algorithm, use_case=None, overrides=overrides, machine=machine, shape=_shape(), available_bytes=available
    )


@pytest.mark.parametrize("use_case", [None, *UseCaseId])
@pytest.mark.parametrize("algorithm", Algorithm)
def test_a_model_of_135_million_fits_a_laptop_as_it_is_configured_for_it(
    algorithm: Algorithm, use_case: UseCaseId | None
) -> None:
    found = configure(algorithm, use_case=use_case, overrides={}, machine=CPU, shape=_shape(), available_bytes=20 * GIB)
    assert assess(_shape(), found.config, 20 * GIB, on_gpu=False).verdict == "fits"


def test_nothing_changes_where_memory_is_not_known_or_on_a_cpu_is_plenty() -> None:
    for machine in (CPU, GPU):
        assert _make(None, machine).fit is None
    assert _make(2**45, CPU).config == _make(None, CPU).config


def test_a_gpu_with_memory_in_plenty_takes_the_whole_step_in_one_pass() -> None:
    found = _make(2**45, GPU)
    assert (found.config.batch_size, found.config.gradient_accumulation) == (8, 1)
    assert found.config.gradient_checkpointing is False
    assert found.choices["gradient_checkpointing"].source == "hardware"


def _shapes() -> list[ModelShape]:
    """Small and large ones, with few heads and many."""
    return [
        shape_of({**CONFIG, "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads})
        for layers, hidden in ((4, 512), (32, 4096))
        for heads in (3, 32)
    ]


@given(
    st.sampled_from(_shapes()),
    st.floats(0, 200),
    st.sampled_from([CPU, GPU]),
    st.sampled_from(Algorithm),
    st.sampled_from([None, *UseCaseId]),
)
def test_what_is_proposed_fits_or_nothing_does_and_it_says_so(
    shape: ModelShape, gib: float, machine: MachineFacts, algorithm: Algorithm, use_case: UseCaseId | None
) -> None:
    available = int(gib * GIB)
    found = configure(
        algorithm, use_case=use_case, overrides={}, machine=machine, shape=shape, available_bytes=available
    )
    needed = estimate(shape, found.config, on_gpu=machine.has_gpu)
    assert found.fit == Fit(judge(needed, available), needed.total_bytes, available)
    if found.fit.verdict == "does_not_fit":
        least = min(
            estimate(shape, found.config.model_copy(update=values), on_gpu=machine.has_gpu).total_bytes
            for values in _leaner(found.config, machine)
        )
        assert least > available
        assert all("do not fit" in c.reason for c in found.choices.values() if " GiB free" in c.reason)


def _leaner(config: PeftConfig, machine: MachineFacts) -> list[dict[str, Any]]:
    """All that may be changed without changing what is learned, written out anew."""
    effective = config.batch_size * config.gradient_accumulation
    rows = [size for size in range(1, effective + 1) if effective % size == 0]
    precisions = [config.precision] if machine.has_gpu else ["fp32", "bf16"]
    return [
        {"batch_size": size, "gradient_accumulation": effective // size, "gradient_checkpointing": again}
        | {"precision": precision}
        for size in rows
        for again in (False, True)
        for precision in precisions
    ]


@given(st.integers(1, 40), st.sampled_from([CPU, GPU]), st.sampled_from(Algorithm))
def test_the_effective_batch_and_all_that_changes_learning_stay(
    gib: int, machine: MachineFacts, algorithm: Algorithm
) -> None:
    plain, fitted = _make(None, machine, algorithm), _make(gib * GIB, machine, algorithm)
    assert fitted.config.model_dump(exclude=set(FITTED)) == plain.config.model_dump(exclude=set(FITTED))
    effective = [item.config.batch_size * item.config.gradient_accumulation for item in (plain, fitted)]
    assert effective[0] == effective[1]
    for name in FITTED:
        assert fitted.choices[name].value == getattr(fitted.config, name)
    sizes = [estimate(_shape(), item.config, on_gpu=machine.has_gpu).total_bytes for item in (fitted, plain)]
    assert sizes[0] <= sizes[1] or (fitted.fit is not None and fitted.fit.verdict == "fits")


@given(st.integers(0, 40), st.sampled_from(FITTED), st.booleans())
def test_what_the_client_sets_is_left_alone(gib: int, name: str, flag: bool) -> None:
    value = {"gradient_checkpointing": flag, "precision": "bf16" if flag else "fp32"}.get(name, 8)
    overrides: dict[str, Any] = {name: value}
    found = _make(gib * GIB, **overrides)
    assert getattr(found.config, name) == value
    assert found.choices[name].source == "override"


def test_checkpointing_is_the_last_resort_and_says_why() -> None:
    found = {quarters: _make(quarters * GIB // 4) for quarters in range(1, 81)}
    recomputing = [quarters for quarters, item in found.items() if item.config.gradient_checkpointing]
    assert recomputing == list(range(1, len(recomputing) + 1)) and 4 < len(recomputing) < 60
    assert found[len(recomputing) + 1].config.batch_size == 1  # all that smaller batches can save is not enough
    last = found[recomputing[-1]]
    assert last.config.precision == "fp32" and last.choices["gradient_checkpointing"].source == "hardware"
    assert f"{recomputing[-1] / 4:.1f} GiB" in last.choices["gradient_checkpointing"].reason


def test_a_cpu_computes_in_bf16_only_where_fp32_does_not_fit() -> None:
    shape = _shape(num_hidden_layers=32, hidden_size=4096, intermediate_size=11008)
    found = {
        gib: configure(
            Algorithm.LORA, use_case=None, overrides={}, machine=CPU, shape=shape, available_bytes=gib * GIB
        ).config.precision
        for gib in (20, 400)
    }
    assert found == {20: "bf16", 400: "fp32"}
