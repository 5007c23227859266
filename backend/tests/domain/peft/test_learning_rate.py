"""The default learning rate follows the model's size and the adapter's scaling."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.configure import MachineFacts, configure
from domain.models.shape import ModelShape
from domain.peft.algorithms import Algorithm
from domain.peft.learning_rate import default_learning_rate
from domain.peft.use_cases import UseCaseId
from services.models.embedded import CONFIG
from tests.support.shapes import shape_of

CPU = MachineFacts(has_gpu=False, supports_bf16=False)


def _shape(model_type: str, hidden: int) -> ModelShape:
    return shape_of({**CONFIG, "model_type": model_type, "hidden_size": hidden})


def _rate(
    shape: ModelShape | None, *, alpha: int = 32, use_rslora: bool = False, lora_plus_ratio: float | None = None
) -> float:
    return default_learning_rate(
        shape, Algorithm.LORA, alpha=alpha, use_rslora=use_rslora, lora_plus_ratio=lora_plus_ratio
    )[0]


@pytest.mark.parametrize(
    ("model_type", "hidden", "rate"),
    [
        ("llama", 4096, 2.9e-4),  # Llama-3.1-8B: 2.86e-4 by the published law
        ("llama", 8192, 1.7e-4),  # Llama-3.1-70B: 1.66e-4
        ("qwen3", 4096, 4.7e-4),  # Qwen3-8B: 4.73e-4
        ("llama", 576, 5e-4),  # below the fit
        ("mistral", 4096, 4.7e-4),  # a family outside the fit
    ],
)
def test_the_rate_of_a_model(model_type: str, hidden: int, rate: float) -> None:
    assert _rate(_shape(model_type, hidden)) == rate


def test_without_a_model_the_rate_is_that_of_qlora() -> None:
    assert _rate(None) == 2e-4


@given(st.integers(1, 200), st.integers(1, 200), st.sampled_from(["llama", "qwen2", "gemma2"]))
def test_a_larger_model_never_gets_a_higher_rate(one: int, other: int, model_type: str) -> None:
    small, large = sorted((one, other))
    assert _rate(_shape(model_type, 64 * small)) >= _rate(_shape(model_type, 64 * large))


@given(st.integers(1, 4096), st.booleans())
def test_the_rate_times_the_scaling_stays(alpha: int, use_rslora: bool) -> None:
    shape = _shape("llama", 2048)
    product = _rate(shape, alpha=alpha, use_rslora=use_rslora) * alpha * (2.5 if use_rslora else 1)
    assert product == pytest.approx(4.91e-4 * 32, rel=0.06)


def test_the_rate_says_where_it_is_from_and_follows_what_the_client_sets() -> None:
    shape = _shape("llama", 4096)

    def choose(use_case: UseCaseId | None = None, **overrides: object) -> tuple[float, str, str]:
        found = configure(Algorithm.LORA, use_case=use_case, overrides=overrides, machine=CPU, shape=shape)
        choice = found.choices["learning_rate"]
        return choice.value, choice.source, choice.reason

    assert choose()[:2] == (2.9e-4, "default")
    assert "LoRA Without Regret" in choose()[2]
    assert choose(alpha=64)[0] == 1.4e-4
    assert choose(UseCaseId.CREATIVE_WRITING)[:2] == (1.45e-4, "use_case")
    assert choose(learning_rate=1e-3)[:2] == (1e-3, "override")


def test_lora_plus_keeps_the_geometric_mean_of_its_two_rates() -> None:
    shape = _shape("llama", 2048)
    assert _rate(shape, lora_plus_ratio=16.0) == pytest.approx(_rate(shape) / 4, rel=0.03)
    found = configure(Algorithm.LORA_PLUS, use_case=None, overrides={}, machine=CPU, shape=shape)
    assert "lora_plus_ratio=16" in found.choices["learning_rate"].reason


@pytest.mark.parametrize("algorithm", [Algorithm.PISSA, Algorithm.OLORA, Algorithm.LOFTQ])
def test_parts_of_the_weights_get_a_rate_of_their_own(algorithm: Algorithm) -> None:
    found = configure(algorithm, use_case=None, overrides={}, machine=CPU, shape=_shape("llama", 576))
    choice = found.choices["learning_rate"]
    assert (choice.value, choice.source) == (2e-4, "algorithm")
    two = configure(algorithm, use_case=None, overrides={"lora_plus_ratio": 16.0}, machine=CPU).choices["learning_rate"]
    assert (two.value, two.source) == (5e-5, "algorithm") and "lora_plus_ratio=16" in two.reason
