"""The optimizer, its learning rate over the run, and the number of steps."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from domain.peft.config import PeftConfig

# A constant rate after the warm-up is transformers' "constant_with_warmup".
SCHEDULERS = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


def planned_steps(config: PeftConfig, batches_per_epoch: int) -> int:
    """Return the number of optimizer steps: `max_steps`, or `epochs` passes rounded up to whole steps."""
    if config.max_steps is not None:
        return config.max_steps
    return max(1, math.ceil(config.epochs * math.ceil(batches_per_epoch / config.gradient_accumulation)))


def make_optimizer(parameters: Mapping[str, torch.nn.Parameter], config: PeftConfig) -> torch.optim.Optimizer:
    """Make AdamW over the adapter's parameters.

    Args:
        parameters: By name.
    """
    groups = parameter_groups(parameters, config)
    betas = (config.adam_beta1, config.adam_beta2)
    settings = {"lr": config.learning_rate, "betas": betas, "eps": config.adam_epsilon}
    if config.optimizer == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, **settings, weight_decay=config.weight_decay)
    return torch.optim.AdamW(groups, **settings, weight_decay=config.weight_decay)


def parameter_groups(parameters: Mapping[str, torch.nn.Parameter], config: PeftConfig) -> list[dict[str, Any]]:
    """Group the parameters by their learning rate. There is one rate; with LoRA+, B has a multiple of A's.

    DoRA's magnitudes have B's rate, as in PEFT's `create_loraplus_optimizer`: both start where the base is.

    Source: LoRA+ (arXiv 2402.12354), section 4: B's rate is λ times A's.
    """
    if config.lora_plus_ratio is None:
        return [{"params": list(parameters.values())}]
    slow = {name: parameter for name, parameter in parameters.items() if ".lora_A." in name}
    fast = [parameter for name, parameter in parameters.items() if name not in slow]
    return [
        {"params": list(slow.values())},
        {"params": fast, "lr": config.learning_rate * config.lora_plus_ratio},
    ]


def make_scheduler(optimizer: torch.optim.Optimizer, config: PeftConfig, total_steps: int) -> Any:
    """Make the learning rate's schedule: a linear warm-up of whole steps, then the configured decay to its floor."""
    warmup_steps, floor = math.ceil(config.warmup_ratio * total_steps), config.min_learning_rate_ratio
    scheduler = get_scheduler(
        SCHEDULERS[config.scheduler], optimizer, num_warmup_steps=warmup_steps, num_training_steps=total_steps
    )
    if floor == 0:
        return scheduler
    to_zero = scheduler.lr_lambdas[0]  # the same for every group

    def to_floor(step: int) -> float:
        return float(to_zero(step)) if step < warmup_steps else floor + (1 - floor) * float(to_zero(step))

    return LambdaLR(optimizer, to_floor)


def settings_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return each group's settings: rates, betas, epsilon, decay."""
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


def go_on_with(settings: list[dict[str, Any]], optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    """Give an optimizer and a scheduler that were restored from a checkpoint this run's settings.

    A checkpoint brings the settings that it was written with, and its own schedule's rate for the next step.

    Args:
        settings: As `settings_of` returned them before the optimizer was restored.
        optimizer: Restored.
        scheduler: Restored. Its place in the schedule stays.
    """
    scheduler.base_lrs = [own["initial_lr"] for own in settings]
    rates = [
        base * factor(scheduler.last_epoch)
        for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, own, rate in zip(optimizer.param_groups, settings, rates, strict=True):
        group.update(own | {"lr": rate})
    scheduler._last_lr = rates
