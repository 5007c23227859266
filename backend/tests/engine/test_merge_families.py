"""Merges of families that transformers holds otherwise than their files do: stacked experts, renamed tensors."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families.small_models import make_small
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from domain.peft.algorithms import Algorithm
from engine import merge as module
from engine.merged_weights import MergedWeights, adapter_attached, corrected
from engine.stored_names import StoredNames
from tests.engine.test_merge import TOLERANCE, run
from tests.engine.test_methods import PROBE, config_for, load
from tests.support.stock_adapters import make_random_adapter, stock_logits

# PEFT warns of the patterns that it writes itself for parameters.
pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
# gpt_oss holds its experts (in, out), with biases, and the others (out, in); ernie4_5_moe has a module below its
# router, and names it otherwise in its files.
FAMILIES = (
    *("mixtral", "qwen3_moe", "ernie4_5_moe", "glm4_moe_lite", "deepseek_v32", "glm_moe_dsa", "minimax_m2"),
    *("gemma3_text", "gpt_oss"),
)
# PEFT's meaning of it takes stacked experts and routers in for some families.
ALL: dict[str, Any] = {"target_modules": "all-linear"}
EXPERTS: dict[str, Any] = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
ONE_OF_TWO: dict[str, Any] = {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"{family} all-linear": (family, ALL) for family in FAMILIES},
    **{f"{family} experts": (family, EXPERTS) for family in ("mixtral", "deepseek_v32", "gpt_oss")},
    "qwen3_moe one parameter of two": ("qwen3_moe", ONE_OF_TWO),
    "ernie4_5_moe rslora": ("ernie4_5_moe", EXPERTS | {"use_rslora": True, "r": 4}),
    "mixtral ranks by layer": ("mixtral", EXPERTS | {"rank_pattern": {"experts.down_proj": 2}}),
}


def keys(folder: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return the name, shape and type of each tensor of a folder."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no mapping
                part = tensors.get_slice(name)
                found[name] = (tuple(part.get_shape()), part.get_dtype())
    return found


@pytest.mark.parametrize("case", CASES)
def test_a_family_is_merged_as_stock_transformers_and_peft_answer(tiny_path: Path, tmp_path: Path, case: str) -> None:
    family, settings = CASES[case]
    source = make_small(family, tmp_path / "base", tiny_path)
    adapter = make_random_adapter(source, tmp_path / "adapter", **settings)
    expected = stock_logits(source, PROBE, adapter)
    assert (expected - stock_logits(source, PROBE)).abs().max() > 0.005
    run(load(source, config_for(Algorithm.LORA)), tmp_path, adapter)
    assert (stock_logits(tmp_path / "merged", PROBE) - expected).abs().max() <= TOLERANCE
    assert keys(tmp_path / "merged") == keys(source)


@pytest.mark.parametrize("family", ["mixtral", "ernie4_5_moe"])
def test_shards_hold_whole_groups_however_small_they_are(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    monkeypatch.setattr(module, "_SHARD_BYTES", 2**12)
    source = make_small(family, tmp_path / "base", tiny_path)
    adapter = make_random_adapter(source, tmp_path / "adapter", **EXPERTS)
    run(load(source, config_for(Algorithm.LORA)), tmp_path, adapter)
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 5
    assert (stock_logits(tmp_path / "merged", PROBE) - stock_logits(source, PROBE, adapter)).abs().max() <= TOLERANCE
    assert keys(tmp_path / "merged") == keys(source)


def test_a_tensor_keeps_its_own_type_though_the_model_names_it_otherwise(tiny_path: Path, tmp_path: Path) -> None:
    """The router's correction stays in fp32 beside weights in bf16; it has another name in the files."""
    source = make_small("ernie4_5_moe", tmp_path / "base", tiny_path, torch.bfloat16)
    adapter = make_random_adapter(source, tmp_path / "adapter", **ALL)
    run(load(source, config_for(Algorithm.LORA)), tmp_path, adapter)
    types = {name.rsplit(".", 1)[-1]: kind for name, (_, kind) in keys(source).items()}
    assert types["e_score_correction_bias"] == "F32" and types["weight"] == "BF16"
    assert keys(tmp_path / "merged") == keys(source)


def test_an_adapter_on_stacked_experts_in_sixteen_bits_is_added_in_full_precision(
    tiny_path: Path, tmp_path: Path
) -> None:
    """PEFT rounds the correction of a stack to the stack's type before it adds it; here it is rounded once."""
    source = make_small("mixtral", tmp_path / "base", tiny_path, torch.bfloat16)
    adapter = make_random_adapter(source, tmp_path / "adapter", **EXPERTS)
    config = config_for(Algorithm.LORA)
    base = load(source, config.model_copy(update={"precision": "bf16"}))
    exact = load(source, config)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    with adapter_attached(base, "adp", adapter), adapter_attached(exact, "adp", adapter):
        in_bf16 = MergedWeights(base, "adp").compute(name, torch.float32)
        expected = MergedWeights(exact, "adp").compute(name, torch.float32)
    assert (in_bf16 - expected).abs().max() <= 1e-7


def test_the_correction_of_a_stack_is_the_one_that_peft_adds(tiny_path: Path, tmp_path: Path) -> None:
    """Of experts that are held as (experts, in, out) as well."""
    source = make_small("gpt_oss", tmp_path / "base", tiny_path)
    adapter = make_random_adapter(source, tmp_path / "adapter", **EXPERTS | {"target_modules": ["q_proj"]})
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source), str(adapter))
    layers = [module for module in model.modules() if isinstance(module, ParamWrapper)]
    assert len(layers) == 4
    for layer in layers:
        weight = layer.get_param().detach()
        expected = weight + layer.get_delta_weight("default")
        assert (expected - weight).abs().max() > 1e-3
        assert torch.allclose(corrected(layer, "default", weight), expected, rtol=0, atol=1e-7)


def test_tensors_that_a_file_holds_as_one_are_turned_back_together(tiny_path: Path, tmp_path: Path) -> None:
    source = make_small("mixtral", tmp_path / "base", tiny_path)
    model = AutoModelForCausalLM.from_pretrained(source)
    names = StoredNames(model)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    groups = names.groups(shapes)
    assert sorted(name for group in groups for name in group) == sorted(shapes)
    found = {name: shape for group in groups for name, shape in names.of({one: shapes[one] for one in group}).items()}
    assert found == {name: shape for name, (shape, _) in keys(source).items()}
