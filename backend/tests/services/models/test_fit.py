import pytest

from domain.models.records import ModelSummary
from domain.peft.algorithms import Algorithm
from services.models.fit import fit_of

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 1000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}


def test_a_model_of_which_nothing_is_known_is_not_judged() -> None:
    summary = ModelSummary(model_id="me/m")
    assert fit_of(None, summary, "lora") is fit_of({"model_type": "nobodys"}, summary, "lora") is None


@pytest.mark.parametrize("algorithm", Algorithm)
@pytest.mark.parametrize("positions", [1, 7])
def test_a_model_that_no_default_goes_with_is_not_judged(algorithm: Algorithm, positions: int) -> None:
    config = CONFIG | {"max_position_embeddings": positions}
    assert fit_of(config, ModelSummary(model_id="me/m"), algorithm.value) is None
    assert fit_of(CONFIG | {"max_position_embeddings": 8}, ModelSummary(model_id="me/m"), algorithm.value) is not None
