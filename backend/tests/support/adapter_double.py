"""Adapters made of nothing but their files: no torch, and every file can be spoiled."""

import io
import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.support.hub_double import safetensors_bytes
from tests.support.tiny_model import TINY_ID

SHAPES = {"q_proj": (64, 64), "v_proj": (64, 32)}  # of the tiny Llama, (in, out)
RANK = 4


def adapter_config(**changes: Any) -> dict[str, Any]:
    """Return adapter_config.json as PEFT 0.21 writes it for the tiny Llama."""
    return {
        "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None, "auto_mapping": None,
        "base_model_name_or_path": TINY_ID, "bias": "none", "corda_config": None, "eva_config": None,
        "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True,
        "layer_replication": None, "layers_pattern": None, "layers_to_transform": None, "loftq_config": {},
        "lora_alpha": 8, "lora_bias": False, "lora_dropout": 0.0, "megatron_config": None,
        "megatron_core": "megatron.core", "modules_to_save": None, "peft_type": "LORA", "peft_version": "0.21.2",
        "qalora_group_size": 16, "r": RANK, "rank_pattern": {}, "revision": None,
        "target_modules": ["q_proj", "v_proj"], "target_parameters": None, "task_type": "CAUSAL_LM",
        "trainable_token_indices": None, "use_dora": False, "use_qalora": False, "use_rslora": False,
    } | changes  # fmt: skip


def adapter_tensors(
    layers: int = 2, shapes: Mapping[str, tuple[int, int]] = SHAPES
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return names, types and shapes of the weights; of the tiny Llama by default."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for layer in range(layers):
        for name, (fan_in, fan_out) in shapes.items():
            path = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            found[f"{path}.lora_A.weight"] = ("F32", (RANK, fan_in))
            found[f"{path}.lora_B.weight"] = ("F32", (fan_out, RANK))
    return found


def adapter_files(**config: Any) -> dict[str, bytes]:
    """Return a sound adapter's files."""
    return {
        "adapter_config.json": json.dumps(adapter_config(**config)).encode(),
        "adapter_model.safetensors": safetensors_bytes(adapter_tensors()),
        "tokenizer_config.json": b'{"tokenizer_class": "PreTrainedTokenizerFast"}',
        "chat_template.jinja": b"{{ messages }}",
        "README.md": b"# An adapter",
    }


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def zip_of(files: dict[str, bytes], prefix: str = "") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(prefix + name, content)
    return buffer.getvalue()


class _Payload:
    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (str(self._canary), "w")


def malicious_pickle(canary: Path) -> bytes:
    """Return a pickle that makes a file when it is read."""
    return pickle.dumps(_Payload(canary))
