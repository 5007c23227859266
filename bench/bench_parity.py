"""The loss curve of the embedded model by three programs: the engine, a loop on PyTorch and PEFT, TRL's SFTTrainer.

    python bench/bench_parity.py

It prints the largest relative difference of a step's loss from the engine's, and the seconds of each run, loading
included. It exits with 1 if a curve differs. Settings, rows, order and seed are the same. There is no dropout, since
each program draws its masks from a generator that it also uses for other things. It takes some minutes.
"""

import logging
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "backend"))

from engine.guards import hide_broken_torchvision

hide_broken_torchvision()

from domain.configure import MachineFacts, configure
from domain.peft.algorithms import Algorithm
from domain.peft.config import PeftConfig
from engine.batches import RowTokenizer
from engine.rows import RowStore
from engine.transformers_backend import load_tokenizer
from services.models.embedded import EmbeddedModel
from tests.support.three_ways import WARMUP_STEPS, engine_losses, losses_by_hand, losses_in_trl

# Relative. The programs add fp32 numbers in different orders, which changes one or two units in the last place: 1.4e-7
# was measured.
TOLERANCE = 1e-5
STEPS = 6
ALGORITHMS = (Algorithm.LORA, Algorithm.QLORA, Algorithm.DORA, Algorithm.RSLORA, Algorithm.PISSA)


def rows_for(path: Path) -> RowStore:
    """Tokenize questions with answers that the model does not give by itself."""
    tokenizer = RowTokenizer(load_tokenizer(path), "assistant", 64)
    made = [
        {"messages": [
            {"role": "user", "content": f"What is {number} plus {number + 1}?"},
            {"role": "assistant", "content": f"Squawk, {2 * number + 1}!"},
        ]}
        for number in range(8)
    ]  # fmt: skip
    return RowStore(row for number, one in enumerate(made) for row in tokenizer.rows(number, one))


def config_for(algorithm: Algorithm) -> PeftConfig:
    """Configure a short run in which every part of a step is used."""
    settings = {
        "rank": 8, "dropout": 0.0, "max_seq_length": 64, "batch_size": 2, "gradient_accumulation": 2,
        "epochs": STEPS / 2, "learning_rate": 5e-4, "warmup_ratio": WARMUP_STEPS / STEPS, "scheduler": "cosine",
        "weight_decay": 0.1, "max_grad_norm": 0.5,
    }  # fmt: skip
    machine = MachineFacts(has_gpu=False, supports_bf16=False)
    return configure(algorithm, use_case=None, overrides=settings, machine=machine).config


def timed(run: Callable[[], list[float]]) -> tuple[list[float], float]:
    """Return what a run returns, and its seconds."""
    began = time.monotonic()
    return run(), time.monotonic() - began


def main() -> int:
    """Run every way of every algorithm."""
    logging.disable(logging.WARNING)
    apart = 0.0
    print(f"{'algorithm':9} {'first':>8} {'last':>8}   {'by hand':>9} {'TRL':>9}   {'seconds: engine, by hand, TRL'}")
    with tempfile.TemporaryDirectory() as scratch:
        path = EmbeddedModel(ROOT / ".cache", Path(scratch)).prepare(lambda stage, fraction: None)
        rows = rows_for(path)
        for algorithm in ALGORITHMS:
            config = config_for(algorithm)
            ours, ours_s = timed(partial(engine_losses, path, config, rows))
            hand, hand_s = timed(partial(losses_by_hand, path, config, rows))
            trl, trl_s = timed(partial(losses_in_trl, path, config, rows, Path(scratch)))
            differences = [
                max(abs(one / other - 1) for one, other in zip(ours, others, strict=True)) for others in (hand, trl)
            ]
            apart = max(apart, *differences)
            print(
                f"{algorithm.value:9} {ours[0]:8.4f} {ours[-1]:8.4f}   {differences[0]:9.1e} {differences[1]:9.1e}"
                f"   {ours_s:6.1f} {hand_s:6.1f} {trl_s:6.1f}",
                flush=True,
            )
    print(f"largest difference {apart:.1e}, allowed {TOLERANCE:.0e}")
    return 0 if apart <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
