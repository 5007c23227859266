"""The `prepare_gguf` command: a GGUF file becomes a normal local model."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from core.files import plain_files, whole_folder
from domain.models.gguf import CONVERSION, GGUF_CONVERSION
from domain.protocol import PrepareGguf, Progress
from domain.results import Prepared
from engine.channel import Channel
from engine.gguf_reading import GgufMetadata, read_tokenizer
from engine.tokenizer_folder import save_tokenizer


def prepare_gguf(command: PrepareGguf, channel: Channel) -> Prepared:
    """Read a GGUF file with transformers and write it as bf16 safetensors with its tokenizer.

    Raises:
        BadModel: Its tokenizer splits text in an unknown way.
    """

    def progress(stage: str, fraction: float) -> None:
        channel.emit(Progress(request_id=command.request_id, stage=stage, fraction=fraction))

    source, output = Path(command.gguf_path), Path(command.output_path)
    progress("reading tokenizer", 0.1)
    metadata = GgufMetadata(source)
    byte_level = read_tokenizer(metadata) if metadata.has_byte_level_tokenizer else None
    progress("reading weights", 0.2)
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.bfloat16)
    tokenizer = byte_level if byte_level is not None else _by_transformers(source, model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if len(metadata.ends) > 1:
        model.generation_config.eos_token_id = metadata.ends
    # The weights are dequantised by now. Without this, save_pretrained refuses a "GGUF-quantised" model.
    model.is_quantized, model.hf_quantizer = False, None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config._name_or_path = command.model_id
    progress("writing", 0.8)
    with whole_folder(output) as folder:
        model.to(torch.bfloat16).save_pretrained(folder)
        save_tokenizer(tokenizer, folder)
        (folder / CONVERSION).write_text(json.dumps({"version": GGUF_CONVERSION}) + "\n", encoding="utf-8")
        for _, file in plain_files(folder):
            file.chmod(0o600)
    progress("ready", 1.0)
    return Prepared(path=str(output))


def _by_transformers(source: Path, model: Any) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # Its reader names the special tokens by position in its own defaults; the ids in the config are right.
    for role in ("bos", "eos"):
        token_id = getattr(model.config, f"{role}_token_id")
        if token_id is not None:
            setattr(tokenizer, f"{role}_token", tokenizer.convert_ids_to_tokens(token_id))
    return tokenizer
