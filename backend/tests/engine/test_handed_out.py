"""What is handed out is what was trained: stock PEFT in a clean process computes the engine's logits."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rows import messages_jsonl
from server import BACKEND
from test_methods import PROBE, config_for, load, logits
from tiny_model import TINY_ID

from domain.algorithms import Algorithm
from domain.protocol import Train
from engine.training import train

# As in tests/api/test_main_job.py: the engine does not use bitsandbytes' lower-precision inference kernel.
STOCK = """
import json, sys
sys.path.insert(0, {backend!r})
from engine.guards import hide_broken_torchvision
hide_broken_torchvision()
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
quantization = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
) if {four_bit} else None
base = AutoModelForCausalLM.from_pretrained({base!r}, dtype=torch.float32, quantization_config=quantization)
for module in base.modules():
    if hasattr(module, "support_avx512bf16_for_cpu"):
        module.support_avx512bf16_for_cpu = False
model = PeftModel.from_pretrained(base, {adapter!r}).eval()
with torch.no_grad():
    print(json.dumps(model(input_ids=torch.tensor({probe!r}), use_cache=False).logits.tolist()))
"""


def stock_logits(base: Path, adapter: Path, *, four_bit: bool) -> torch.Tensor:
    script = STOCK.format(
        backend=str(BACKEND), base=str(base), adapter=str(adapter), four_bit=four_bit, probe=PROBE.tolist()
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=base)
    return torch.tensor(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("algorithm", Algorithm)
def test_stock_peft_computes_the_engines_logits(tiny_path: Path, tmp_path: Path, algorithm: Algorithm) -> None:
    (tmp_path / "rows.jsonl").write_text(messages_jsonl())
    config = config_for(algorithm, learning_rate=0.01, max_steps=8)
    base = load(tiny_path, config)
    before = logits(base)
    channel: Any = SimpleNamespace(emit=lambda _: None, check_stop=lambda _: None)
    command = Train(
        request_id="r",
        adapter_id="adp",
        config=config,
        dataset_path=str(tmp_path / "rows.jsonl"),
        validation_path=None,
        validation_fraction=0.2,
        output_path=str(tmp_path / "adp"),
        base_model_id=TINY_ID,
        base_revision=None,
    )
    result = train(base, command, channel)
    assert result["final_eval_loss"] < result["initial_eval_loss"]
    with base.using("adp"):
        served = logits(base)
    stock = stock_logits(tiny_path, tmp_path / "adp", four_bit=algorithm is Algorithm.QLORA)
    assert (served - stock).abs().max() <= 1e-6
    assert (served - before).abs().max() > 0.1
    with base.using(None):
        assert torch.equal(logits(base), before)
