"""The default batch fits the memory at hand."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.algorithms import Algorithm
from domain.architectures.registry import read_shape
from domain.configure import Configuration, MachineFacts, configure
from domain.hardware_fit import FITTED
from domain.memory_estimate import estimate
from domain.memory_verdict import assess
from domain.model_shape import ModelShape
from domain.use_cases import UseCaseId
from services.embedded_model import CONFIG

CPU = MachineFacts(has_gpu=False, supports_bf16=False)
GPU = MachineFacts(has_gpu=True, supports_bf16=True)
GIB = 2**30


def _shape(**values: Any) -> ModelShape:
    shape = read_shape({**CONFIG, **values})
    assert shape is not None
    return shape


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


@pytest.mark.parametrize("machine", [CPU, GPU], ids=["cpu", "gpu"])
def test_nothing_changes_where_memory_is_plenty_or_not_known(machine: MachineFacts) -> None:
    plain = _make(None, machine)
    assert _make(2**45, machine) == plain


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
    assert sizes[0] <= sizes[1]


@given(st.integers(0, 40), st.sampled_from(FITTED), st.booleans())
def test_what_the_client_sets_is_left_alone(gib: int, name: str, flag: bool) -> None:
    value = flag if name == "gradient_checkpointing" else 8
    found = _make(gib * GIB, **{name: value})
    assert getattr(found.config, name) == value
    assert found.choices[name].source == "override"


def test_checkpointing_is_the_last_resort_and_says_why() -> None:
    found = _make(5 * GIB)
    assert (found.config.batch_size, found.config.gradient_checkpointing) == (1, True)
    assert found.choices["batch_size"].source == "hardware"
    assert "5.0 GiB" in found.choices["batch_size"].reason


def test_a_mixture_of_experts_gets_adapters_on_its_attention_alone() -> None:
    shape = _shape(model_type="mixtral", num_local_experts=8, num_experts_per_tok=2)
    found = configure(Algorithm.LORA, use_case=None, overrides={}, machine=CPU, shape=shape)
    assert found.config.target_modules == ["k_proj", "o_proj", "q_proj", "v_proj"]
    asked = configure(
        Algorithm.LORA, use_case=None, overrides={"target_modules": "all-linear"}, machine=CPU, shape=shape
    )
    assert asked.config.target_modules == "all-linear"
