"""Stock PEFT in a clean process, one for all adapters: what a user of a downloaded adapter gets."""

import atexit
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

from tests.support.server import BACKEND

# Where the CPU has avx512_bf16, bitsandbytes would answer with its lower-precision inference kernel, which the
# engine does not use (docs/decisions/0004-four-bit-on-cpu.md).
_SCRIPT = f"""
import json, sys
sys.path.insert(0, {str(BACKEND)!r})
from engine.guards import hide_broken_torchvision
hide_broken_torchvision()
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
answers, sys.stdout = sys.stdout, sys.stderr
for line in sys.stdin:
    base_path, adapter_path, expression, four_bit = json.loads(line)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    ) if four_bit else None
    base = AutoModelForCausalLM.from_pretrained(base_path, dtype=torch.float32, quantization_config=quantization)
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model = PeftModel.from_pretrained(base, adapter_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(adapter_path)
    with torch.no_grad():
        print(json.dumps(eval(expression)), file=answers, flush=True)
"""


def in_stock_peft(base: Path, adapter: Path, expression: str, *, four_bit: bool) -> Any:
    """Load base and adapter with stock PEFT, and return an expression over `model` and `tokenizer`.

    Args:
        expression: Python whose value is JSON-serialisable; gradients are off.
        four_bit: Whether the base is stored as NF4, as the engine stores it.
    """
    process = _process()
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps([str(base), str(adapter), expression, four_bit]) + "\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        _process.cache_clear()
        raise AssertionError(f"stock PEFT ended with exit code {process.wait()}; what it said stands above")
    return json.loads(line)


@cache
def _process() -> "subprocess.Popen[str]":
    """Start the process, whose imports take longer than what it is asked."""
    process = subprocess.Popen(
        [sys.executable, "-c", _SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"TRANSFORMERS_VERBOSITY": "error"},
    )  # fmt: skip
    atexit.register(process.kill)
    return process
