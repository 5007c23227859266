"""Stock PEFT in a clean process: what a user of a downloaded adapter gets."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.server import BACKEND

# Where the CPU has avx512_bf16, bitsandbytes would answer with its lower-precision inference kernel, which the
# engine does not use (docs/decisions/0004-four-bit-on-cpu.md).
_LOAD = """
import json, sys
sys.path.insert(0, {backend!r})
from engine.guards import hide_broken_torchvision
hide_broken_torchvision()
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
quantization = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
) if {four_bit} else None
base = AutoModelForCausalLM.from_pretrained({base!r}, dtype=torch.float32, quantization_config=quantization)
for module in base.modules():
    if hasattr(module, "support_avx512bf16_for_cpu"):
        module.support_avx512bf16_for_cpu = False
model = PeftModel.from_pretrained(base, {adapter!r}).eval()
tokenizer = AutoTokenizer.from_pretrained({adapter!r})
"""


def in_stock_peft(base: Path, adapter: Path, expression: str, *, four_bit: bool) -> Any:
    """Load base and adapter with stock PEFT, and return an expression over `model` and `tokenizer`.

    Args:
        expression: Python whose value is JSON-serialisable; gradients are off.
        four_bit: Whether the base is stored as NF4, as the engine stores it.
    """
    load = _LOAD.format(backend=str(BACKEND), base=str(base), adapter=str(adapter), four_bit=four_bit)
    script = f"{load}\nwith torch.no_grad():\n    print(json.dumps({expression}))\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=base)
    return json.loads(done.stdout.splitlines()[-1])
