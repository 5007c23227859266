"""The fast path on a CUDA GPU: Unsloth loads the base with its patched layers and kernels.

Adapters are then added by plain PEFT on the Unsloth-loaded model, so that every method of the service,
several adapters on one base and exact adapter files work the same on both back ends.
"""

import os
from pathlib import Path
from typing import Any

from domain.peft_config import PeftConfig


def unsloth_arguments(path: Path, config: PeftConfig) -> dict[str, Any]:
    """Write the load in the terms of `unsloth.FastLanguageModel.from_pretrained`."""
    import torch

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return {
        "model_name": str(path),
        "max_seq_length": config.max_seq_length,
        "dtype": dtypes[config.precision],
        "load_in_4bit": config.quantization == "nf4",
        "load_in_8bit": config.quantization == "int8",
        "trust_remote_code": False,
        "use_gradient_checkpointing": "unsloth" if config.gradient_checkpointing else False,
    }


def load_unsloth(path: Path, config: PeftConfig) -> tuple[Any, Any]:
    """Load a model and its tokenizer through Unsloth. Needs a CUDA GPU."""
    os.environ.setdefault("UNSLOTH_SKIP_TORCHVISION_CHECK", "1")
    from unsloth import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(**unsloth_arguments(path, config))
    return model, tokenizer
