"""Property 1: use case selection configures all parameters; overrides are kept exactly or refused."""

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import SettingRejected
from domain.configure import Configuration, MachineFacts, configure
from domain.memory.estimate import adapter_parameters
from domain.models.shape import Linear, Stacked
from domain.peft.algorithms import SPECS, Algorithm
from domain.peft.config import DECOMPOSED, PARAMETER_NAMES, PeftOverrides
from domain.peft.use_cases import USE_CASES, UseCaseId
from services.models.embedded import CONFIG
from tests.support.shapes import shape_of

CPU = MachineFacts(has_gpu=False, supports_bf16=False)
MACHINES = [CPU, MachineFacts(has_gpu=True, supports_bf16=False), MachineFacts(has_gpu=True, supports_bf16=True)]

_VALUES: dict[str, st.SearchStrategy[Any]] = {
    "rank": st.integers(1, 256),
    "alpha": st.integers(1, 512),
    "dropout": st.floats(0, 0.9),
    "target_modules": st.sampled_from(["all-linear", ["q_proj"], ["q_proj", "v_proj"]]),
    "target_experts": st.sampled_from(["auto", True, False]),
    "bias": st.just("none"),
    "use_rslora": st.booleans(),
    "use_dora": st.booleans(),
    "init_weights": st.sampled_from(["default", "gaussian", *DECOMPOSED]),
    "objective": st.sampled_from(["sft", "dpo", "orpo", "kto"]),
    "preference_beta": st.one_of(st.none(), st.floats(0.01, 10)),
    "quantization": st.sampled_from(["none", "nf4", "int8"]),
    "precision": st.sampled_from(["fp32", "bf16", "fp16"]),
    "learning_rate": st.floats(1e-7, 1),
    "batch_size": st.integers(1, 64),
    "gradient_accumulation": st.integers(1, 64),
    "epochs": st.floats(0.1, 10),
    "max_steps": st.one_of(st.none(), st.integers(1, 10**6)),
    "warmup_ratio": st.floats(0, 1),
    "scheduler": st.sampled_from(["linear", "cosine", "constant"]),
    "min_learning_rate_ratio": st.floats(0, 0.99),
    "adam_beta1": st.floats(0, 0.99),
    "adam_beta2": st.floats(0, 0.9999),
    "adam_epsilon": st.floats(1e-10, 1),
    "neftune_noise_alpha": st.floats(0, 100),
    "weight_decay": st.floats(0, 1),
    "max_grad_norm": st.floats(0.01, 100),
    "max_seq_length": st.integers(8, 8192),
    "packing": st.booleans(),
    "optimizer": st.sampled_from(["adamw", "adamw_8bit"]),
    "gradient_checkpointing": st.booleans(),
    "train_on": st.sampled_from(["assistant", "last_assistant", "all"]),
    "seed": st.integers(0, 2**31 - 1),
    "eval_every_steps": st.one_of(st.none(), st.integers(1, 10**6)),
    "early_stopping_patience": st.one_of(st.none(), st.integers(1, 100)),
    "checkpoint_every_steps": st.one_of(st.none(), st.integers(1, 10**6)),
    "checkpoint_every_minutes": st.one_of(st.none(), st.floats(0.01, 10_000)),
    "lora_plus_ratio": st.one_of(st.none(), st.floats(1, 256)),
    "loftq_iterations": st.one_of(st.none(), st.integers(1, 20)),
    "keep_checkpoints": st.integers(1, 1000),
}
overrides_of_any_kind = st.fixed_dictionaries({}, optional=_VALUES)


def _make(
    algorithm: Algorithm, use_case: UseCaseId | None, overrides: dict[str, Any], machine: MachineFacts
) -> Configuration:
    return configure(algorithm, use_case=use_case, overrides=overrides, machine=machine)


def test_the_strategy_draws_every_parameter() -> None:
    assert set(_VALUES) == set(PARAMETER_NAMES)


@pytest.mark.parametrize("machine", MACHINES, ids=["cpu", "gpu-fp16", "gpu-bf16"])
@pytest.mark.parametrize("use_case", [None, *UseCaseId])
@pytest.mark.parametrize("algorithm", Algorithm)
def test_use_case_selection_configures_all_parameters(
    algorithm: Algorithm, use_case: UseCaseId | None, machine: MachineFacts
) -> None:
    configuration = _make(algorithm, use_case, {}, machine)
    assert set(configuration.choices) == set(PARAMETER_NAMES)
    assert all(choice.reason for choice in configuration.choices.values())
    for name in PARAMETER_NAMES:
        assert getattr(configuration.config, name) == configuration.choices[name].value
    if use_case is not None:
        for name, value in USE_CASES[use_case].defaults.items():
            choice = configuration.choices[name]
            assert choice.source in ("use_case", "algorithm")
            if choice.source == "use_case":
                assert choice.value == value
    for name, value in SPECS[algorithm].fixed.items():
        assert getattr(configuration.config, name) == value


@given(
    st.sampled_from(Algorithm),
    st.one_of(st.none(), st.sampled_from(UseCaseId)),
    overrides_of_any_kind,
    st.sampled_from(MACHINES),
)
def test_overrides_are_kept_exactly_or_refused_by_name(
    algorithm: Algorithm, use_case: UseCaseId | None, overrides: dict[str, Any], machine: MachineFacts
) -> None:
    try:
        configuration = _make(algorithm, use_case, overrides, machine)
    except SettingRejected as error:
        named = {name for item in error.extras["errors"] for name in item["location"]}
        assert named and named <= set(PARAMETER_NAMES)
        assert all(item["message"] for item in error.extras["errors"])
        return
    for name, value in overrides.items():
        assert getattr(configuration.config, name) == value
        assert configuration.choices[name].source == "override"
    for name, choice in configuration.choices.items():
        assert name in overrides or choice.source != "override"


@given(st.sampled_from(UseCaseId), st.sampled_from(MACHINES))
def test_flags_are_exact_and_exclusive(use_case: UseCaseId, machine: MachineFacts) -> None:
    flags = {
        algorithm: (config.use_rslora, config.use_dora, config.init_weights, config.quantization)
        for algorithm in Algorithm
        for config in [_make(algorithm, use_case, {}, machine).config]
    }
    assert flags == {
        Algorithm.LORA: (False, False, "default", "none"),
        Algorithm.QLORA: (False, False, "default", "nf4"),
        Algorithm.DORA: (False, True, "default", "none"),
        Algorithm.PISSA: (False, False, "pissa", "none"),
        Algorithm.RSLORA: (True, False, "default", "none"),
        Algorithm.OLORA: (False, False, "olora", "none"),
        Algorithm.LORA_PLUS: (False, False, "default", "none"),
        Algorithm.LOFTQ: (False, False, "loftq", "nf4"),
    }


@pytest.mark.parametrize(
    ("algorithm", "overrides", "names"),
    [
        (Algorithm.RSLORA, {"use_rslora": False}, {"use_rslora"}),
        (Algorithm.DORA, {"use_dora": False}, {"use_dora"}),
        (Algorithm.QLORA, {"quantization": "none"}, {"quantization"}),
        (Algorithm.QLORA, {"quantization": "int8"}, {"quantization"}),
        (Algorithm.PISSA, {"init_weights": "default"}, {"init_weights"}),
        (Algorithm.PISSA, {"quantization": "int8", "use_dora": True}, {"quantization", "use_dora"}),
        (Algorithm.LORA, {"init_weights": "pissa"}, {"init_weights"}),
        (Algorithm.OLORA, {"quantization": "int8", "use_dora": True}, {"quantization", "use_dora"}),
        (Algorithm.LORA_PLUS, {"lora_plus_ratio": None, "init_weights": "loftq"}, {"lora_plus_ratio", "init_weights"}),
        (Algorithm.LOFTQ, {"loftq_iterations": None, "quantization": "none"}, {"loftq_iterations", "quantization"}),
        (Algorithm.QLORA, {"loftq_iterations": 2}, {"loftq_iterations"}),
        (Algorithm.LORA, {"precision": "fp16"}, {"precision"}),
        (Algorithm.LORA, {"optimizer": "adamw_8bit"}, {"optimizer"}),
        (Algorithm.LORA, {"early_stopping_patience": 2}, {"early_stopping_patience"}),
        (Algorithm.LORA, {"epochs": 2.0, "max_steps": 10}, {"epochs"}),
        (Algorithm.LORA, {"scheduler": "constant", "min_learning_rate_ratio": 0.1}, {"min_learning_rate_ratio"}),
    ],
)
def test_what_cannot_take_effect_on_a_cpu_is_refused_all_at_once(
    algorithm: Algorithm, overrides: dict[str, Any], names: set[str]
) -> None:
    with pytest.raises(SettingRejected) as caught:
        _make(algorithm, None, overrides, CPU)
    assert {name for item in caught.value.extras["errors"] for name in item["location"]} == names


def test_combinations_that_make_sense_are_kept() -> None:
    config = _make(Algorithm.DORA, None, {"use_rslora": True, "quantization": "nf4"}, CPU).config
    assert (config.use_dora, config.use_rslora, config.quantization) == (True, True, "nf4")


def test_alpha_is_the_same_at_every_rank_but_where_the_scaling_is_one() -> None:
    assert _make(Algorithm.LORA, UseCaseId.CHATBOT, {"rank": 8}, CPU).config.alpha == 32
    assert _make(Algorithm.LORA, UseCaseId.DOMAIN_ADAPTATION, {}, CPU).config.alpha == 32
    for algorithm in (Algorithm.PISSA, Algorithm.OLORA, Algorithm.LOFTQ):
        config = _make(algorithm, UseCaseId.CHATBOT, {"rank": 8}, CPU).config
        assert (config.alpha, config.dropout) == (8, 0.0)
        assert _make(algorithm, UseCaseId.DOMAIN_ADAPTATION, {}, CPU).config.alpha == 64
    assert _make(Algorithm.LORA, None, {"rank": 8, "alpha": 5}, CPU).config.alpha == 5


def test_the_sequence_length_is_the_models_at_most() -> None:
    shape = shape_of({**CONFIG, "max_position_embeddings": 512})
    short = configure(Algorithm.LORA, use_case=None, overrides={}, machine=CPU, shape=shape)
    assert short.config.max_seq_length == 512
    with pytest.raises(SettingRejected):
        configure(Algorithm.LORA, use_case=None, overrides={"max_seq_length": 513}, machine=CPU, shape=shape)


def test_what_all_linear_modules_leave_out_is_said() -> None:
    shape = shape_of(CONFIG)
    (block,) = shape.blocks
    router = Linear("mlp.gate", 576, 8, role="router")
    experts = Stacked("mlp.experts.down_proj", 8, 1536, 576)
    part = replace(block.part, linears=(*block.part.linears, router), stacked=(experts,))
    mixture = replace(shape, blocks=(replace(block, part=part),))
    found = configure(Algorithm.LORA, use_case=None, overrides={}, machine=CPU, shape=mixture)
    assert found.config.target_modules == "all-linear"
    reason = found.choices["target_modules"].reason
    assert "30 routers, which choose the experts, 30 tensors of stacked experts" in reason
    assert adapter_parameters(mixture, found.config) == adapter_parameters(shape, found.config)
    named = configure(Algorithm.LORA, use_case=None, overrides={"target_modules": ["gate"]}, machine=CPU, shape=mixture)
    assert adapter_parameters(mixture, named.config) == 30 * 16 * (576 + 8)


@pytest.mark.parametrize(
    "names",
    [
        ["no_such_module"],
        ["q_proj", "no_such_module"],
        ["proj"],  # the end of a name, not from a dot on
        ["self_attn"],  # no linear layer itself
        [".q_proj"],
        ["layers.30.self_attn.q_proj"],  # one layer further than there are
        ["decoder.layers.0.self_attn.q_proj"],
        [".0.self_attn.q_proj"],
        ["00.self_attn.q_proj"],
        ["9" * 5000 + ".self_attn.q_proj"],
    ],
)
def test_a_target_module_that_the_model_lacks_is_refused_with_those_that_it_has(names: list[str]) -> None:
    with pytest.raises(SettingRejected) as caught:
        configure(
            Algorithm.LORA,
            use_case=None,
            overrides={"target_modules": names, "max_seq_length": 10**6},
            machine=CPU,
            shape=shape_of(CONFIG),
        )
    said = {item["location"][0]: item["message"] for item in caught.value.extras["errors"]}
    assert set(said) == {"target_modules", "max_seq_length"}
    assert said["target_modules"].startswith(f"target_modules: the model has no linear layer named {names[-1]}; it has")
    assert all(name in said["target_modules"] for name in ("q_proj", "down_proj"))


@pytest.mark.parametrize(
    ("names", "tied", "words"),
    [
        (["lm_head"], True, "lm_head names the output head, whose weights are the embedding's as well; adapters"),
        (["lm_head"], False, "lm_head names the output head; adapters are put on the layers before it; the layers to"),
        (["q_proj", "lm_head"], False, "target_modules: lm_head names the output head"),
        (["model.lm_head"], False, "model.lm_head names the output head"),
        (["embed_tokens"], True, "embed_tokens names an embedding, which is no linear layer"),
        (["model.embed_tokens", "wte"], False, "model.embed_tokens, wte names an embedding"),
        (["norm", "lm_head"], False, "no linear layer named norm; lm_head names the output head"),
    ],
)
def test_a_head_and_an_embedding_are_not_said_to_be_missing(names: list[str], tied: bool, words: str) -> None:
    shape = shape_of({**CONFIG, "tie_word_embeddings": tied})
    with pytest.raises(SettingRejected, match=re.escape(words)) as caught:
        configure(Algorithm.LORA, use_case=None, overrides={"target_modules": names}, machine=CPU, shape=shape)
    assert "q_proj" in str(caught.value) and "named lm_head" not in str(caught.value)


@pytest.mark.parametrize(
    "names",
    [
        ["q_proj"],
        ["self_attn.q_proj", "down_proj"],
        ["29.mlp.up_proj"],
        ["layers.0.self_attn.v_proj"],
        ["model.layers.29.mlp.gate_proj"],
    ],
)
def test_a_target_module_may_be_named_by_the_end_of_its_path(names: list[str]) -> None:
    shape = shape_of(CONFIG)
    overrides = {"target_modules": names}
    found = configure(Algorithm.LORA, use_case=None, overrides=overrides, machine=CPU, shape=shape)
    assert found.config.target_modules == names


def test_target_modules_are_taken_as_they_are_where_a_models_are_not_known() -> None:
    overrides = {"target_modules": ["mtp_layers.0.self_attn.q_proj"]}
    found = configure(Algorithm.LORA, use_case=None, overrides=overrides, machine=CPU)
    assert found.config.target_modules == overrides["target_modules"]


NULLABLE = {
    "preference_beta",
    "lora_plus_ratio",
    "loftq_iterations",
    "max_steps",
    "eval_every_steps",
    "early_stopping_patience",
    "checkpoint_every_steps",
    "checkpoint_every_minutes",
}


@given(st.sampled_from(sorted(set(PARAMETER_NAMES) - NULLABLE)))
def test_null_is_refused_where_a_parameter_cannot_be_null(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        PeftOverrides.model_validate({name: None})


@pytest.mark.parametrize("value", ["16", True, 16.5, 2**63, 0, -1])
def test_a_rank_that_is_no_whole_number_in_range_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="rank"):
        PeftOverrides.model_validate({"rank": value})
