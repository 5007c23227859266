"""Published peaks of LoRA and QLoRA fine-tuning on GPUs, translated to the settings of our own estimate."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_shapes import read_shape

from domain.configure import MachineFacts, configure
from domain.memory.activations import Batch, Stack, targeted
from domain.models.shape import ModelShape
from domain.peft.algorithms import Algorithm
from domain.peft.config import PeftConfig

GPU = MachineFacts(has_gpu=True, supports_bf16=True)
# Configs that are published with their models but are not in the folder of configs.
_DIMENSIONS: dict[str, dict[str, Any]] = {
    "tiiuae/falcon-7b": {
        "model_type": "falcon", "hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71,
        "vocab_size": 65024, "multi_query": True, "parallel_attn": True, "bias": False,
    },
    "google/gemma-2b": {
        "model_type": "gemma", "hidden_size": 2048, "num_hidden_layers": 18, "num_attention_heads": 8,
        "num_key_value_heads": 1, "head_dim": 256, "intermediate_size": 16384, "vocab_size": 256000,
    },
    "stabilityai/stablelm-base-alpha-3b": {
        "model_type": "gpt_neox", "hidden_size": 4096, "num_hidden_layers": 16, "num_attention_heads": 32,
        "intermediate_size": 16384, "vocab_size": 50688, "tie_word_embeddings": False,
    },
    # Qwen of 2023 brings code of its own. Qwen2 computes the same, with a projection each for queries, keys and values.
    "Qwen/Qwen-1_8B-Chat": {
        "model_type": "qwen2", "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16,
        "num_key_value_heads": 16, "intermediate_size": 5504, "vocab_size": 151936, "tie_word_embeddings": False,
    },
    "Qwen/Qwen-72B-Chat-Int4": {
        "model_type": "qwen2", "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 64, "intermediate_size": 24576, "vocab_size": 152064, "tie_word_embeddings": False,
        "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    },
    "arcee-ai/AFM-4.5B": {
        "model_type": "arcee", "hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 20,
        "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 18432, "vocab_size": 128004,
    },
    "mistralai/Magistral-Small-2506": {
        "model_type": "mistral", "hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 32768, "vocab_size": 131072,
    },
}  # fmt: skip
_DIMENSIONS["Qwen/Qwen-1_8B-Chat-Int4"] = _DIMENSIONS["Qwen/Qwen-1_8B-Chat"] | {
    "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}
}
for _name in ("mistralai/Magistral-Small-2507", "mistralai/Devstral-Small-2507"):
    _DIMENSIONS[_name] = _DIMENSIONS["mistralai/Magistral-Small-2506"]
# Model → the model that has the same config.
_SAME_AS = {
    "meta-llama/Llama-3.1-8B": "meta-llama/Meta-Llama-3.1-8B",
    "meta-llama/Meta-Llama-3-8B": "meta-llama/Meta-Llama-3.1-8B",
    "meta-llama/Llama-3.2-1B": "meta-llama/Llama-3.2-1B-Instruct",
    "meta-llama/Llama-3.2-3B": "meta-llama/Llama-3.2-3B-Instruct",
    "XiaomiMiMo/MiMo-7B-RL": "XiaomiMiMo/MiMo-7B-Base",
    "katanemo/Plano-Orchestrator-4B": "Qwen/Qwen3-4B",
}


# What Qwen of 2023 calls its modules.
_AS_QWEN2 = {
    "c_attn": ("q_proj", "k_proj", "v_proj"),
    "attn.c_proj": ("o_proj",),
    "w1": ("up_proj",),
    "w2": ("gate_proj",),
}


@dataclass(frozen=True)
class Program:
    """A training program, as far as its memory is concerned.

    Attributes:
        stack: What it does differently from our own engine.
        head_quantized: Whether the output head is stored in 4 bits too.
        nf4: Bytes a parameter in 4 bits.
        keeps_inputs: Whether 4-bit modules keep their inputs, in fp32.
        metric_is_torchs: Whether the peak is what torch's allocator counted.
    """

    name: str
    stack: Stack
    head_quantized: bool = False
    nf4: float = 0.5 + 1 / 64 + 4 / (64 * 256)
    keeps_inputs: bool = False
    metric_is_torchs: bool = True


# litgpt trains in bf16 throughout, adapters and Adam's moments included. Its head is never tied, and is stored in 4
# bits like every linear module. Its nf4 has no double quantisation (litgpt/finetune/lora.py). bitsandbytes of that time
# kept the inputs of its 4-bit modules (MatMul4Bit, `ctx.tensors = (A, B)`).
LITGPT = Program(
    "litgpt", Stack(adapter_width=2, makes_masks=False), head_quantized=True, nf4=0.5 + 4 / 64, keeps_inputs=True
)
# PEFT's method comparison: our own stack. Its batches reach the cap on the sequence length.
PEFT = Program("PEFT", Stack())
# Qwen's finetune.py of 2023: adapters in bf16 (PEFT before autocast_adapter_dtype), flash attention.
QWEN = Program("Qwen finetune.py", Stack(adapter_width=2, makes_masks=False), metric_is_torchs=False)
# axolotl with Cut Cross-Entropy: no logits at all (arXiv 2411.09009); flash attention; fp32 adapters.
AXOLOTL = Program("axolotl", Stack(loss_width=0, makes_masks=False), metric_is_torchs=False)
AXOLOTL_PLAIN = Program("axolotl", Stack(makes_masks=False), metric_is_torchs=False)


@dataclass(frozen=True)
class Published:
    """A published peak with the settings it was measured with."""

    line: int
    model_id: str
    program: Program
    shape: ModelShape
    config: PeftConfig
    batch: Batch
    peak_bytes: int


def read_points(path: Path, configs: Path) -> tuple[list[Published], list[tuple[int, str, str]]]:
    """Read vram_points.csv.

    Returns:
        The points; and for each row that is left out its line, its model and the reason.
    """
    points, left_out = [], []
    with path.open(encoding="utf-8", newline="") as file:
        for line, row in enumerate(csv.DictReader(file), start=2):
            point = _point(line, row, configs)
            if isinstance(point, str):
                left_out.append((line, row["model_id"], point))
            else:
                points.append(point)
    return points, left_out


def _point(line: int, row: dict[str, str], configs: Path) -> Published | str:
    framework = row["framework"]
    if framework.startswith("torchtune"):
        return "rank, targets and memory options are not stated"
    program = _program(row)
    if isinstance(program, str):
        return program
    shape = _shape(row["model_id"], configs, program)
    if shape is None:
        return "its config is not at hand, or its family is not known"
    if shape.stacked_parameters:
        return "experts: stored and adapted in the program's own way"
    targets = _targets(row["target_modules"], shape)
    overrides: dict[str, Any] = {
        "rank": int(row["rank"]),
        "target_modules": targets,
        "batch_size": int(row["micro_batch"]),
        "gradient_accumulation": 1,
        "gradient_checkpointing": row["grad_checkpointing"].startswith("True"),
        "max_seq_length": int(row["seq_len"]),
        "optimizer": "adamw_8bit" if "8bit" in row["optimizer"] else "adamw",
        "precision": "bf16",
        "quantization": "nf4" if "nf4" in row["dtype_quant"] else "none",
        "packing": row["packing"] == "True",
    }
    if program is PEFT:
        overrides["dropout"] = 0.0  # LoraConfig's default, which the comparison keeps
    config = configure(Algorithm.LORA, use_case=None, overrides=overrides, machine=GPU).config
    if not targeted(shape, config):
        return "none of its targets is a module of the model"
    batch = Batch(config.batch_size, config.max_seq_length, config.batch_size > 1)
    return Published(line, row["model_id"], program, shape, config, batch, round(float(row["peak_gib"]) * 2**30))


def _program(row: dict[str, str]) -> Program | str:
    framework = row["framework"]
    if framework == "litgpt":
        return LITGPT
    if framework.startswith("peft"):
        return PEFT
    if framework.startswith("Qwen"):
        return QWEN
    if framework == "axolotl":
        if "8bit" in row["dtype_quant"] or "nf4" not in row["dtype_quant"]:
            return "8-bit or dequantised bases are stored in the program's own way"
        return AXOLOTL if "CutCrossEntropy" in row["notes"] else AXOLOTL_PLAIN
    return "a program that is not described here"


def _shape(model_id: str, configs: Path, program: Program) -> ModelShape | None:
    if model_id in _DIMENSIONS:
        untied = {"tie_word_embeddings": False} if program is LITGPT else {}
        return read_shape(_DIMENSIONS[model_id] | untied)
    path = configs / _SAME_AS.get(model_id, model_id).replace("/", "__") / "config.json"
    if not path.is_file():
        return None
    config = json.loads(path.read_bytes())
    if program is LITGPT:
        config["tie_word_embeddings"] = False  # litgpt/model.py makes a head of its own
    if program is LITGPT and config.get("hidden_act") == "gelu_new":
        config["hidden_act"] = "gelu"  # torch's own, which keeps one tensor (litgpt/model.py, GptNeoxMLP)
    return read_shape(config)


def _targets(named: str, shape: ModelShape) -> str | list[str]:
    """Translate a program's names of the modules that it adapts."""
    if named.startswith("all-linear"):
        return "all-linear"
    names = named.split("+")
    paths = {linear.path for linear, _ in shape.linears()}
    if "mlp" in names:  # litgpt: every linear module; the head is not counted by us
        return "all-linear"
    if names == ["query", "value"]:
        fused = {"attention.query_key_value", "self_attention.query_key_value"} & paths
        return sorted(fused) if fused else ["q_proj", "v_proj"]
    return [part for name in names for part in _AS_QWEN2.get(name, (name,))]
