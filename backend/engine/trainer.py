"""The training loop: every setting of the configuration is used here, in one place, in plain torch.

docs/decisions/0002-own-training-loop.md says why it is ours.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch.nn import functional
from transformers import get_scheduler, set_seed

from domain.peft_config import PeftConfig
from domain.protocol import Evaluated, StepMetrics
from engine.base import Base
from engine.batches import IGNORED, Batch, Row, epoch_batches, pad
from engine.errors import NotFinite

# A constant rate after the warm-up is transformers' "constant_with_warmup".
SCHEDULERS = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


@dataclass(frozen=True)
class Outcome:
    """What a run did. Losses are means a trained token; None where nothing was evaluated."""

    steps: int
    first_loss: float
    final_loss: float
    initial_eval_loss: float | None
    final_eval_loss: float | None
    tokens: int
    elapsed_s: float
    stopped_early: bool


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


class Trainer:
    """Trains the active adapter of a base.

    Args:
        base: Holds the model with the adapter already created.
        config: The complete configuration.
        rows: Tokenized training rows, each with at least one trained token.
        validation: Tokenized validation rows, or none.
        request_id: Stamped on every event.
        emit: Takes the events.
        check_stop: Called between forward passes; raises to end the run.
    """

    def __init__(
        self,
        base: Base,
        config: PeftConfig,
        rows: list[Row],
        validation: list[Row],
        *,
        request_id: str,
        emit: Callable[[Any], None],
        check_stop: Callable[[], None],
    ) -> None:
        self._base, self._config = base, config
        self._rows, self._validation = rows, validation
        self._request_id, self._emit, self._check_stop = request_id, emit, check_stop
        self._pad_id = int(base.tokenizer.pad_token_id)
        self._parameters = [p for p in base.model.parameters() if p.requires_grad]
        self._optimizer = make_optimizer(self._parameters, config)
        self.total_steps = planned_steps(config, len(self._epoch(0)))
        self._scheduler = get_scheduler(
            SCHEDULERS[config.scheduler],
            self._optimizer,
            num_warmup_steps=math.ceil(config.warmup_ratio * self.total_steps),
            num_training_steps=self.total_steps,
        )
        # fp16 gradients underflow without scaling; the other types need none.
        self._scaler = torch.amp.GradScaler(base.device.type, enabled=config.precision == "fp16")
        forward = signature(base.model.get_base_model().forward).parameters
        self._keeps_logits = "logits_to_keep" in forward
        self._tokens = 0
        self._started = 0.0
        self._step_time_s = 0.0  # in optimizer steps alone, evaluation left out

    def run(self) -> Outcome:
        """Train to the last step, or until early stopping.

        Raises:
            NotFinite: The loss of a step is NaN or infinite; the rows of that step are named.
        """
        self._begin()
        try:
            return self._loop()
        finally:
            self._end()

    def _begin(self) -> None:
        set_seed(self._config.seed)
        if self._config.gradient_checkpointing and self._base.engine == "transformers":
            self._base.model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        self._base.model.train()
        self._started = time.monotonic()

    def _end(self) -> None:
        self._base.model.eval()
        if self._config.gradient_checkpointing and self._base.engine == "transformers":
            self._base.model.get_base_model().gradient_checkpointing_disable()
        self._optimizer.zero_grad(set_to_none=True)

    def _loop(self) -> Outcome:
        best, waits = math.inf, 0
        initial_eval = final_eval = self._evaluate(0, 0.0)
        losses: list[float] = []
        step, epoch, stopped_early = 0, 0, False
        while step < self.total_steps and not stopped_early:
            batches = self._epoch(epoch)
            for at in range(0, len(batches), self._config.gradient_accumulation):
                group = batches[at : at + self._config.gradient_accumulation]
                step += 1
                passes = epoch + (at + len(group)) / len(batches)
                losses.append(self._step(step, passes, group))
                if self._evaluates_after(step):
                    final_eval = self._evaluate(step, passes)
                    waits = 0 if final_eval is not None and final_eval < best else waits + 1
                    best = min(best, final_eval if final_eval is not None else math.inf)
                    stopped_early = waits >= (self._config.early_stopping_patience or math.inf)
                if step == self.total_steps or stopped_early:
                    break
            epoch += 1
        return Outcome(
            step, losses[0], losses[-1], initial_eval, final_eval, self._tokens, self._elapsed(), stopped_early
        )

    def _evaluates_after(self, step: int) -> bool:
        every = self._config.eval_every_steps
        return bool(self._validation) and (step == self.total_steps or (every is not None and step % every == 0))

    def _epoch(self, epoch: int) -> list[Batch]:
        return epoch_batches(
            self._rows,
            batch_size=self._config.batch_size,
            capacity=self._config.max_seq_length,
            packing=self._config.packing,
            pad_id=self._pad_id,
            seed=self._config.seed,
            epoch=epoch,
        )

    def _step(self, step: int, epoch: float, batches: list[Batch]) -> float:
        # Normalised by the trained tokens of the whole step: an answer token weighs the same whichever
        # micro-batch it is in (the gradient accumulation fix of transformers 4.46).
        began = time.monotonic()
        count = sum(batch.trained_tokens for batch in batches)
        learning_rate = float(self._scheduler.get_last_lr()[0])
        total = 0.0
        for batch in batches:
            self._check_stop()
            loss = self._summed_loss(batch) / count
            self._scaler.scale(loss).backward()
            total += float(loss.detach())
            self._tokens += batch.tokens
        if not math.isfinite(total):
            rows = sorted(row + 1 for batch in batches for row in batch.rows)
            raise NotFinite(
                f"the loss of step {step} is {total}; its rows are {rows[:50]}",
                ["halve learning_rate", "precision bf16 or fp32", "look at the named rows"],
            )
        self._scaler.unscale_(self._optimizer)
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, self._config.max_grad_norm))
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._scheduler.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._step_time_s += time.monotonic() - began
        self._report(step, epoch, total, learning_rate, norm)
        return total

    def _report(self, step: int, epoch: float, loss: float, learning_rate: float, norm: float) -> None:
        self._emit(
            StepMetrics(
                request_id=self._request_id,
                step=step,
                total_steps=self.total_steps,
                epoch=epoch,
                loss=loss,
                learning_rate=learning_rate,
                grad_norm=norm,
                tokens=self._tokens,
                tokens_per_s=self._tokens / max(self._step_time_s, 1e-9),
                memory_bytes=self._base.memory_bytes(),
                elapsed_s=self._elapsed(),
                eta_s=self._step_time_s / step * (self.total_steps - step),
            )
        )

    def _elapsed(self) -> float:
        return max(time.monotonic() - self._started, 1e-9)

    def _summed_loss(self, batch: Batch) -> torch.Tensor:
        """Cross-entropy summed over the trained tokens; the head runs only where some row has one."""
        device = self._base.device
        targets = batch.labels[:, 1:]
        columns = torch.nonzero((targets != IGNORED).any(dim=0)).flatten()
        inputs = {
            "input_ids": batch.input_ids.to(device),
            "attention_mask": None if batch.attention_mask is None else batch.attention_mask.to(device),
            "position_ids": None if batch.position_ids is None else batch.position_ids.to(device),
        }
        if self._keeps_logits:
            logits = self._base.model(**inputs, use_cache=False, logits_to_keep=columns.to(device)).logits
        else:
            logits = self._base.model(**inputs, use_cache=False).logits[:, columns.to(device)]
        wanted = targets[:, columns].to(device)
        return functional.cross_entropy(
            logits.float().flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="sum"
        )

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def _evaluate(self, step: int, epoch: float) -> float | None:
        if not self._validation:
            return None
        self._base.model.eval()
        total, count = 0.0, 0
        by_length = sorted(self._validation, key=lambda row: len(row.ids))
        for at in range(0, len(by_length), self._config.batch_size):
            self._check_stop()
            batch = pad(by_length[at : at + self._config.batch_size], self._pad_id)
            total += float(self._summed_loss(batch))
            count += batch.trained_tokens
        self._base.model.train()
        loss = total / count
        self._emit(
            Evaluated(request_id=self._request_id, step=step, epoch=epoch, eval_loss=loss, elapsed_s=self._elapsed())
        )
        return loss
