"""Adapters on stacked experts, beside others on one base."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from families.small_models import make_small
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from domain.configure import MachineFacts, configure
from domain.peft.algorithms import Algorithm
from domain.peft.config import PeftConfig
from engine import methods
from engine.base import Base
from engine.errors import BadSetting
from engine.training import train
from tests.support.rows import preference_jsonl
from tests.support.stock_adapters import make_random_adapter, stock_logits
from tests.support.training_command import TestChannel, command_for

PROBE = torch.arange(4, 36).reshape(2, 16)
ENDS = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
CPU = MachineFacts(has_gpu=False, supports_bf16=False)


def _config(algorithm: Algorithm = Algorithm.LORA, **overrides: Any) -> PeftConfig:
    values = {"rank": 4, "max_seq_length": 64, "max_steps": 2, "batch_size": 2, "learning_rate": 1e-2}
    wanted = {**values, "target_experts": True, **overrides}
    return configure(algorithm, use_case=None, overrides=wanted, machine=CPU).config


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory, tiny_path: Path) -> Path:
    return make_small("mixtral", tmp_path_factory.mktemp("family") / "mixtral", tiny_path)


def test_experts_are_continued_and_are_what_preferences_are_compared_with(mixtral: Path, tmp_path: Path) -> None:
    folder = _trained(_base(mixtral), tmp_path / "first", max_steps=1)
    config = _config(objective="dpo", max_steps=2, warmup_ratio=0.0).model_copy(update={"init_weights": "adapter"})
    (tmp_path / "pairs.jsonl").write_text(preference_jsonl(4))
    command = command_for(
        tmp_path / "second", config, dataset_path=str(tmp_path / "pairs.jsonl"), validation_fraction=0.0,
        initial_adapter_path=str(folder),
    )  # fmt: skip
    channel = TestChannel()
    train(_base(mixtral), command, channel)
    losses = channel.losses()
    assert losses[1] == pytest.approx(math.log(2), rel=1e-5) and losses[2] != pytest.approx(losses[1], rel=1e-5)


def _base(path: Path, config: PeftConfig | None = None) -> Base:
    return Base(path, config or _config(), "cpu", "transformers")


def _answers(base: Base, adapter: str | None) -> torch.Tensor:
    base.model.eval()
    with base.using(adapter), torch.no_grad():
        logits: torch.Tensor = base.model(input_ids=PROBE, use_cache=False).logits
    return logits


def _trained(base: Base, folder: Path, **overrides: Any) -> Path:
    command = command_for(folder, _config(**overrides), adapter_id=folder.name, output_path=str(folder / "out"))
    train(base, command, TestChannel())
    return folder / "out"


def test_linear_layers_have_dropout_and_experts_have_none(mixtral: Path) -> None:
    config = _config(dropout=0.1)
    base = _base(mixtral, config)
    settings = methods.lora_config(config, base.model, "tiny", None)
    assert (settings.lora_dropout, settings.target_parameters) == (0.0, ENDS)
    base.create("adp", settings)
    methods.put_dropout(base.model, "adp", config.dropout)
    dropouts: dict[bool, set[float]] = {True: set(), False: set()}
    for module in base.model.modules():
        if isinstance(module, LoraLayer):
            place = module.lora_dropout["adp"]
            dropouts[isinstance(module, ParamWrapper)].add(place.p if isinstance(place, nn.Dropout) else 0.0)
    assert dropouts == {True: {0.0}, False: {0.1}}
    trained = sum(parameter.numel() for parameter in base.model.parameters() if parameter.requires_grad)
    assert trained == base.trainable_parameters


@pytest.mark.parametrize("overrides", [{"gradient_checkpointing": True}, {"precision": "bf16"}, {"dropout": 0.0}])
def test_a_run_learns_in_the_experts_and_says_what_is_left_out(
    mixtral: Path, tmp_path: Path, overrides: dict[str, Any]
) -> None:
    config = _config(**overrides)
    channel = TestChannel()
    train(_base(mixtral, config), command_for(tmp_path, config), channel)
    said = [words for words in channel.started().warnings if "left out on stacked experts" in words]
    assert bool(said) is (config.dropout > 0)
    written = json.loads((tmp_path / "adp" / "adapter_config.json").read_text())
    assert (sorted(written["target_parameters"]), written["lora_dropout"]) == (ENDS, 0.0)
    assert json.loads((tmp_path / "adp" / "training.json").read_text())["config"]["dropout"] == config.dropout


def test_several_adapters_stand_on_one_base_and_come_off_again(mixtral: Path, tmp_path: Path) -> None:
    base = _base(mixtral)
    plain = _answers(base, None)
    first = _trained(base, tmp_path / "first")
    alone = _answers(base, "first")
    _trained(base, tmp_path / "second", rank=2, seed=7)
    attention = make_random_adapter(mixtral, tmp_path / "attention", target_modules=["q_proj"], r=2)
    base.attach("attention", attention)
    assert base.adapters == ["first", "second", "attention"]
    torch.testing.assert_close(_answers(base, "first"), alone, rtol=0, atol=0)
    torch.testing.assert_close(_answers(base, "first"), stock_logits(mixtral, PROBE, first), rtol=0, atol=1e-5)
    torch.testing.assert_close(_answers(base, "attention"), stock_logits(mixtral, PROBE, attention), rtol=0, atol=1e-5)
    assert float((_answers(base, "second") - alone).abs().max()) > 1e-4
    torch.testing.assert_close(_answers(base, None), plain, rtol=0, atol=0)
    for name in ("second", "first", "attention"):
        base.detach(name)
        base.model.eval()
    torch.testing.assert_close(_answers(base, None), plain, rtol=0, atol=0)
    assert not [module for module in base.model.modules() if isinstance(module, LoraLayer)]


def test_an_adapter_that_does_not_fit_leaves_the_base_as_it_was(mixtral: Path, tmp_path: Path) -> None:
    base = _base(mixtral)
    plain, modules = _answers(base, None), [path for path, _ in base.model.named_modules()]
    wrong = make_random_adapter(
        mixtral, tmp_path / "wrong", target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"]
    )
    config = json.loads((wrong / "adapter_config.json").read_text())
    (wrong / "adapter_config.json").write_text(json.dumps(config | {"r": config["r"] * 2}))
    with pytest.raises(BadSetting):
        base.attach("wrong", wrong)
    assert [path for path, _ in base.model.named_modules()] == modules
    torch.testing.assert_close(_answers(base, None), plain, rtol=0, atol=0)


@pytest.mark.parametrize("algorithm", [Algorithm.DORA, Algorithm.PISSA])
def test_what_peft_cannot_do_on_experts_is_refused_by_the_engine_too(mixtral: Path, algorithm: Algorithm) -> None:
    with pytest.raises(BadSetting, match="experts cannot be adapted"):
        _base(mixtral, _config(algorithm, target_experts="auto").model_copy(update={"target_experts": True}))


def test_left_open_stacked_experts_stay_as_they_are(mixtral: Path) -> None:
    base = _base(mixtral, _config(target_experts="auto"))
    settings = methods.lora_config(_config(target_experts="auto"), base.model, "tiny", None)
    assert settings.target_parameters is None and settings.lora_dropout == _config().dropout
