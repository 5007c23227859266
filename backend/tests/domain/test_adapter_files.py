"""What an adapter from elsewhere may say: nothing that PEFT would import, unpickle, run or take for another method."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import AdapterRejected, NeedsRemoteCode, NoSafeWeights
from domain.adapter_files import check_names, read_facts
from domain.models.safetensors_header import SafetensorsHeader
from domain.peft.algorithms import Algorithm
from tests.support.adapter_double import adapter_config, adapter_tensors


def header(**changes: Any) -> SafetensorsHeader:
    tensors = {name: shape for name, (_, shape) in adapter_tensors().items()} | changes
    return SafetensorsHeader({name: shape for name, shape in tensors.items() if shape}, {"F32": 1})


def facts(**changes: Any) -> Any:
    return read_facts("it", adapter_config(**changes), header())


def test_a_sound_adapter_is_taken_as_it_is() -> None:
    found = facts()
    assert (found.config, found.rewritten) == (adapter_config(), ())
    assert (found.algorithm, found.base_model) == (Algorithm.LORA, "tests/tiny-llama")
    assert facts(use_rslora=True).algorithm is Algorithm.RSLORA


@pytest.mark.parametrize(
    "changes",
    [
        {"auto_mapping": {"base_model_class": "system", "parent_library": "os"}},
        {"auto_mapping": {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.utils.hub"}},
        {
            "auto_mapping": {
                "base_model_class": "LlamaForCausalLM",
                "parent_library": "evil.models.llama.modeling_llama",
            }
        },
        {"auto_mapping": {"base_model_class": "LlamaForCausalLM"}},
        {"auto_mapping": {}},
        {"auto_mapping": "os.system"},
        {"auto_mapping": ["os", "system"]},
        {"megatron_core": "evil"},
        {"megatron_config": {"x": 1}},
        {"corda_config": {"cache_file": "x.pt"}},
        {"lora_ga_config": {"cache_file": "x.pt"}},
        {"eva_config": {"rho": 2.0}},
        {"arrow_config": {"top_k": 2}},
        {"runtime_config": {"ephemeral_gpu_offload": True}},
        {"a_setting_of_the_future": 3},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [1, 2]},
        {"target_parameters": ["mlp.experts"]},
        {"layer_replication": [[0, 2]]},
        {"lora_bias": True},
        {"use_qalora": True},
        {"bias": "all"},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"},
        {"peft_type": "IA3"},
        {"peft_type": None},
        {"task_type": "SEQ_CLS"},
        {"r": 0},
        {"r": True},
        {"r": 10**9},
        {"lora_alpha": "8"},
        {"lora_dropout": 2},
        {"use_dora": "yes"},
        {"rank_pattern": {"(a+)+$": 8}},
        {"alpha_pattern": {"q_proj": "8"}},
        {"base_model_name_or_path": ["x"]},
        {"use_dora": True},  # and there are no magnitudes
    ],
)
def test_what_would_import_unpickle_or_serve_something_else_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(AdapterRejected):
        facts(**changes)


@pytest.mark.parametrize("said", [False, None, "gaussian", "orthogonal"])
def test_layers_without_weights_would_start_at_zero(said: Any) -> None:
    found = facts(init_lora_weights=said)
    assert found.config["init_lora_weights"] is True and found.rewritten == ("init_lora_weights",)


def test_a_class_of_transformers_may_be_named() -> None:
    mapping = {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama.modeling_llama"}
    assert facts(auto_mapping=mapping, task_type=None).config["auto_mapping"] == mapping


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_a_kernel_of_the_hub_is_refused(key: str) -> None:
    with pytest.raises(NeedsRemoteCode, match="someone/kernel"):
        facts(**{key: "someone/kernel"})
    with pytest.raises(NeedsRemoteCode, match="auto_map"):
        facts(auto_map={"AutoModel": "evil.Model"})


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": r".*(q_proj|v_proj)"},
        {"target_modules": "(a+)+b"},
        {"layers_to_transform": [0, 1], "layers_pattern": "layers"},
        {"exclude_modules": "(a+)+b"},
        {"target_modules": ["q_proj", "(a+)+b"]},
        {"target_modules": ["q_proj", "v_proj", "up_proj"]},  # which the weights lack
        {"target_modules": None},
    ],
)
def test_patterns_are_replaced_by_the_layers_that_the_weights_name(changes: dict[str, Any]) -> None:
    found = facts(**changes)
    assert found.config["target_modules"] == [
        f"model.layers.{layer}.self_attn.{name}" for layer in range(2) for name in ("q_proj", "v_proj")
    ]
    assert "target_modules" in found.rewritten
    assert not any(found.config[name] for name in ("layers_to_transform", "layers_pattern", "exclude_modules"))


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "changes",
    [
        {f"{Q}.lora_B.weight": None},
        {f"{Q}.lora_B.weight": (64, 8)},
        {f"{Q}.lora_A.weight": (4,)},
        {f"{Q}.lora_A.weight": (0, 64)},
        {f"{Q}.lora_magnitude_vector": (64,)},
        {"base_model.model.lm_head.weight": (400, 64)},
        {"base_model.model.model.embed_tokens.lora_embedding_A": (4, 400)},
        {"model.layers.0.self_attn.q_proj.lora_A.weight": (4, 64)},
    ],
)
def test_tensors_that_do_not_belong_together_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(AdapterRejected):
        read_facts("it", adapter_config(), header(**changes))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(JSON, st.sampled_from(sorted(adapter_config())))
def test_whatever_a_setting_holds_it_is_taken_or_refused_and_nothing_crashes(value: Any, name: str) -> None:
    try:
        found = read_facts("it", adapter_config(**{name: value}), header())
    except (AdapterRejected, NeedsRemoteCode):
        return
    assert found.config["peft_type"] == "LORA" and found.config["r"] >= 1


def test_pickles_are_named_and_refused() -> None:
    sound = ["adapter_config.json", "adapter_model.safetensors", "README.md"]
    check_names("it", sound)
    for name in ("optimizer.pt", "rng_state.pth", "training_args.bin", "checkpoint-1/scheduler.PT", "a/b.pkl"):
        with pytest.raises(AdapterRejected, match=name):
            check_names("it", [*sound, name])
    with pytest.raises(NoSafeWeights, match=r"adapter_model\.bin"):
        check_names("it", ["adapter_config.json", "adapter_model.bin"])
    with pytest.raises(AdapterRejected, match=r"adapter_config\.json"):
        check_names("it", ["adapter_model.safetensors"])
