"""The loss that rounding to 4 bits costs when an adapter is handed out, on the embedded model.

    python bench/rounding.py

It trains QLoRA and each method that freezes 4-bit weights of its own. For each it measures the loss on held-out rows
three times: of the model as it was trained, of the adapter on the 4-bit base that serves it, and of the adapter on the
published weights.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "backend")]

from engine.guards import hide_broken_torchvision

hide_broken_torchvision()

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import set_seed

from domain.configure import MachineFacts, configure
from domain.peft.algorithms import Algorithm
from domain.peft.config import PeftConfig
from engine import methods
from engine.base import Base
from engine.batches import RowTokenizer, pad
from engine.frozen_weights import original_weights_kept
from engine.initialisation import create_adapter
from engine.loss import SummedLoss
from engine.rows import Row, RowStore
from engine.trainer import Trainer
from engine.transformers_backend import load_tokenizer
from services.models.embedded import MODEL_ID, EmbeddedModel

RUNS: tuple[tuple[str, Algorithm, dict[str, Any]], ...] = (
    ("QLoRA", Algorithm.QLORA, {}),
    ("QPiSSA", Algorithm.PISSA, {"quantization": "nf4"}),
    ("LoftQ, 1 iteration", Algorithm.LOFTQ, {}),
    ("LoftQ, 3 iterations", Algorithm.LOFTQ, {"loftq_iterations": 3}),
    ("OLoRA, nf4", Algorithm.OLORA, {"quantization": "nf4"}),
)


class GoOn:
    """A client that asks for nothing."""

    def check_stop(self) -> None:
        """Go on."""

    def take_checkpoint_request(self) -> bool:
        """Write none."""
        return False


def rows_for(path: Path) -> list[Row]:
    """Tokenize sums that a parrot tells."""
    tokenizer = RowTokenizer(load_tokenizer(path), "assistant", 64)
    texts = [(f"What is {n} plus {n + 3}?", f"Squawk! {2 * n + 3} it is, squawk.") for n in range(48)]
    made = [
        {"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]}
        for ask, answer in texts
    ]
    return [row for number, one in enumerate(made) for row in tokenizer.rows(number, one)]


def loss_of(base: Base, rows: list[Row]) -> float:
    """Return the mean loss of a trained token, in eval mode."""
    base.model.eval()
    batch = pad(rows, int(base.tokenizer.pad_token_id))
    with torch.no_grad():
        return float(SummedLoss(base.model, base.device)(batch).total) / batch.trained_tokens


def train(path: Path, config: PeftConfig, rows: list[Row], held: list[Row], adapter: Path) -> tuple[float, float]:
    """Train and write the adapter; return the loss as trained, and the loss on the base with its own weights."""
    base = Base(path, config, "cpu", "transformers")
    with original_weights_kept(base.model, methods.changed_layers(base.model, config), adapter.parent):
        set_seed(config.seed)
        initial = create_adapter(base, "adp", config, MODEL_ID, None)
        Trainer(
            base, config, RowStore(rows), RowStore(), request_id="r", emit=lambda event: None, control=GoOn(),
            initial=initial,
        ).run()  # fmt: skip
        trained = loss_of(base, held)
        state, lora = methods.adapter_state(base.model, "adp"), base.model.peft_config["adp"]
        if initial:
            state, lora = methods.as_plain_lora(state, initial, lora)
        _write(adapter, state, lora)
    base.detach("adp")
    base.attach("adp", adapter)
    with base.using("adp"):
        return trained, loss_of(base, held)


def _write(folder: Path, state: dict[str, torch.Tensor], lora: LoraConfig) -> None:
    folder.mkdir()
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    lora.save_pretrained(str(folder))


def main() -> int:
    """Train each and print the table."""
    machine = MachineFacts(has_gpu=False, supports_bf16=False)
    settings = {"rank": 16, "dropout": 0.0, "max_seq_length": 64, "max_steps": 8, "learning_rate": 2e-4}
    print(f"{'method':20} {'as trained':>11} {'on its 4 bits':>14} {'as published':>13}   held-out loss")
    with tempfile.TemporaryDirectory() as scratch:
        path = EmbeddedModel(ROOT / ".cache", Path(scratch)).prepare(lambda stage, fraction: None)
        rows = rows_for(path)
        held, learned = rows[::6], [row for at, row in enumerate(rows) if at % 6]
        for number, (name, algorithm, overrides) in enumerate(RUNS):
            config = configure(algorithm, use_case=None, overrides=settings | overrides, machine=machine).config
            adapter = Path(scratch) / str(number)
            trained, served = train(path, config, learned, held, adapter)
            plain = configure(Algorithm.LORA, use_case=None, overrides=settings, machine=machine).config
            base = Base(path, plain, "cpu", "transformers")
            base.attach("adp", adapter)
            if number == 0:
                with base.using(None):
                    print(f"{'before training':20} {'':11} {'':14} {loss_of(base, held):13.4f}", flush=True)
            with base.using("adp"):
                print(f"{name:20} {trained:11.4f} {served:14.4f} {loss_of(base, held):13.4f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
