"""Random adapters on small models of any family, and what stock transformers and PEFT answer with them."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer


def make_random_adapter(base: Path, folder: Path, size: float = 0.02, **settings: Any) -> Path:
    """Write an adapter as stock PEFT makes it, with every weight moved away from where it starts; return its folder.

    Args:
        base: The model's folder.
        size: How far each weight is moved.
        settings: Of PEFT's LoraConfig.
    """
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **settings))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape))
    adapted.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def stock_logits(folder: Path, probe: torch.Tensor, adapter: Path | None = None) -> torch.Tensor:
    """Return what stock transformers answers, with an adapter of stock PEFT or without."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=probe, use_cache=False).logits
    return logits
