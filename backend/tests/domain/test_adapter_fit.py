"""An adapter fits its base, or it is said which layer does not."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.adapter_fit import fit
from domain.models.shape import Linear, ModelShape, Part, Stacked
from domain.peft.layer_names import Matcher
from tests.support.shapes import shape_of

CONFIG = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "vocab_size": 400, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_hidden_layers": 3, "max_position_embeddings": 128,
}  # fmt: skip
SHAPE = shape_of(CONFIG)
SIZES = {linear.path: (linear.fan_in, linear.fan_out) for linear in SHAPE.blocks[0].part.linears}
LEAVES = sorted(path.rpartition(".")[2] for path in SIZES)


def layers(*names: str, indexes: tuple[int, ...] = (0, 1, 2), prefix: str = "model.layers.") -> dict[str, Any]:
    paths = [path for path in SIZES if path.rpartition(".")[2] in names]
    return {f"{prefix}{index}.{path}": SIZES[path] for index in indexes for path in paths}


def problem(found: dict[str, Any], shape: ModelShape = SHAPE, **targeting: Any) -> str | None:
    return fit(found, targeting, shape).problem


@given(st.sets(st.sampled_from(LEAVES), min_size=1), st.sets(st.integers(0, 2), min_size=1))
def test_what_the_settings_name_is_all_there(names: set[str], indexes: set[int]) -> None:
    whole, some = layers(*names), layers(*names, indexes=tuple(indexes))
    expression = rf"model\.layers\.({'|'.join(map(str, sorted(indexes)))})\..*\.({'|'.join(sorted(names))})"
    assert problem(whole, target_modules=sorted(names)) is None
    assert problem(some, target_modules=sorted(names), layers_to_transform=sorted(indexes)) is None
    assert problem(some, target_modules=expression) is None
    assert problem(some, target_modules=sorted(some)) is None
    excluded = sorted(whole.keys() - some.keys())
    assert problem(some, target_modules=sorted(names), exclude_modules=excluded) is None


@given(st.sets(st.sampled_from(LEAVES), min_size=1), st.data())
def test_a_layer_that_is_missing_is_named(names: set[str], data: Any) -> None:
    whole = layers(*names)
    lost = data.draw(st.sampled_from(sorted(whole)))
    rest = {path: size for path, size in whole.items() if path != lost}
    for targets in (sorted(names), rf".*\.({'|'.join(names)})", sorted(whole)):
        assert lost in str(problem(rest, target_modules=targets))
    if names == set(LEAVES):
        assert lost in str(problem(rest, target_modules="all-linear"))


@pytest.mark.parametrize(
    "prefix",
    [
        "layers.",
        "model.model.layers.",
        "transformer.h.",
        "base_model.model.model.layers.",
        "model.layer.",
        "model.layers.7",
    ],
)
def test_a_wrong_prefix_is_named_beside_the_right_one(prefix: str) -> None:
    said = str(problem(layers("q_proj", prefix=prefix), target_modules=["q_proj"]))
    assert (
        f"{prefix}0.self_attn.q_proj and 2 more layers" in said and "as it has model.layers.0.self_attn.q_proj" in said
    )


def test_layers_that_the_base_does_not_have_are_named() -> None:
    assert "model.layers.3.self_attn.q_proj, and" in str(
        problem(layers("q_proj", indexes=(0, 1, 2, 3)), target_modules=["q_proj"])
    )
    assert "c_attn" in str(problem({"model.layers.0.self_attn.c_attn": (64, 192)}, target_modules=["c_attn"]))


def test_a_layer_of_another_size_is_named_with_both() -> None:
    found = layers("q_proj", "v_proj") | {"model.layers.1.self_attn.v_proj": (64, 64)}
    said = problem(found, target_modules=["q_proj", "v_proj"])
    assert said == (
        "its model.layers.1.self_attn.v_proj takes 64 features and gives 64, and the base's takes 64 and gives 32"
    )


def test_the_head_may_be_adapted() -> None:
    found = layers("q_proj") | {"lm_head": (64, 400)}
    assert problem(found, target_modules=["q_proj", "lm_head"]) is None
    assert "lm_head" in str(problem(found | {"lm_head": (64, 401)}, target_modules=["q_proj", "lm_head"]))


def with_layer(**changes: Any) -> ModelShape:
    block = SHAPE.blocks[0]
    return replace(SHAPE, blocks=(replace(block, part=replace(block.part, **changes)),))


def test_stacked_experts_are_left_to_the_load_and_the_rest_is_not() -> None:
    attention = tuple(linear for linear in SHAPE.blocks[0].part.linears if "attn" in linear.path)
    moe = with_layer(linears=attention, stacked=(Stacked("mlp.experts.gate_up_proj", 4, 64, 256),))
    experts = {f"model.layers.{i}.mlp.experts.{e}.up_proj": (64, 128) for i in range(3) for e in range(4)}
    assert problem(layers("q_proj") | experts, moe, target_modules=["q_proj", "up_proj"]) is None
    assert "layers.0.self_attn.q_proj" in str(
        problem(layers("q_proj", prefix="layers."), moe, target_modules=["q_proj"])
    )
    lost = layers("q_proj", indexes=(0, 2)) | experts
    assert "model.layers.1.self_attn.q_proj" in str(problem(lost, moe, target_modules=["q_proj", "up_proj"]))


def test_layers_that_no_answer_depends_on_may_be_missing() -> None:
    linears = SHAPE.blocks[0].part.linears
    idle = with_layer(linears=(*linears, Linear("self_attn.chooser.q_proj", 64, 64, role="unreached")))
    found = fit(layers("q_proj"), {"target_modules": ["q_proj"]}, idle)
    assert found.problem is None and found.lacks_idle


def test_a_base_with_a_tower_is_left_to_the_load() -> None:
    tower = replace(SHAPE, outside=Part((Linear("model.vision.proj", 8, 8, role="tower"),)))
    assert problem(layers("q_proj", prefix="language_model.model.layers."), tower, target_modules=["q_proj"]) is None


def test_an_expression_that_takes_too_long_decides_nothing() -> None:
    assert fit(layers("q_proj"), {"target_modules": ".*"}, SHAPE, Matcher(0)).problem is None
