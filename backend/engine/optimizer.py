"""The optimizer, its learning rate over the run, and how many steps there are."""

import math
from typing import Any

import torch
from transformers import get_scheduler

from domain.peft_config import PeftConfig

# A constant rate after the warm-up is transformers' "constant_with_warmup".
SCHEDULERS = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


def planned_steps(config: PeftConfig, batches_per_epoch: int) -> int:
    """Return the number of optimizer steps: `max_steps`, or `epochs` passes rounded up to whole steps."""
    if config.max_steps is not None:
        return config.max_steps
    return max(1, math.ceil(config.epochs * math.ceil(batches_per_epoch / config.gradient_accumulation)))


def make_optimizer(parameters: list[torch.nn.Parameter], config: PeftConfig) -> torch.optim.Optimizer:
    """Make AdamW over the adapter's parameters (betas 0.9 and 0.999, epsilon 1e-8, as in the HF Trainer)."""
    if config.optimizer == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    return torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)


def make_scheduler(optimizer: torch.optim.Optimizer, config: PeftConfig, total_steps: int) -> Any:
    """Make the learning rate's schedule: a linear warm-up of whole steps, then the configured decay."""
    return get_scheduler(
        SCHEDULERS[config.scheduler],
        optimizer,
        num_warmup_steps=math.ceil(config.warmup_ratio * total_steps),
        num_training_steps=total_steps,
    )
