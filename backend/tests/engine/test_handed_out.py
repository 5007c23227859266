"""What is handed out is what was trained: stock PEFT in a clean process computes the engine's logits."""

from pathlib import Path
from typing import Any

import pytest
import torch

from domain.peft.algorithms import Algorithm
from engine import methods
from engine.training import train
from tests.engine.test_methods import PROBE, config_for, load, logits
from tests.support.stock_peft import in_stock_peft
from tests.support.training_command import TestChannel, command_for
from tests.support.variants import VARIANTS

# The others differ in nothing that is written or read.
HANDED_OUT = {
    name: VARIANTS[name]
    for name in (*Algorithm, "dora nf4 rslora", "pissa rslora", "pissa nf4 rslora", "olora nf4", "loftq 3")
}


@pytest.mark.parametrize(("algorithm", "overrides"), HANDED_OUT.values(), ids=HANDED_OUT)
def test_stock_peft_computes_the_engines_logits(
    tiny_path: Path, tmp_path: Path, algorithm: Algorithm, overrides: dict[str, Any]
) -> None:
    config = config_for(algorithm, **{"learning_rate": 0.01, "max_steps": 8} | overrides)
    base = load(tiny_path, config)
    before = logits(base)
    channel = TestChannel()
    result = train(base, command_for(tmp_path, config), channel)
    rounded = config.quantization == "nf4" and bool(methods.changed_layers(base.model, config))
    assert any("rounded residual" in warning for warning in channel.started().warnings) == rounded
    card = (tmp_path / "adp" / "README.md").read_text()
    assert ("BitsAndBytesConfig" in card) == (config.quantization == "nf4" and not rounded)
    assert result.final_eval_loss is not None and result.initial_eval_loss is not None
    assert result.final_eval_loss < result.initial_eval_loss
    with base.using("adp"):
        served = logits(base)
    expression = f"model(input_ids=torch.tensor({PROBE.tolist()}), use_cache=False).logits.tolist()"
    stock = in_stock_peft(tiny_path, tmp_path / "adp", expression, four_bit=config.quantization == "nf4")
    assert (served - torch.tensor(stock)).abs().max() <= 1e-6
    assert (served - before).abs().max() > 0.1
    with base.using(None):
        assert torch.equal(logits(base), before)
