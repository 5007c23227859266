"""The loss by chunks beside the loss over all logits, and both beside TRL: peak memory and speed of training.

    python bench/bench_loss.py

Each run is a process of its own: SmolLM2-135M-Instruct in fp32, LoRA of rank 16 on all linear layers, the same rows in
the same number of batches, and every token trained. The ways are run in turn, several rounds of them. Peak is the
largest resident size of the process, speed that of its steps after the first, by the clock and by processor time (which
other work on the machine disturbs less). TRL is run with its default loss, which goes by chunks that are computed
again, once with our settings and once with its own (checkpointing, bf16 where it chooses it).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "backend"), str(ROOT / "bench")]

WAYS = ("chunks", "whole", "TRL, our settings", "TRL, its defaults")
STEPS, RANK = 4, 16
_MIB = 2**20


class Clock:
    """Notes the time after each step."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.processor: list[float] = []

    def tick(self) -> None:
        """Note a step's end."""
        self.wall.append(time.perf_counter())
        self.processor.append(time.process_time())

    def seconds(self) -> tuple[float, float]:
        """Return the seconds of the fastest step after the first, by the clock and of processors."""
        wall, processor = (min(b - a for a, b in pairwise(at)) for at in (self.wall, self.processor))
        return wall, processor


def rows_of(count: int, length: int) -> list[list[int]]:
    """Return rows of token ids."""
    return [[(31 * number + 17 * at) % 40_000 + 5 for at in range(length)] for number in range(count)]


def train_here(path: Path, batch: int, length: int, clock: Clock, *, whole: bool) -> None:
    """Train with the engine's own loop."""
    from engine.guards import hide_broken_torchvision

    hide_broken_torchvision()
    from domain.configure import MachineFacts, configure
    from domain.peft.algorithms import Algorithm
    from domain.protocol import StepMetrics
    from engine import loss as loss_module
    from engine.base import Base
    from engine.initialisation import create_adapter
    from engine.logits import NotSplit
    from engine.rows import Row, RowStore
    from engine.trainer import Trainer

    if whole:

        def refuse(_model: Any) -> Any:
            raise NotSplit("the benchmark asks for it")

        vars(loss_module)["tail_of"] = refuse

    class GoOn:
        def check_stop(self) -> None:
            """Go on."""

        def take_checkpoint_request(self) -> bool:
            """Write none."""
            return False

    overrides = {
        "rank": RANK, "batch_size": batch, "max_seq_length": length, "gradient_accumulation": 1, "max_steps": STEPS,
        "gradient_checkpointing": False, "train_on": "all", "precision": "fp32",
    }  # fmt: skip
    machine = MachineFacts(has_gpu=False, supports_bf16=False)
    config = configure(Algorithm.LORA, use_case=None, overrides=overrides, machine=machine).config
    base = Base(path, config, "cpu", "transformers")
    create_adapter(base, "adp", config, path.name, None)
    rows = RowStore([Row(at, ids, ids, truncated=False) for at, ids in enumerate(rows_of(batch, length))])

    def take(event: Any) -> None:
        if isinstance(event, StepMetrics):
            clock.tick()

    Trainer(base, config, rows, RowStore(), request_id="r", emit=take, control=GoOn()).run()


def train_in_trl(path: Path, batch: int, length: int, clock: Clock, scratch: str, *, defaults: bool) -> None:
    """Train with TRL's SFTTrainer and its default loss."""
    from engine.guards import hide_broken_torchvision

    hide_broken_torchvision()
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Ticks(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            """Note the time."""
            clock.tick()

    own = {} if defaults else {"gradient_checkpointing": False, "bf16": False}
    arguments = SFTConfig(
        output_dir=scratch, per_device_train_batch_size=batch, max_steps=STEPS, max_length=length, use_cpu=True,
        report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, **own,
    )  # fmt: skip
    assert arguments.loss_type == "chunked_nll"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    data = Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in rows_of(batch, length)])
    lora = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear")
    trainer = SFTTrainer(
        model, args=arguments, train_dataset=data, peft_config=lora, callbacks=[Ticks()],
        processing_class=AutoTokenizer.from_pretrained(path),
    )  # fmt: skip
    trainer.train()


def one(way: str, path: Path, batch: int, length: int) -> dict[str, float]:
    """Run one way in this process."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as scratch:
        if way.startswith("TRL"):
            train_in_trl(path, batch, length, clock, scratch, defaults=way.endswith("defaults"))
        else:
            train_here(path, batch, length, clock, whole=way == "whole")
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) * 1024
    wall, processor = clock.seconds()
    return {"peak_bytes": peak, "tokens_s": batch * length / wall, "tokens_processor_s": batch * length / processor}


def in_its_own_process(way: str, path: Path, batch: int, length: int) -> dict[str, float]:
    """Run one way, ours as an engine is started."""
    from core.allocator import preload
    from services.engines.spawning import ENGINE_ENVIRONMENT

    environment = dict(os.environ)
    if not way.startswith("TRL"):
        library = preload()
        environment |= ENGINE_ENVIRONMENT | ({"LD_PRELOAD": str(library)} if library is not None else {})
    command = [sys.executable, __file__, "--one", way, str(path), str(batch), str(length)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{way}: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def middle(runs: list[dict[str, float]], what: str) -> float:
    """Return the median of a figure."""
    return statistics.median(run[what] for run in runs)


def main(rounds: int, shapes: list[tuple[int, int]]) -> int:
    """Print the ratios; return 1 if chunks take more memory than all logits at once."""
    from services.models.embedded import EmbeddedModel

    with tempfile.TemporaryDirectory() as logs:
        path = EmbeddedModel(ROOT / ".cache", Path(logs)).prepare(lambda stage, fraction: None)
    missed = 0
    for batch, length in shapes:
        runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for _ in range(rounds):
            for way in WAYS:
                runs[way].append(in_its_own_process(way, path, batch, length))
        print(f"{batch} x {length} tokens, load {os.getloadavg()[0]:.1f}:")
        for way in WAYS:
            peak, speed, by_processor = (
                middle(runs[way], what) for what in ("peak_bytes", "tokens_s", "tokens_processor_s")
            )
            print(
                f"  {way:18} {peak / _MIB:7,.0f} MiB, {speed:6,.0f} tokens/s, {by_processor:6,.0f} a processor second",
                flush=True,
            )
        for way in WAYS[1:]:
            peak, speed, by_processor = (
                middle(runs["chunks"], what) / middle(runs[way], what)
                for what in ("peak_bytes", "tokens_s", "tokens_processor_s")
            )
            print(f"  chunks over {way}: memory x {peak:.2f}, speed x {speed:.2f}, by processor x {by_processor:.2f}")
            missed += way == "whole" and peak > 1.0
    return 1 if missed else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(one(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))))
    else:
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--rounds", type=int, default=3)
        parser.add_argument("--shapes", nargs="*", default=["4x256", "1x64"], help="rows a step x tokens a row")
        arguments = parser.parse_args()
        sizes = [(int(rows), int(length)) for rows, length in (text.split("x") for text in arguments.shapes)]
        sys.exit(main(arguments.rounds, sizes))
