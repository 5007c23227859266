"""Families whose classes do what few do, and files that are not whole."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import trial
from families.small_models import make_small
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, XLNetConfig

from domain.configure import MachineFacts, configure
from domain.peft.algorithms import Algorithm
from domain.peft.config import PeftConfig
from domain.protocol import Generate
from engine import outline
from engine.base import Base
from engine.errors import BadModel, BadSetting
from engine.generation import generate
from engine.initialisation import create_adapter
from engine.model_class import longest_of, model_class, read_config
from engine.outline import describe
from engine.stored_names import names_for_peft

pytestmark = pytest.mark.engine
_CPU = MachineFacts(has_gpu=False, supports_bf16=False)


def _describe(family: str, folder: Path, tokenizer: Path) -> Any:
    make_small(family, folder, tokenizer)
    return describe(json.loads((folder / "config.json").read_text("utf-8"))).shape


@pytest.mark.parametrize(
    ("family", "kept"),
    [("gemma3n_text", "altup.prediction_coefs"), ("longcat_flash", "mlp.router.classifier")],
)
def test_a_weight_that_is_read_or_changed_past_its_module_gets_no_adapter(
    family: str, kept: str, tiny_path: Path, tmp_path: Path
) -> None:
    shape = _describe(family, tmp_path / "model", tiny_path)
    found = [linear.role for block in shape.blocks for linear in block.part.linears if linear.path == kept]
    assert found and set(found) == {"bypassed"}


@pytest.mark.parametrize("family", ["dbrx", "jetmoe", "glm5_next"])
def test_what_is_chosen_by_values_is_followed_without_data(family: str, tiny_path: Path, tmp_path: Path) -> None:
    assert _describe(family, tmp_path / "model", tiny_path) is not None


def test_a_list_of_linear_modules_is_outside_the_layers(tiny_path: Path, tmp_path: Path) -> None:
    shape = _describe("gemma3n_text", tmp_path / "model", tiny_path)
    assert "model.altup_projections.0" in [linear.path for linear in shape.outside.linears]


def test_a_model_whose_files_lack_a_weight_is_refused(tiny_path: Path, tmp_path: Path) -> None:
    make_small("llama", tmp_path / "model", tiny_path)
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    config = _configured(Algorithm.LORA)
    with pytest.raises(BadModel, match=r"lack 1 tensors of LlamaForCausalLM, model\.layers\.1\.mlp\.up_proj\.weight"):
        Base(tmp_path / "model", config, "cpu", "transformers")


def test_names_that_peft_would_rename_again_are_written_as_the_files_have_them(tiny_path: Path, tmp_path: Path) -> None:
    make_small("laguna", tmp_path / "model", tiny_path)
    config = AutoConfig.from_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_config(config)
    shared = "base_model.model.model.layers.1.mlp.{}.down_proj.lora_A.weight"
    plain = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    names = names_for_peft(model, [shared.format("shared_experts"), plain])
    assert names == {shared.format("shared_experts"): shared.format("shared_expert"), plain: plain}


@pytest.mark.parametrize("family", ["blip", "kosmos-2", "diffusion_gemma", "shieldgemma2"])
def test_a_class_that_takes_no_text_alone_is_refused(family: str) -> None:
    with pytest.raises(BadModel, match=r"takes no text alone|not (to )?predict the next token"):
        model_class(read_config({"model_type": family}))


def test_minus_one_position_is_no_limit() -> None:
    assert longest_of(XLNetConfig()) is None


def test_a_load_in_four_bits_follows_the_class_once(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outline, "_kept", {})
    followed: list[Any] = []
    whole = outline._followed

    def counted(model: Any, config: Any) -> outline.Places:
        followed.append(model)
        return whole(model, config)

    monkeypatch.setattr(outline, "_followed", counted)
    base = Base(tiny_path, _configured(Algorithm.QLORA), "cpu", "transformers")
    assert base.trainable_parameters > 0 and len(followed) == 1


def test_a_model_does_not_change_its_weights_as_it_answers(tiny_path: Path, tmp_path: Path) -> None:
    make_small("rwkv", tmp_path / "model", tiny_path)
    config = json.loads((tmp_path / "model" / "config.json").read_text("utf-8"))
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"rescale_every": 1}), encoding="utf-8")
    base = Base(tmp_path / "model", _configured(Algorithm.LORA), "cpu", "transformers")
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    base.model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False)
    assert all(torch.equal(before[name], tensor) for name, tensor in base.model.state_dict().items())


def test_dora_is_refused_on_a_weight_with_rows_of_zeros(tiny_path: Path) -> None:
    config = _configured(Algorithm.DORA)
    base = Base(tiny_path, config, "cpu", "transformers")
    base.model.model.layers[1].mlp.up_proj.weight.data[3:5] = 0
    with pytest.raises(BadSetting, match=r"layers\.1\.mlp\.up_proj has 2 rows of zeros"):
        create_adapter(base, "adp", config, "small/model", None)


def test_a_class_without_a_cache_answers(tiny_path: Path, tmp_path: Path) -> None:
    make_small("blt", tmp_path / "model", tiny_path)
    base = Base(tmp_path / "model", _configured(Algorithm.LORA), "cpu", "transformers")
    command = Generate(
        request_id="r", messages=None, prompt="say 1", adapter_id=None, max_new_tokens=2, temperature=0.0, top_p=1.0,
        seed=None, stop=[],
    )  # fmt: skip
    assert generate(base, command, trial._Channel()).completion_tokens <= 2  # type: ignore[arg-type]


def _configured(method: Algorithm) -> PeftConfig:
    return configure(method, use_case=None, overrides={}, machine=_CPU).config
