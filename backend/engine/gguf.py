"""The `prepare_gguf` command: a GGUF file becomes a normal local model."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from core.files import whole_folder
from domain.protocol import PrepareGguf, Progress
from engine.channel import Channel


def prepare_gguf(command: PrepareGguf, channel: Channel) -> dict[str, Any]:
    """Read a GGUF file with transformers and write it as bf16 safetensors with its tokenizer.

    Returns:
        `path`, the finished folder.
    """

    def progress(stage: str, fraction: float) -> None:
        channel.emit(Progress(request_id=command.request_id, stage=stage, fraction=fraction))

    source, output = Path(command.gguf_path), Path(command.output_path)
    progress("reading weights", 0.1)
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.bfloat16)
    progress("reading tokenizer", 0.6)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # The GGUF reader names the special tokens by position in its own defaults; the ids in the config are right.
    for role in ("bos", "eos"):
        token_id = getattr(model.config, f"{role}_token_id")
        if token_id is not None:
            setattr(tokenizer, f"{role}_token", tokenizer.convert_ids_to_tokens(token_id))
    tokenizer.pad_token = tokenizer.eos_token
    # Dequantised weights are ordinary ones; without this save_pretrained refuses a "GGUF-quantised" model.
    model.is_quantized, model.hf_quantizer = False, None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config._name_or_path = command.model_id
    progress("writing", 0.8)
    with whole_folder(output) as folder:
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for file in folder.iterdir():
            file.chmod(0o600)
    progress("ready", 1.0)
    return {"path": str(output)}
