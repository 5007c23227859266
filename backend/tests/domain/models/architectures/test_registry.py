"""Shapes from configs: exact where the family is known, nothing where it is not."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.models.architectures.registry import FAMILIES, read_shape
from services.models.embedded import CONFIG

QWEN3_5: dict[str, Any] = {
    "model_type": "qwen3_5",
    "text_config": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 100,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_conv_kernel_dim": 4,
        "max_position_embeddings": 512,
    },
}


@pytest.mark.parametrize("model_type", ["mamba", "llama4", "no such family", "", None, 7, ["llama"], {"a": 1}])
def test_a_family_whose_layers_are_not_known_has_no_shape(model_type: object) -> None:
    assert read_shape({**CONFIG, "model_type": model_type}) is None


@given(
    st.sampled_from(sorted(FAMILIES)),
    st.dictionaries(
        st.sampled_from([*CONFIG, "text_config", "quantization_config", "layer_types", "num_experts", "d_model"]),
        st.one_of(st.none(), st.text(), st.integers(), st.booleans(), st.floats(), st.lists(st.integers())),
    ),
)
def test_a_hostile_config_has_no_shape_or_a_bounded_one(model_type: str, values: dict[str, object]) -> None:
    shape = read_shape({**CONFIG, **values, "model_type": model_type})
    assert shape is None or 0 < shape.layers <= 10_000


@pytest.mark.parametrize("layers", [10_001, 10**7, 2**63, -1, 0, "30", True, 1.5])
def test_a_number_of_layers_that_no_model_has_is_not_believed(layers: object) -> None:
    assert read_shape({**CONFIG, "num_hidden_layers": layers}) is None


def test_a_missing_dimension_is_not_guessed() -> None:
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        assert read_shape({key: value for key, value in CONFIG.items() if key != name}) is None


def test_the_text_part_of_a_nested_config_is_read() -> None:
    shape = read_shape(QWEN3_5)
    assert shape is not None
    assert (shape.model_type, shape.layers, shape.max_positions) == ("qwen3_5_text", 4, 512)
    assert [block.count for block in shape.blocks] == [3, 1]


@pytest.mark.parametrize(
    ("section", "bits"),
    [
        ({"quant_method": "mxfp4"}, 4.25),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 8 + 32 / 16384),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, 4 + 20 / 128),
        ({"quant_method": "awq", "bits": 4, "group_size": 64}, 4 + 20 / 64),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 8),
        ({"load_in_4bit": True, "bnb_4bit_use_double_quant": True}, 4 + 8 / 64 + 32 / 16384),
    ],
)
def test_a_quantised_checkpoint_says_its_bits(section: dict[str, Any], bits: float) -> None:
    shape = read_shape({**CONFIG, "quantization_config": section})
    assert shape is not None and shape.stored is not None
    assert shape.stored.bits == pytest.approx(bits)


@pytest.mark.parametrize("section", [{}, {"load_in_4bit": False, "load_in_8bit": False}])
def test_bitsandbytes_with_neither_switch_quantises_nothing(section: dict[str, Any]) -> None:
    shape = read_shape({**CONFIG, "quantization_config": {"quant_method": "bitsandbytes", **section}})
    assert shape == read_shape(CONFIG)


@pytest.mark.parametrize(
    "section",
    [
        *({"quant_method": "hqq"}, {"quant_method": "gptq"}, "fp8", {"quant_method": 4}),
        *({}, {"quant_method": None}, {"bnb_4bit_quant_type": "nf4"}, {"load_in_4bit": False, "load_in_8bit": False}),
        {"load_in_4bit": True, "load_in_8bit": True},
    ],
)
def test_an_unknown_quantisation_has_no_shape(section: object) -> None:
    assert read_shape({**CONFIG, "quantization_config": section}) is None


@pytest.mark.parametrize(
    ("values", "width"),
    [({"torch_dtype": "float32"}, 4), ({"dtype": "float16"}, 2), ({"torch_dtype": None}, 2), ({"dtype": 7}, 2)],
)
def test_the_published_type_is_read(values: dict[str, Any], width: int) -> None:
    shape = read_shape({**CONFIG, **values})
    assert shape is not None and shape.published_width == width
