"""Packing is taken only where the model itself keeps the rows of a sequence apart."""

from pathlib import Path

import pytest
import torch
from families.small_models import make_small

from domain.peft.algorithms import Algorithm
from engine.errors import BadSetting
from engine.packing import require_rows_kept_apart
from engine.training import train
from tests.engine.test_methods import config_for, load
from tests.support.training_command import TestChannel, command_for

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gemma2", "deepseek_v3"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_attention_keeps_packed_rows_apart(family: str, precision: str, tiny_path: Path, tmp_path: Path) -> None:
    make_small(family, tmp_path / family, tiny_path)
    require_rows_kept_apart(load(tmp_path / family, config_for(Algorithm.LORA, precision=precision)))


@pytest.mark.parametrize("family", ["mamba", "qwen3_5_text", "olmo_hybrid", "bloom", "gpt_oss"])
def test_a_state_or_a_mask_of_its_own_does_not(family: str, tiny_path: Path, tmp_path: Path) -> None:
    make_small(family, tmp_path / family, tiny_path)
    base = load(tmp_path / family, config_for(Algorithm.LORA))
    with torch.no_grad():
        for parameter in base.model.parameters():  # small models start with weights that hardly move anything
            if parameter.dim() > 1:
                parameter.mul_(8)
    with pytest.raises(BadSetting, match="packing: this model's layers do not keep"):
        require_rows_kept_apart(base)


def test_a_run_with_packing_is_refused_before_it_reads_a_row(tiny_path: Path, tmp_path: Path) -> None:
    make_small("qwen3_5_text", tmp_path / "model", tiny_path)
    config = config_for(Algorithm.LORA, packing=True, max_steps=1)
    base = load(tmp_path / "model", config)
    channel = TestChannel()
    with pytest.raises(BadSetting, match="packing"):
        train(base, command_for(tmp_path / "run", config), channel)
    assert base.adapters == [] and channel.events == []
