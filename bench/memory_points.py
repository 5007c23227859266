"""Measures the peak memory of our own engine on this CPU: one fresh engine process a point, seen from outside."""

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from domain import protocol
from domain.algorithms import Algorithm
from domain.configure import MachineFacts, configure
from domain.peft_config import PeftConfig
from services.engine_process import EngineProcess

CPU = MachineFacts(has_gpu=False, supports_bf16=False)
STEPS = 2  # the optimizer's state appears with the first step, so the second has everything
_TEXT = "The quick brown fox jumps over the lazy dog and runs away. "  # 13 tokens


@dataclass(frozen=True)
class Point:
    """One run. Sizes in tokens and rows."""

    algorithm: str
    length: int
    batch: int
    rank: int
    checkpointing: bool = False
    precision: str = "fp32"
    targets: str = "all-linear"

    def config(self) -> PeftConfig:
        """Return the run's complete configuration; every token carries loss."""
        overrides: dict[str, Any] = {
            "rank": self.rank,
            "batch_size": self.batch,
            "max_seq_length": self.length,
            "gradient_accumulation": 1,
            "gradient_checkpointing": self.checkpointing,
            "precision": self.precision,
            "max_steps": STEPS,
            "train_on": "all",
        }
        if self.targets != "all-linear":
            overrides["target_modules"] = self.targets.split("+")
        return configure(Algorithm(self.algorithm), use_case=None, overrides=overrides, machine=CPU).config


# The constants of domain/memory_estimate.py were chosen on these.
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
)


def peak_bytes(pid: int) -> int:
    """Return a process's largest resident size so far (VmHWM, proc(5))."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the kernel does not tell VmHWM")


def write_rows(path: Path, point: Point) -> None:
    """Write one batch of rows: all of them too long, so that they are cut to `length`, but for one that is padded."""
    with path.open("w", encoding="utf-8") as file:
        for row in range(point.batch):
            short = point.batch > 1 and row == point.batch - 1
            words = _TEXT * (point.length // 2 // 13 if short else point.length // 8)
            messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": words}]
            file.write(json.dumps({"messages": messages}) + "\n")


def measure(point: Point, model_path: Path) -> dict[str, Any]:
    """Load and train in a fresh engine and return the point with the peaks of both, in bytes."""
    config = point.config()
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        write_rows(rows, point)
        engine = EngineProcess(Path(folder) / "engine.log")
        try:
            _, loading = engine.request(
                lambda request_id: protocol.LoadBase(
                    request_id=request_id,
                    model_path=str(model_path),
                    config=config,
                    device="cpu",
                    engine="transformers",
                )
            )
            loading.result()
            loaded = peak_bytes(engine.pid)
            _, training = engine.request(
                lambda request_id: protocol.Train(
                    request_id=request_id,
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
                    about={},
                )
            )
            training.result()
            return {**asdict(point), "loaded_bytes": loaded, "peak_bytes": peak_bytes(engine.pid)}
        finally:
            engine.close()
