"""The cases to prove, and those that are left out, with the reason."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_shapes import read_shape

from domain.configure import MachineFacts, configure
from domain.peft.algorithms import Algorithm
from domain.peft.config import PeftConfig
from domain.peft.unsloth_rules import loaded_length, obstacle
from gpu_check.shapes import TINY

STEPS, RESUME_AT = 8, 4
# Every method runs on the smallest shape. On the others only the two that people run there do, without --all.
EVERYWHERE = (Algorithm.QLORA, Algorithm.LORA)
SMALLEST = "Llama-3.2-1B"


@dataclass(frozen=True)
class Case:
    """One method on one model by one engine."""

    model: str
    algorithm: Algorithm
    engine: str
    config: PeftConfig

    @property
    def id(self) -> str:
        """Model, method and engine in one word."""
        return f"{self.model}-{self.algorithm.value}-{self.engine}"


def settings(*, on_cpu: bool, length: int) -> dict[str, Any]:
    """Return the settings of every run. Each method adds its own."""
    return {
        "rank": 16 if not on_cpu else 4,
        "dropout": 0.0,  # each engine draws its own: losses could not be compared
        "precision": "fp32" if on_cpu else "bf16",
        "learning_rate": 1e-3,
        "warmup_ratio": 0.0,
        "scheduler": "constant",
        "batch_size": 2,
        "gradient_accumulation": 1,
        "max_steps": STEPS,
        "max_seq_length": length,
        "packing": False,
        "optimizer": "adamw",
        "gradient_checkpointing": True,
        "train_on": "all",
        "seed": 0,
        "eval_every_steps": None,
        "early_stopping_patience": None,
        "checkpoint_every_steps": RESUME_AT,
        "checkpoint_every_minutes": None,
        "keep_checkpoints": 8,
    }


def cases(
    models: list[str], algorithms: list[Algorithm], *, on_cpu: bool, length: int, everything: bool, config_of: Any
) -> tuple[list[Case], list[str]]:
    """Return the cases, the most telling first, and sentences on what is left out.

    Args:
        config_of: Gives a model's config.json by its name.
    """
    planned, left_out = [], []
    facts = MachineFacts(has_gpu=not on_cpu, supports_bf16=not on_cpu)
    for model in models:
        shape = read_shape(config_of(model))
        for algorithm in algorithms:
            if not everything and model not in (SMALLEST, TINY) and algorithm not in EVERYWHERE:
                left_out.append(f"{algorithm.value} on {model}: run with --all for every method on every model")
                continue
            config = configure(
                algorithm, use_case=None, overrides=settings(on_cpu=on_cpu, length=length), machine=facts, shape=shape
            ).config
            planned.append(Case(model, algorithm, "transformers", config))
            why = obstacle(config, shape.family if shape else None)
            if on_cpu:
                left_out.append(f"{algorithm.value} on {model} through Unsloth: it needs a CUDA GPU")
            elif why is not None:
                left_out.append(f"{algorithm.value} on {model} through Unsloth: {why}")
            else:
                longest = loaded_length(config, shape.max_positions if shape else None)
                if longest < config.max_seq_length:
                    raise ValueError(f"{model} knows {longest} tokens only")
                planned.append(Case(model, algorithm, "unsloth", config))
    return sorted(planned, key=_worth), left_out


def _worth(case: Case) -> tuple[int, bool, bool]:
    """Sort by what a short time should tell: what people run most, then the rest, what starts slowest last."""
    place = EVERYWHERE.index(case.algorithm) if case.algorithm in EVERYWHERE else len(EVERYWHERE)
    return place, case.algorithm is Algorithm.LOFTQ, case.engine != "unsloth"


def task(kind: str, case: Case, folder: Path, device: str) -> dict[str, Any]:
    """Write a case as a task of the worker."""
    model = folder / "models" / case.model
    return {
        "id": f"{kind}:{case.id}",
        "kind": kind,
        "engine": case.engine,
        "config": case.config.model_dump(mode="json"),
        "model_path": str(model),
        "rows": str(folder / "rows.jsonl"),
        "held_out": str(folder / "held_out.jsonl"),
        "work": str(folder / "work" / case.id),
        "device": device,
        "resume_at": RESUME_AT,
    }


DEFAULT_MODELS = ["Llama-3.2-1B", "Llama-3.2-3B", "Llama-3.1-8B", "Qwen2.5-7B"]
