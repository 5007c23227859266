"""DoRA with norms in blocks beside DoRA with PEFT's own layer and beside LoRA, on one base, in turn.

    python bench/bench_dora.py

It measures the seconds of a training pass (forward and backward) and of a greedy answer of SmolLM2-135M-Instruct in
fp32, with rank 16 on all linear layers. Each round measures all three; the ratios are of medians over the rounds. Both
DoRA adapters hold the same numbers. It exits with 1 if their losses are more than 1e-5 apart or the answers differ.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "backend"))

from engine.guards import hide_broken_torchvision

hide_broken_torchvision()

import torch
from peft.tuners.lora import variants
from peft.tuners.lora.dora import DoraLinearLayer

from domain.configure import MachineFacts, configure
from domain.peft.algorithms import Algorithm
from engine.base import Base
from engine.dora import use_blocks
from engine.initialisation import create_adapter
from services.models.embedded import EmbeddedModel

ROUNDS, ANSWER = 7, 24
KINDS = {"lora": Algorithm.LORA, "peft": Algorithm.DORA, "blocks": Algorithm.DORA}


def prepare(path: Path) -> Base:
    """Put one adapter of each kind on a base. B is not zero, and is the same in both adapters of DoRA."""
    machine = MachineFacts(has_gpu=False, supports_bf16=False)
    base: Base | None = None
    for name, algorithm in KINDS.items():
        config = configure(algorithm, use_case=None, overrides={"dropout": 0.0}, machine=machine).config
        base = base or Base(path, config, "cpu", "transformers")
        variants.DoraLinearLayer = DoraLinearLayer
        if name == "blocks":
            use_blocks()
        torch.manual_seed(0)
        create_adapter(base, name, config, path.name, None)
        with torch.no_grad():
            for parameter in base.model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.002 * torch.randn(parameter.shape))
    assert base is not None
    return base


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds that a call takes, and what it returns."""
    began = time.perf_counter()
    returned = run()
    return time.perf_counter() - began, returned


def training_pass(base: Base, name: str, ids: torch.Tensor) -> tuple[float, float]:
    """Return the seconds of a forward and backward pass, and the loss."""
    base.model.set_adapter(name)
    base.model.train()

    def run() -> float:
        loss = base.model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return float(loss.detach())

    timing = timed(run)
    base.model.zero_grad(set_to_none=True)
    return timing


def answer(base: Base, name: str, ids: torch.Tensor) -> tuple[float, list[int]]:
    """Return the seconds of a greedy answer of fixed length, and its tokens."""
    base.model.eval()
    with base.using(name), torch.no_grad():
        seconds, out = timed(
            lambda: base.model.generate(input_ids=ids, max_new_tokens=ANSWER, min_new_tokens=ANSWER, do_sample=False)
        )
    return seconds, out[0].tolist()


def alike(theirs: float | list[int], ours: float | list[int]) -> bool:
    """Whether two losses agree to rounding, or two answers token by token."""
    if isinstance(theirs, list) or isinstance(ours, list):
        return theirs == ours
    return abs(ours / theirs - 1) < 1e-5


def main() -> int:
    """Print the ratios."""
    with tempfile.TemporaryDirectory() as logs:
        path = EmbeddedModel(ROOT / ".cache", Path(logs)).prepare(lambda stage, fraction: None)
        base = prepare(path)
    same = True
    for length in (64, 256):
        ids = torch.randint(5, 40_000, (1, length), generator=torch.Generator().manual_seed(1))
        for what, run in (("training pass", training_pass), (f"answer of {ANSWER} tokens", answer)):
            seconds: dict[str, list[float]] = {name: [] for name in KINDS}
            for _ in range(ROUNDS):
                results = {name: run(base, name, ids) for name in KINDS}
                for name, (took, _) in results.items():
                    seconds[name].append(took)
                same &= alike(results["peft"][1], results["blocks"][1])
            middle = {name: statistics.median(values) for name, values in seconds.items()}
            print(
                f"{length} tokens, {what}: blocks x {middle['blocks'] / middle['peft']:.2f} of PEFT's layer"
                f" ({middle['peft']:.2f} s), DoRA by blocks x {middle['blocks'] / middle['lora']:.2f} of LoRA"
                f" (PEFT's x {middle['peft'] / middle['lora']:.2f})",
                flush=True,
            )
    print("the same losses and answers" if same else "losses or answers differ")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
