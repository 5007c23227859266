"""One run in three ways: a loop written by hand on PyTorch and PEFT, TRL's SFTTrainer, and the engine.

All three take the same configuration, the same tokenized rows and the same order of batches; each makes its own model,
adapter, optimizer, schedule and loss with the means of its kind.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, PeftModelForCausalLM
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.lora import variants
from peft.tuners.lora.dora import DoraLinearLayer
from torch.utils.data import Sampler
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    get_cosine_schedule_with_warmup,
    set_seed,
)

from domain.peft.config import PeftConfig
from domain.protocol import StepMetrics
from engine.base import Base
from engine.batches import Batches, Grouping, epoch_batches
from engine.initialisation import create_adapter
from engine.optimizer import planned_steps
from engine.rows import RowStore
from engine.trainer import Trainer

WARMUP_STEPS = 2


class _GoOn:
    def check_stop(self) -> None:
        pass

    def take_checkpoint_request(self) -> bool:
        return False


def epochs(config: PeftConfig, rows: RowStore, pad_id: int) -> list[Batches]:
    """Return the batches of every epoch, in order."""
    return [
        epoch_batches(
            rows,
            Grouping(config.batch_size, config.max_seq_length, False, pad_id),
            seed=config.seed,
            epoch=epoch,
        )
        for epoch in range(int(config.epochs))
    ]


def engine_losses(path: Path, config: PeftConfig, rows: RowStore, continues: Path | None = None) -> list[float]:
    """Train as the service does; return the loss of each step.

    Args:
        continues: The folder of the adapter that is continued, if one is.
    """
    base = Base(path, config, "cpu", "transformers")
    set_seed(config.seed)
    initial = create_adapter(base, "adp", config, "tests/tiny", None, continues=continues)
    events: list[Any] = []
    Trainer(
        base, config, rows, RowStore(), request_id="r", emit=events.append, control=_GoOn(), initial=initial
    ).run()  # fmt: skip
    return [event.loss for event in events if isinstance(event, StepMetrics)]


def adapted(path: Path, config: PeftConfig, continues: Path | None = None) -> PeftModel:
    """Load with stock transformers and PEFT, as a script would: with a new adapter, or with one to train on."""
    quantization = None
    if config.quantization == "nf4":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, quantization_config=quantization)
    model.requires_grad_(False)
    set_seed(config.seed)
    if continues is not None:
        return PeftModelForCausalLM.from_pretrained(model, continues, is_trainable=True)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules="all-linear",
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        init_lora_weights={"default": True}.get(config.init_weights, config.init_weights),
    )
    variants.DoraLinearLayer = DoraLinearLayer  # not the engine's, which may have been here before
    return PeftModelForCausalLM(model, lora)


def losses_by_hand(path: Path, config: PeftConfig, rows: RowStore) -> list[float]:
    """Train in a plain loop; the loss is summed over the whole step's tokens and divided once."""
    model = adapted(path, config)
    parameters = [p for p in model.parameters() if p.requires_grad]
    fast = [p for name, p in model.named_parameters() if p.requires_grad and "lora_A" not in name]
    slow = [p for name, p in model.named_parameters() if p.requires_grad and "lora_A" in name]
    ratio = config.lora_plus_ratio or 1.0
    optimizer = torch.optim.AdamW(
        [{"params": slow}, {"params": fast, "lr": config.learning_rate * ratio}],
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
    )
    passes = epochs(config, rows, 0)
    steps = planned_steps(config, len(passes[0]))
    scheduler = get_cosine_schedule_with_warmup(optimizer, WARMUP_STEPS, steps)
    set_seed(config.seed)
    model.train()
    found = []
    for batches in passes:
        for at in range(0, len(batches), config.gradient_accumulation):
            group = batches[at : at + config.gradient_accumulation]
            tokens = sum(int((batch.labels[:, 1:] != -100).sum()) for batch in group)
            total = 0.0
            for batch in group:
                logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
                loss = torch.nn.functional.cross_entropy(
                    logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="sum"
                )
                (loss / tokens).backward()
                total += float(loss.detach()) / tokens
            torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            found.append(total)
    return found


class _GivenOrder(Sampler[int]):
    """Gives the rows of one epoch after the other."""

    def __init__(self, orders: list[list[int]]) -> None:
        self._orders, self._epoch = orders, 0

    def __iter__(self) -> Iterator[int]:
        self._epoch += 1
        return iter(self._orders[(self._epoch - 1) % len(self._orders)])

    def __len__(self) -> int:
        return len(self._orders[0])


def trl_settings(config: PeftConfig, scratch: Path) -> dict[str, Any]:
    """Return what every trainer of TRL takes of a configuration, in fp32 on the CPU, with nothing kept or told."""
    return {
        "output_dir": str(scratch),
        "per_device_train_batch_size": config.batch_size,
        "learning_rate": config.learning_rate,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "optim": "adamw_torch",
        "max_length": config.max_seq_length,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "seed": config.seed,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def losses_in_trl(
    path: Path, config: PeftConfig, rows: RowStore, scratch: Path, *, as_it_is: bool = False
) -> list[float]:
    """Train with TRL's SFTTrainer, whose loss, optimizer, schedule, clipping and accumulation are its own.

    Args:
        as_it_is: On a base in 4 bits SFTTrainer rounds the adapter's weights to bf16, and AdamW then updates them
            there (trl 1.14, `SFTTrainer.__init__`). Otherwise they are put back in fp32, as PEFT makes them.
    """
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    orders = [[row for batch in batches for row in batch.rows] for batches in epochs(config, rows, 0)]

    class Recording(SFTTrainer):
        found: list[float]

        def _get_train_sampler(self, *_: Any) -> _GivenOrder:
            return _GivenOrder(orders)

        def training_step(self, *arguments: Any, **named: Any) -> torch.Tensor:
            loss: torch.Tensor = super().training_step(*arguments, **named)
            self.found.append(float(loss))
            return loss

    arguments = SFTConfig(
        **trl_settings(config, scratch),
        gradient_accumulation_steps=config.gradient_accumulation,
        num_train_epochs=config.epochs,
        warmup_steps=WARMUP_STEPS,
        lr_scheduler_type=config.scheduler,
        loss_type="nll",
    )
    data = Dataset.from_list([{"input_ids": row.ids, "labels": row.labels} for row in rows])
    model = adapted(path, config)
    made = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    optimizer = None
    if config.lora_plus_ratio is not None:
        optimizer = create_loraplus_optimizer(
            model,
            torch.optim.AdamW,
            lr=config.learning_rate,
            loraplus_lr_ratio=config.lora_plus_ratio,
            loraplus_weight_decay=config.weight_decay,
        )
    trainer = Recording(
        model,
        args=arguments,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(path),
        optimizers=(optimizer, None),
    )
    for name, weight in () if as_it_is else made.items():
        model.get_parameter(name).data = weight
    trainer.found = []
    trainer.train()
    size = config.gradient_accumulation
    return [sum(trainer.found[at : at + size]) for at in range(0, len(trainer.found), size)]
