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
        {"auto_mapping": "os.system"},
        {"auto_mapping": ["os", "system"]},
        {"megatron_core": "evil"},
        {"megatron_config": {"x": 1}},
        {"corda_config": {"cache_file": "x.pt"}},
        {"lora_ga_config": {"cache_file": "x.pt"}},
        {"arrow_config": {"top_k": 2}},
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
        {"a_setting_of_the_future": 3, "peft_version": "0.22.0"},
        {"enable_lora": [True, False, True]},
        {"use_merged_linear": True},
        {"rank_pattern": {"(a+": 4}},
        {"rank_pattern": {"q_proj": 8}},  # and the weights have 4
        {"rank_pattern": {"q_proj": 4.5}},
        {"rank_pattern": {"q_proj": 0}},
        {"rank_pattern": {"q_proj": True}},
        {"r": 4.5},
        {"r": 8},
        {"alpha_pattern": {"q_proj": -1}},
        {"alpha_pattern": ["q_proj"]},
        {"target_modules": [1]},
        {"target_modules": 3},
        {"layers_to_transform": ["0"]},
        {"alpha_pattern": {"q_proj": "8"}},
        {"base_model_name_or_path": ["x"]},
        {"use_dora": True},  # and there are no magnitudes
    ],
)
def test_what_would_import_unpickle_or_serve_something_else_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(AdapterRejected):
        facts(**changes)


@pytest.mark.parametrize("said", [False, None, "gaussian", "orthogonal", "eva"])
def test_layers_without_weights_would_start_at_zero(said: Any) -> None:
    found = facts(init_lora_weights=said)
    assert found.config["init_lora_weights"] is True and found.rewritten == ("init_lora_weights",)


def test_a_class_of_transformers_may_be_named() -> None:
    mapping = {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama.modeling_llama"}
    assert facts(auto_mapping=mapping, task_type=None).config["auto_mapping"] == mapping


LLAMA = {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama.modeling_llama"}


@pytest.mark.parametrize(
    ("said", "stored", "warned"),
    [
        (LLAMA | {"unsloth_fixed": True}, LLAMA, "unsloth_fixed"),
        (LLAMA | {"unsloth_fixed": True, "lora_b_layout": {"a": 1}}, LLAMA, "lora_b_layout, unsloth_fixed"),
        ({"unsloth_fixed": True}, None, "unsloth_fixed"),
        ({}, None, None),
        (
            {
                "base_model_class": "Phi3ForCausalLM",
                "parent_library": "transformers_modules.microsoft.Phi-3.modeling_phi3",
            },
            None,
            "transformers_modules",
        ),
        (
            {"base_model_class": "Gemma3ForCausalLM", "parent_library": "unsloth_compiled_module_gemma3"},
            None,
            "unsloth_compiled_module_gemma3",
        ),
    ],
)
def test_what_nobody_reads_of_auto_mapping_is_left_out_and_named(said: Any, stored: Any, warned: str | None) -> None:
    found = facts(auto_mapping=said)
    assert found.config["auto_mapping"] == stored and found.rewritten == ("auto_mapping",)
    assert [warned in warning for warning in found.warnings] == [True] * (warned is not None)


# What tools write beside PEFT's own settings: ms-swift's tuner, PEFT before 0.4, mlx-lm's converters, axolotl's and
# LLaMA-Factory's users.
FOREIGN: dict[str, Any] = {
    "lorap_emb_lr": 1e-06,
    "lorap_lr_ratio": 16.0,
    "lora_dtype": "bfloat16",
    "model_key_mapping": {"a": "b"},
    "swift_type": "LORA",
    "merge_weights": True,
    "unsloth_version": "2026.10.7",
    "num_layers": 16,
    "loftq_config": {"loftq_bits": 4},
    "eva_config": {"rho": 2.0},
    "runtime_config": {"ephemeral_gpu_offload": True},
    "ensure_weight_tying": True,
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_no_answer_depends_on_is_left_out_and_named(name: str) -> None:
    found = facts(**{name: FOREIGN[name]})
    assert name not in found.config and found.rewritten == (name,)
    assert len(found.warnings) == 1 and name in found.warnings[0]


def test_settings_that_are_not_set_stay_as_they_came() -> None:
    unset = {"enable_lora": None, "merge_weights": False, "a_setting_of_the_future": None, "use_qa_lora": False}
    found = facts(**unset)
    assert found.config == adapter_config(**unset) and (found.rewritten, found.warnings) == ((), ())


def test_a_config_of_the_fewest_settings_has_pefts_own_values() -> None:
    tensors = {
        name: (8 if shape[0] == 4 else shape[0], 8 if shape[1] == 4 else shape[1])
        for name, shape in header().shapes.items()
    }
    found = read_facts(
        "it",
        {"peft_type": "LORA", "target_modules": ["self_attn.q_proj", "self_attn.v_proj"]},
        SafetensorsHeader(tensors, {"F16": 1}),
    )
    assert (found.algorithm, found.rewritten, found.warnings) == (Algorithm.LORA, (), ())


def test_scales_may_be_fractions_and_whole_ranks_may_be_written_as_such() -> None:
    found = facts(lora_alpha=12.5, alpha_pattern={"v_proj": 22.5, "q_proj": 0}, r=4.0, rank_pattern={"v_proj": 4.0})
    assert (found.config["lora_alpha"], found.config["alpha_pattern"]) == (12.5, {"v_proj": 22.5, "q_proj": 0})
    assert repr([found.config["r"], found.config["rank_pattern"]]) == "[4, {'v_proj': 4}]"
    assert set(found.rewritten) == {"r", "rank_pattern"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_alpha": -0.5}, r"lora_alpha is '-0.5', not a number from 0 to 1000000"),
        ({"r": 2.5}, r"r is '2.5', not a whole number from 1 to 4096"),
        ({"alpha_pattern": {"q_proj": None}}, r"alpha_pattern gives 'q_proj' the value 'None', not a number"),
        ({"rank_pattern": {"q_proj": 1.5}}, r"rank_pattern gives 'q_proj' the value '1.5', not a whole number"),
        (
            {"rank_pattern": {"(q": 4}},
            r"rank_pattern: '\(\.\*\\\\\.\)\?\(\(q\)\$' is no regular expression: missing \)",
        ),
        ({"rank_pattern": {"q_proj": 8}}, r"give model.layers.0.self_attn.q_proj the rank 8, and its weights have 4"),
    ],
)
def test_a_refusal_says_what_is_wrong(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(AdapterRejected, match=words):
        facts(**changes)


@pytest.mark.parametrize(
    ("pattern", "by_layer"),
    [
        ({r"layers\.0\..*q_proj": 2.5}, {"0.self_attn.q_proj": 2.5}),
        ({r".*\.1\.self_attn\.[qv]_proj": 3}, {"1.self_attn.q_proj": 3, "1.self_attn.v_proj": 3}),
        ({"q_proj|v_proj": 3.5, "v_proj": 9}, {f"{i}.self_attn.{n}_proj": 3.5 for i in (0, 1) for n in "qv"}),
        ({"v_proj": 9, r"(q|v)_proj": 3.5}, {"0.self_attn.q_proj": 3.5, "1.self_attn.q_proj": 3.5,
                                             "0.self_attn.v_proj": 9, "1.self_attn.v_proj": 9}),
        ({r"^model\.layers\.\d\.self_attn\.v_proj": 7}, {"0.self_attn.v_proj": 7, "1.self_attn.v_proj": 7}),
        ({r"(a+)+$": 7}, {}),
    ],
)  # fmt: skip
def test_expressions_as_keys_become_the_layers_that_they_mean(pattern: Any, by_layer: Any) -> None:
    found = facts(alpha_pattern=pattern)
    assert found.config["alpha_pattern"] == {f"^model.layers.{name}": value for name, value in by_layer.items()}
    assert "alpha_pattern" in found.rewritten
    unused = [key for key in pattern if pattern[key] not in by_layer.values()]
    assert [key in found.warnings[0] for key in unused] == [True] * len(unused)


def test_ranks_follow_their_expressions() -> None:
    v = "base_model.model.model.layers.1.self_attn.v_proj"
    found = read_facts(
        "it",
        adapter_config(rank_pattern={r"layers\.1\..*v_proj": 16}),
        header(**{f"{v}.lora_A.weight": (16, 64), f"{v}.lora_B.weight": (32, 16)}),
    )
    assert found.config["rank_pattern"] == {"^model.layers.1.self_attn.v_proj": 16}


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


_STACK = "base_model.model.model.layers.0.mlp.experts"
STACKS: dict[str, tuple[int, ...]] = {
    f"{_STACK}.base_layer.lora_A.weight": (128 * 64, 64),
    f"{_STACK}.base_layer.lora_B.weight": (192, 128 * 64),
    f"{_STACK}.lora_A.weight": (128 * 64, 96),
    f"{_STACK}.lora_B.weight": (64, 128 * 64),
}
NAMES = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]


def test_adapters_on_stacked_experts_are_taken_and_told_apart_from_those_on_layers() -> None:
    found = read_facts("it", adapter_config(target_parameters=NAMES, lora_dropout=0.0), header(**STACKS))
    assert found.on_parameters and not any("experts" in path for path in found.layers)
    assert found.config["target_parameters"] == NAMES and not facts().on_parameters
    dropped = read_facts("it", adapter_config(target_parameters=NAMES, lora_dropout=0.1), header(**STACKS))
    assert dropped.config["lora_dropout"] == 0.0 and "lora_dropout" in " ".join(dropped.warnings)


@pytest.mark.parametrize(
    ("changes", "tensors", "words"),
    [
        ({}, STACKS | {f"{_STACK}.lora_A.weight": (130, 96), f"{_STACK}.lora_B.weight": (64, 130)}, "rows of A"),
        ({}, {}, "no weights for what it names"),
        ({"target_parameters": "experts"}, STACKS, "no list of names"),
        ({"target_parameters": ["(a+)+.b"]}, STACKS, "no list of names"),
        ({"use_dora": True}, STACKS, "DoRA"),
        ({"rank_pattern": {"experts.down_proj": 4}}, STACKS, "ranks by layer"),
    ],
)
def test_what_is_not_served_of_adapters_on_experts_is_refused(
    changes: dict[str, Any], tensors: dict[str, Any], words: str
) -> None:
    with pytest.raises(AdapterRejected, match=words):
        read_facts("it", adapter_config(**{"target_parameters": NAMES, **changes}), header(**tensors))
