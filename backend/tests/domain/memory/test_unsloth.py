"""The estimate of what a base takes that Unsloth holds: against a GPU's own figures, and how it must move."""

from collections.abc import Mapping
from typing import Any

import pytest
from gpu_points import POINTS, error, goals_missed, predicted, section, with_section
from hypothesis import given
from hypothesis import strategies as st

from domain.configure import MachineFacts, configure
from domain.memory.activations import Batch
from domain.memory.estimate import GPU as PLATFORM
from domain.memory.estimate import estimate
from domain.memory.hardware_fit import fit_to_memory
from domain.memory.unsloth import UnslothHere, host_bytes
from domain.memory.verdict import assess, judge, savings
from domain.models.shape import ModelShape
from domain.peft.algorithms import Algorithm
from domain.peft.config import PeftConfig
from tests.support.server import BACKEND
from tests.support.shapes import shape_of

HERE = UnslothHere()
GPU = MachineFacts(has_gpu=True, supports_bf16=True, unsloth=HERE)
LLAMA_1B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "tie_word_embeddings": True, "max_position_embeddings": 131072,
}  # fmt: skip
FAST = st.sampled_from([Algorithm.LORA, Algorithm.QLORA, Algorithm.DORA, Algorithm.PISSA])


def _shape(**changes: Any) -> ModelShape:
    return shape_of({**LLAMA_1B, **changes})


def _config(algorithm: Algorithm = Algorithm.LORA, **overrides: object) -> PeftConfig:
    return configure(algorithm, use_case=None, overrides=overrides, machine=GPU).config


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.name)
def test_it_is_within_the_goals_of_what_a_gpu_measured(point: Any) -> None:
    assert -0.05 <= error(point, _shape()) <= 0.15
    total, measured = (size + PLATFORM.overhead_bytes for size in (predicted(point, _shape()), point.peak_bytes))
    assert PLATFORM.low * total <= measured <= PLATFORM.high * total  # the range that the estimate gives


def test_the_median_error_is_within_the_goal() -> None:
    assert goals_missed([error(point, _shape()) for point in POINTS]) == []
    assert len(goals_missed([0.06, 0.16, -0.07])) == 3


def test_the_published_table_is_the_one_that_the_command_makes() -> None:
    document = (BACKEND.parent / "docs" / "memory-estimate.md").read_text()
    assert with_section(document, section(_shape())) == document
    assert with_section("# A title\n", ["## By engine, on a GPU", "x"]) == "# A title\n\n## By engine, on a GPU\nx\n"


@given(
    FAST,
    st.booleans(),
    st.sampled_from([0.0, 0.05]),
    st.integers(1, 16),
    st.integers(8, 4096),
    st.sampled_from([("batch_size", 3), ("max_seq_length", 700), ("rank", 40)]),
)
def test_more_rows_longer_rows_and_a_higher_rank_never_need_less(
    algorithm: Algorithm, checkpointing: bool, dropout: float, rows: int, length: int, more: tuple[str, int]
) -> None:
    asked: dict[str, Any] = {
        "batch_size": rows, "max_seq_length": length, "rank": 16, "gradient_checkpointing": checkpointing
    }  # fmt: skip
    if algorithm is not Algorithm.PISSA:
        asked["dropout"] = dropout
    name, by = more
    less, larger = (
        estimate(_shape(), _config(algorithm, **asked | {name: asked[name] + extra}), on_gpu=True, unsloth=HERE)
        for extra in (0, by)
    )
    assert less.engine == larger.engine == "unsloth"
    assert less.total_bytes <= larger.total_bytes
    assert less.host_bytes <= larger.host_bytes


@given(FAST, st.integers(1, 8), st.integers(600, 4096))
def test_checkpointing_needs_less_of_the_gpu_and_more_of_the_host(algorithm: Algorithm, rows: int, length: int) -> None:
    with_it, without = (
        estimate(
            _shape(),
            _config(algorithm, batch_size=rows, max_seq_length=length, gradient_checkpointing=on),
            on_gpu=True,
            unsloth=HERE,
        )
        for on in (True, False)
    )
    assert with_it.total_bytes < without.total_bytes
    assert without.host_bytes == 0 < with_it.host_bytes
    moved = _shape().layers * rows * length * 2048 * 2
    assert with_it.host_bytes >= moved  # every layer's input in bf16


def test_a_model_of_short_rows_is_checkpointed_on_the_gpu_alone() -> None:
    shape = _shape(max_position_embeddings=256)
    assert host_bytes(shape, _config(max_seq_length=256), Batch(64, 256, masked=True)) == 0


@pytest.mark.parametrize(
    "why",
    [
        {"overrides": {"quantization": "int8"}},
        {"overrides": {"precision": "fp32"}},
        {"shape": {"model_type": "gpt_neox"}},
        {"unsloth": None},
        {"on_gpu": False},
    ],
)
def test_what_unsloth_would_not_hold_is_counted_as_transformers_holds_it(why: Mapping[str, Any]) -> None:
    config, shape = _config(**why.get("overrides", {})), _shape(**why.get("shape", {}))
    on_gpu = why.get("on_gpu", True)
    found = estimate(shape, config, on_gpu=on_gpu, unsloth=why.get("unsloth", HERE))
    assert found == estimate(shape, config, on_gpu=on_gpu)
    assert (found.engine, found.host_bytes) == ("transformers", 0)


def test_modules_that_its_kernels_do_not_take_keep_what_peft_keeps() -> None:
    """All of q, k and v, or of the MLP, have adapters, or none of them is fused."""
    half, attention, everything = (
        estimate(
            _shape(),
            _config(gradient_checkpointing=False, target_modules=names, dropout=0.0),
            on_gpu=True,
            unsloth=HERE,
        ).activations_bytes
        for names in (["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj"], "all-linear")
    )
    assert attention < half and everything < half


def test_the_host_must_have_what_checkpointing_moves_there() -> None:
    config = _config(gradient_checkpointing=True)
    needed = estimate(_shape(), config, on_gpu=True, unsloth=HERE)
    enough, little = UnslothHere(needed.host_bytes), UnslothHere(needed.host_bytes - 1)
    assert judge(needed, 2**40, enough) == judge(needed, 2**40, HERE) == "fits"
    assert judge(needed, 2**40, little) == "does_not_fit"
    found = assess(_shape(), config, 2**40, on_gpu=True, unsloth=little)
    assert found.verdict == "does_not_fit"
    assert any("host memory" in reason for reason in found.reasons)
    assert any("Unsloth would hold the base" in reason for reason in found.reasons)
    # Where the GPU has the room, nothing is moved.
    changes = fit_to_memory(_shape(), config, 2**37, (), on_gpu=True, unsloth=little)
    assert changes["gradient_checkpointing"] is False


def test_a_family_that_was_never_measured_says_so() -> None:
    for family, said in (("llama", False), ("mistral", True)):
        found = assess(_shape(model_type=family), _config(), 2**40, on_gpu=True, unsloth=HERE)
        assert any("has not been measured" in reason for reason in found.reasons) is said


def test_a_gpu_takes_with_unsloth_what_it_cannot_take_without() -> None:
    """The defaults follow: what is free takes larger batches or no checkpointing, and the answer says with what."""

    def made(unsloth: UnslothHere | None) -> Any:
        machine = MachineFacts(has_gpu=True, supports_bf16=True, unsloth=unsloth)
        return configure(
            Algorithm.LORA, use_case=None, overrides={}, machine=machine, shape=_shape(), available_bytes=24 * 2**30
        )

    fast, plain = made(HERE), made(None)
    assert fast.fit.verdict == "fits"
    assert (fast.config.batch_size, not fast.config.gradient_checkpointing) > (
        plain.config.batch_size, not plain.config.gradient_checkpointing
    )  # fmt: skip
    assert "with Unsloth" in fast.choices["batch_size"].reason
    assert "Unsloth" not in plain.choices["batch_size"].reason


@given(FAST, st.booleans(), st.integers(1, 8), st.integers(64, 4096), st.integers(0, 2**35), st.integers(0, 2**33))
def test_the_loss_takes_smaller_chunks_where_less_is_free_and_more_room_never_fits_less(
    algorithm: Algorithm, checkpointing: bool, rows: int, length: int, available: int, more: int
) -> None:
    config = _config(algorithm, batch_size=rows, max_seq_length=length, gradient_checkpointing=checkpointing)
    order = ["does_not_fit", "tight", "fits"]
    tighter, roomier = (
        estimate(_shape(), config, on_gpu=True, unsloth=HERE, available_bytes=size)
        for size in (available, available + more)
    )
    plenty = estimate(_shape(), config, on_gpu=True, unsloth=HERE)
    assert tighter.total_bytes <= roomier.total_bytes <= plenty.total_bytes
    assert order.index(judge(tighter, available)) <= order.index(judge(roomier, available + more))


def test_qlora_of_a_small_model_with_a_large_vocabulary_fits_a_card_of_6_gib() -> None:
    config = _config(Algorithm.QLORA, batch_size=1, gradient_checkpointing=True)
    assert assess(_shape(), config, 5 * 2**30, on_gpu=True, unsloth=HERE).verdict == "fits"
    assert assess(_shape(), config, 5 * 2**30, on_gpu=True, unsloth=HERE).estimate.total_bytes < 4.5 * 2**30  # type: ignore[union-attr]


def test_what_would_save_memory_is_estimated_for_the_engine_that_ran() -> None:
    config = _config(gradient_checkpointing=False)
    assert savings(_shape(), config, on_gpu=True, unsloth=HERE) != savings(_shape(), config, on_gpu=True)
