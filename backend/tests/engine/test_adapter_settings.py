"""What this service knows of an adapter's settings is what the installed PEFT knows of them."""

import json
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft import __version__ as peft_version
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from transformers import AutoModelForCausalLM

from domain import adapter_config
from domain.peft.layer_names import Matcher, is_targeted
from services.adapters.checks import check_adapter

MODULES = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.11.self_attn.v_proj",
    "model.layers.1.mlp.experts.0.up_proj",
    "model.vision.blocks.1.attn.q_proj",
    "lm_head",
)
KEYS = st.sampled_from([
    "q_proj", "self_attn.q_proj", "^model.layers.1.self_attn.q_proj", r".*\.1\..*", "proj", "lm_head", ".*", "x",
    r"layers\.\d+\.self_attn\.[qv]_proj", "a)|(model", "q_proj|v_proj", r"(?:self_attn|attn)\.q_proj",
    "layers.1.mlp.experts.0.up_proj",
])  # fmt: skip


def test_every_setting_of_peft_is_read_refused_or_left_out() -> None:
    kinds = (adapter_config.READ, adapter_config.CHANGING, adapter_config.TRAINING_ONLY)
    assert frozenset().union(*kinds) == {field.name for field in fields(LoraConfig)}
    assert sum(map(len, kinds)) == len(fields(LoraConfig))
    assert tuple(map(int, peft_version.split(".")[:2])) == adapter_config.PEFT_VERSION
    plain = LoraConfig()
    assert (plain.r, plain.lora_alpha) == (adapter_config.PEFT_RANK, adapter_config.PEFT_ALPHA)


@given(st.lists(KEYS, unique=True, max_size=4), st.sampled_from(MODULES))
def test_a_pattern_means_what_it_means_to_peft(keys: list[str], module: str) -> None:
    assert (Matcher(60).key_of(keys, module) or module) == get_pattern_key(keys, module)


EXPRESSIONS = KEYS.filter(lambda key: key != "a)|(model")  # which is one only within the brackets of a key


@given(
    st.lists(KEYS, max_size=3) | EXPRESSIONS,
    st.none() | st.lists(KEYS, max_size=2) | EXPRESSIONS,
    st.none() | st.integers(0, 2) | st.lists(st.integers(0, 12), max_size=2),
    st.none() | st.sampled_from(["layers", "blocks", ["layers", "blocks"], "vision.blocks", [], "experts"]),
    st.sampled_from(MODULES),
)
def test_a_layer_is_targeted_as_by_peft(
    targets: Any, excluded: Any, indexes: Any, containers: Any, module: str
) -> None:
    settings = {"target_modules": targets, "exclude_modules": excluded}
    settings |= {"layers_to_transform": indexes, "layers_pattern": containers}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = LoraConfig(**settings)
    except ValueError:  # PEFT takes no indexes beside an expression, and no containers without indexes
        return
    assert is_targeted(settings, module, Matcher(60)) == bool(check_target_module_exists(config, module))


@pytest.mark.parametrize(
    "settings",
    [
        {"alpha_pattern": {r"layers\.0\..*": 2.5, "v_proj": 9}, "lora_alpha": 12.5},
        {"rank_pattern": {r"layers\.1\..*_proj": 2}, "alpha_pattern": {r"(q|k)_proj": 0.5}},
        {"rank_pattern": {r".*\.(q|o)_proj": 3}, "use_rslora": True, "target_modules": r".*\.[qo]_proj"},
        {"layers_to_transform": [1], "layers_pattern": "layers", "alpha_pattern": {".*": 1.25}},
    ],
)
def test_an_adapter_scales_as_peft_would_scale_it(settings: dict[str, Any], tiny_path: Path, tmp_path: Path) -> None:
    config = LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]} | settings)
    own = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_path), config)
    own.save_pretrained(tmp_path)
    found = check_adapter(tmp_path, "it")
    (tmp_path / "adapter_config.json").write_text(json.dumps(found.config))
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_path), tmp_path)
    assert scales(again) == scales(own)


def scales(model: PeftModel) -> dict[str, tuple[int, float]]:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    return {name: (layer.r["default"], layer.scaling["default"]) for name, layer in layers.items()}
