"""Shapes against transformers itself: the same model on the meta device counts its own parameters."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from domain.memory.activations import missing_targets
from domain.models.architectures.registry import FAMILIES, read_shape
from domain.models.shape import ModelShape
from engine.methods import linear_layers

RECORDED = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "configs"
CONFIGS = sorted(RECORDED.glob("*/config.json"))
# Code that comes with the model; "mimo" and "kimi_k2" are in no release of transformers.
ELSEWHERE = {"qwen", "baichuan", "internlm2", "exaone", "phi3small", "mimo", "kimi_k2"}
# What the classes' defaults alone do not make a model of.
NEEDED: dict[str, dict[str, Any]] = {
    "hunyuan_v1_dense": {"head_dim": 128},
    "ministral": {"head_dim": 128},
    "gemma3": {"vision_config": {"vision_use_head": False}},
    "deepseek_v2": {"num_experts_per_tok": 6},
}
# gpt_bigcode calls torch.jit.script on import, which torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")


def _model(config: Any) -> torch.nn.Module:
    with torch.device("meta"):
        model: torch.nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return model


def _assert_same(shape: ModelShape | None, model: torch.nn.Module) -> None:
    assert shape is not None
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    ours = {
        f"{block.container}.{index}.{linear.path}": (linear.fan_in, linear.fan_out)
        for block in shape.blocks
        for index in block.indexes
        for linear in block.part.linears
    }
    ours |= {linear.path: (linear.fan_in, linear.fan_out) for linear in shape.loose_linears}
    assert ours == linear_layers(model)


@pytest.mark.parametrize("model_type", sorted(set(FAMILIES) - ELSEWHERE))
def test_every_known_family_has_the_modules_and_parameters_that_transformers_builds(model_type: str) -> None:
    config = CONFIG_MAPPING[model_type](**NEEDED.get(model_type, {}))
    _assert_same(read_shape(config.to_dict()), _model(config))


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral", "deepseek_v3", "gemma3", "qwen3_5_text"])
def test_a_target_module_is_missed_exactly_where_the_engine_misses_it(model_type: str) -> None:
    config = CONFIG_MAPPING[model_type](**NEEDED.get(model_type, {}))
    shape, model = read_shape(config.to_dict()), _model(config)
    assert shape is not None
    names = {".".join(path.split(".")[at:]) for path, _ in model.named_modules() for at in range(path.count(".") + 1)}
    names |= {f"{name}x" for name in names} | {name[1:] for name in names} - {""}
    layers = linear_layers(model)
    missing = {name for name in names if not any(path == name or path.endswith(f".{name}") for path in layers)}
    assert set(missing_targets(shape, sorted(names))) == missing


@pytest.mark.parametrize("model_type", sorted(set(FAMILIES) - ELSEWHERE))
def test_what_the_engine_cannot_load_is_known(model_type: str) -> None:
    model = _model(CONFIG_MAPPING[model_type](**NEEDED.get(model_type, {})))
    assert (FAMILIES[model_type].obstacle is None) == model._supports_sdpa


def test_code_from_elsewhere_is_an_obstacle() -> None:
    assert all(FAMILIES[model_type].obstacle is not None for model_type in ELSEWHERE)


@pytest.mark.skipif(not CONFIGS, reason="recorded configs are not here")
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.parent.name)
def test_published_configs_are_counted_exactly(path: Path) -> None:
    raw = json.loads(path.read_bytes())
    shape = read_shape(raw)
    assert shape is not None
    if raw["model_type"] in ELSEWHERE:
        return
    raw = {key: value for key, value in raw.items() if key not in ("auto_map", "quantization_config")}
    if raw["model_type"] == "minicpm3":
        del raw["rope_scaling"]  # transformers 5.17 fails on the published one; it holds no parameters
    _assert_same(shape, _model(AutoConfig.for_model(**raw)))
