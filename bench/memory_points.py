"""Measures the peak memory of our own engine on this CPU. Each point is a fresh engine process, seen from outside."""

import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from core import allocator
from domain import protocol
from domain.configure import MachineFacts, configure
from domain.peft.algorithms import Algorithm
from domain.peft.config import PeftConfig
from services.engines.process import EngineProcess

CPU = MachineFacts(has_gpu=False, supports_bf16=False)
SMALL, LARGE = "SmolLM2-135M-Instruct", "a Llama of 402M"
LARGE_SHAPE = {
    "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
    "num_key_value_heads": 2, "head_dim": 64,
}  # fmt: skip
STEPS = 2  # the optimizer's state appears with the first step, so the second has everything
MIXED_STEPS = 32
_TEXT = "The quick brown fox jumps over the lazy dog and runs away. "  # 13 tokens


@dataclass(frozen=True)
class Point:
    """One run. Sizes in tokens and rows.

    Attributes:
        dropout: None for the method's default: 0.05, and 0 for PiSSA.
        accumulation: Passes a step.
        mixed: Whether it is a longer run over rows of every length up to `length`, and not two steps of the longest.
    """

    algorithm: str
    length: int
    batch: int
    rank: int
    checkpointing: bool = False
    precision: str = "fp32"
    targets: str = "all-linear"
    model: str = SMALL
    mixed: bool = False
    dropout: float | None = None
    accumulation: int = 1

    @property
    def steps(self) -> int:
        """Optimiser steps that it is measured for."""
        return MIXED_STEPS if self.mixed else STEPS

    def config(self) -> PeftConfig:
        """Return the run's complete configuration; every token carries loss."""
        overrides: dict[str, Any] = {
            "rank": self.rank,
            "batch_size": self.batch,
            "max_seq_length": self.length,
            "gradient_accumulation": self.accumulation,
            "gradient_checkpointing": self.checkpointing,
            "precision": self.precision,
            "max_steps": self.steps,
            "train_on": "all",
        }
        if self.dropout is not None:
            overrides["dropout"] = self.dropout
        if self.targets != "all-linear":
            overrides["target_modules"] = self.targets.split("+")
        return configure(Algorithm(self.algorithm), use_case=None, overrides=overrides, machine=CPU).config


# The constants of domain/memory/estimate.py were chosen on these.
FITTED = (
    Point("lora", 64, 1, 16),
    Point("lora", 256, 1, 16),
    Point("lora", 512, 1, 16),
    Point("lora", 64, 2, 64),
    Point("lora", 256, 2, 8),
    Point("lora", 128, 4, 16),
    Point("lora", 256, 4, 16),
    Point("rslora", 128, 1, 64),
    Point("qlora", 64, 1, 16),
    Point("qlora", 384, 1, 16),
    Point("qlora", 192, 2, 32),
    Point("qlora", 256, 2, 16),
    Point("qlora", 640, 1, 16, checkpointing=True),
    Point("dora", 64, 1, 16),
    Point("dora", 96, 1, 16),
    Point("dora", 256, 1, 8),
    Point("dora", 192, 2, 8),
    Point("pissa", 128, 1, 16),
    Point("lora", 512, 1, 16, checkpointing=True),
    Point("lora", 256, 1, 16, precision="bf16"),
    Point("lora", 256, 1, 16, targets="q_proj+v_proj"),
    Point("lora", 256, 1, 16, dropout=0.0),
    Point("lora", 256, 4, 16, dropout=0.0),
    Point("qlora", 256, 2, 16, dropout=0.0),
    Point("lora", 512, 1, 16, checkpointing=True, dropout=0.0),
    Point("pissa", 192, 2, 16),
)
# And are judged on these: other lengths, batches and ranks.
JUDGED = (
    Point("lora", 96, 1, 32),
    Point("lora", 192, 1, 8),
    Point("lora", 640, 1, 16),
    Point("lora", 96, 3, 16),
    Point("lora", 192, 4, 32),
    Point("lora", 320, 2, 16),
    Point("rslora", 160, 2, 128),
    Point("rslora", 384, 1, 16),
    Point("qlora", 160, 1, 8),
    Point("qlora", 320, 1, 32),
    Point("qlora", 128, 3, 16),
    Point("qlora", 448, 1, 16, checkpointing=True),
    Point("dora", 80, 1, 32),
    Point("dora", 320, 1, 8),
    Point("dora", 128, 2, 16),
    Point("pissa", 192, 1, 32),
    Point("lora", 384, 2, 16, checkpointing=True),
    Point("lora", 192, 2, 32, precision="bf16"),
    Point("lora", 320, 1, 32, targets="q_proj+v_proj"),
    Point("lora", 768, 1, 8),
    Point("lora", 128, 8, 16, checkpointing=True),
    Point("qlora", 96, 2, 64),
    Point("dora", 448, 1, 16, checkpointing=True),
    Point("olora", 160, 1, 16),
    Point("lora", 640, 1, 8, dropout=0.0),
    Point("lora", 320, 2, 32, dropout=0.0),
    Point("qlora", 320, 1, 16, dropout=0.0),
    Point("dora", 256, 1, 16, dropout=0.0),
    Point("pissa", 256, 4, 16),
    Point("lora", 384, 2, 16, checkpointing=True, dropout=0.0),
    Point("rslora", 128, 4, 32, dropout=0.2),
    Point("lora", 192, 2, 16, accumulation=4),
)


# And on these, of another shape: nothing was fitted on it.
ELSEWHERE = (
    Point("lora", 128, 1, 16, model=LARGE),
    Point("lora", 192, 2, 32, checkpointing=True, model=LARGE),
    Point("qlora", 256, 1, 16, model=LARGE),
    Point("qlora", 512, 1, 8, checkpointing=True, model=LARGE),
    Point("dora", 96, 1, 16, model=LARGE),
    Point("pissa", 64, 2, 16, model=LARGE),
)
# And on runs that are longer, over rows of every length.
LONGER = (
    Point("lora", 256, 2, 16, mixed=True),
    Point("qlora", 256, 2, 16, mixed=True),
    Point("dora", 192, 2, 16, mixed=True),
    Point("lora", 512, 2, 16, checkpointing=True, mixed=True),
)


def use_allocator(name: str) -> bool:
    """Start engines with `tcmalloc` or `glibc` from now on; return False if it is not installed."""
    if name == "glibc":
        os.environ["LD_PRELOAD"] = ""
    else:
        os.environ.pop("LD_PRELOAD", None)
    allocator.preload.cache_clear()
    allocator.engines_have_tcmalloc.cache_clear()
    return allocator.engines_have_tcmalloc() == (name == "tcmalloc")


def make_large(folder: Path, small: Path) -> Path:
    """Write a Llama with random weights in bf16. It has the embedded model's tokenizer, and other proportions."""
    from engine.guards import hide_broken_torchvision

    hide_broken_torchvision()
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(small)
    config.update(LARGE_SHAPE)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    for file in small.iterdir():
        if file.name not in ("config.json", "generation_config.json") and file.suffix != ".safetensors":
            shutil.copy(file, folder)
    return folder


def peak_bytes(pid: int) -> int:
    """Return a process's largest resident size so far (VmHWM, proc(5))."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the kernel does not tell VmHWM")


def write_rows(path: Path, point: Point) -> None:
    """Write one batch of rows. One is short and is padded; the others are too long and are cut to `length`.

    For a mixed run, write twelve rows of every length up to `length`, and eight that are too long.
    """
    too_long = point.length // 8
    if point.mixed:
        repeats = [max(1, point.length * twelfth // 12 // 13) for twelfth in range(12)] + [too_long] * 8
    else:
        short = [point.length // 2 // 13] if point.batch > 1 else []
        repeats = ([too_long] * (point.batch - len(short)) + short) * point.accumulation
    with path.open("w", encoding="utf-8") as file:
        for times in repeats:
            messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": _TEXT * times}]
            file.write(json.dumps({"messages": messages}) + "\n")


def measure(point: Point, model_path: Path, steps: int | None = None) -> dict[str, Any]:
    """Load and train in a fresh engine.

    Returns:
        The point, the allocator, the peaks of loading and of both in bytes, and the seconds of the fastest step after
        the first.
    """
    config, seconds = point.config().model_copy(update={"max_steps": steps or point.steps}), []

    def take(event: protocol.RunEvent) -> None:
        if isinstance(event, protocol.StepMetrics):
            seconds.append(event.step_s)

    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        write_rows(rows, point)
        engine = EngineProcess(Path(folder) / "engine.log")
        try:
            loading = protocol.LoadBase(model_path=str(model_path), config=config, device="cpu", engine="transformers")
            engine.request(loading).result()
            loaded = peak_bytes(engine.pid)
            training = protocol.Train(
                adapter_id="measured",
                config=config,
                dataset_path=str(rows),
                validation_path=None,
                validation_fraction=0,
                output_path=str(Path(folder) / "adapter"),
                base_model_id=model_path.name,
                base_revision=None,
                checkpoints_path=str(Path(folder) / "checkpoints"),
                max_checkpoint_bytes=None,
                recorded_step=0,
                about=None,
            )
            engine.request(training, take).result()
            peak = peak_bytes(engine.pid)
            name = "tcmalloc" if allocator.engines_have_tcmalloc() else "glibc"
            return {
                **asdict(point),
                "allocator": name,
                "loaded_bytes": loaded,
                "peak_bytes": peak,
                "step_s": min(seconds[1:]),
            }
        finally:
            engine.close()
