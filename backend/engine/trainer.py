"""The training loop: every setting of the configuration is used here, in one place, in plain torch.

docs/decisions/0002-own-training-loop.md says why it is ours.
"""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch.utils.hooks import RemovableHandle
from transformers import set_seed

from core.errors import StorageFull
from domain.jobs.figures import RunOutcome
from domain.peft.config import PeftConfig
from domain.protocol import CheckpointWritten, Computing, Evaluated, StepMetrics
from engine.base import Base
from engine.batches import Batch, Batches, epoch_batches, evaluation_batches, grouping_of
from engine.channel import Stopped
from engine.checkpoints import (
    Checkpoint,
    CheckpointFolder,
    RunProgress,
    Tensors,
    restore_optimizer,
    restore_rng,
    rng_state,
    split_optimizer,
)
from engine.errors import BadData, BadSetting, NotFinite
from engine.gradient_workers import GradientWorkers
from engine.neftune import add_noise
from engine.objectives import Figures, Size, objective_of, preference_figures
from engine.optimizer import go_on_with, make_optimizer, make_scheduler, planned_steps, settings_of
from engine.passes import OwnPasses, Passes
from engine.rows import RowStore
from engine.run_report import run_report


class Control(Protocol):
    """Passes on what the client asks of a run while it runs."""

    def check_stop(self) -> None:
        """Raise Stopped if the run is to end; called between forward passes."""

    def take_checkpoint_request(self) -> bool:
        """Tell whether a checkpoint was asked for since the last call."""


class Trainer:
    """Trains the active adapter of a base.

    Between two optimizer steps the whole state of a run is `progress`, the parameters, the optimizer with its
    scheduler and scaler, and the random generators. A checkpoint holds all of these. A run that goes on from one
    computes what the uninterrupted run would compute, to the bit where the device's arithmetic is repeatable.

    Args:
        base: Holds the model with the adapter already created.
        config: The complete configuration.
        rows: Tokenized training rows, each with at least one trained token.
        validation: Tokenized validation rows, or none.
        request_id: Stamped on every event.
        emit: Takes the events.
        control: Asked between forward passes whether to go on.
        checkpoints: Where checkpoints go; None for a run without.
        resume: The checkpoint to go on from.
        initial: Tensors to keep in every checkpoint (A and B as initialised, where they are converted afterwards).
    """

    def __init__(
        self,
        base: Base,
        config: PeftConfig,
        rows: RowStore,
        validation: RowStore,
        *,
        request_id: str,
        emit: Callable[[Any], None],
        control: Control,
        checkpoints: CheckpointFolder | None = None,
        resume: Checkpoint | None = None,
        initial: Tensors | None = None,
    ) -> None:
        self._base, self._config = base, config
        self._rows, self._validation = rows, validation
        self._request_id, self._emit, self._control = request_id, emit, control
        self._checkpoints, self._initial = checkpoints, initial or {}
        # Any token will do for padding: it is neither attended to nor learned.
        self._grouping = grouping_of(config, int(base.tokenizer.pad_token_id or 0))
        # Without the adapter's own name: another job may go on from the checkpoint.
        self._named = base.trained
        self._parameters = list(self._named.values())
        self._optimizer = make_optimizer(self._named, config)
        self.total_steps = planned_steps(config, len(self._epoch(0)))
        self._scheduler = make_scheduler(self._optimizer, config, self.total_steps)
        # fp16 gradients underflow without scaling; the other types need none.
        self._scaler = torch.amp.GradScaler(base.device.type, enabled=config.precision == "fp16")
        self._objective = objective_of(base, config)  # before a checkpoint's weights take the place of the first ones
        self._passes: Passes = OwnPasses(self._objective, control.check_stop)
        self._devices = 1
        self.progress = RunProgress(evaluation_due=bool(validation))
        self._noise: RemovableHandle | None = None
        self._best: Tensors = {}
        self._resumed_step: int | None = None
        self._kept_step: int | None = None  # of the newest checkpoint that this run wrote
        set_seed(config.seed)
        if resume is not None:
            self._restore(resume)
        # The generators as they were after the last whole step. A stop in the middle of a step goes back to them.
        self._rng = rng_state(base.device)
        self._started = self._checkpoint_s = time.monotonic()
        self._elapsed_before_s = self.progress.elapsed_s

    def run(self) -> RunOutcome:
        """Train to the last step, to early stopping, or until the client wants the adapter as it is.

        Raises:
            NotFinite: The loss or the gradient of a step is NaN or infinite; the rows of that step are named.
            Stopped: The client ended the run; if it asked for a pause, a checkpoint is written.
            StorageFull: A checkpoint cannot be written; the older ones stay.
        """
        try:
            self._begin()
            self._loop()
            return self._outcome(stopped_on_request=False)
        except Stopped as stopped:
            if stopped.mode == "pause":
                self._write_checkpoint()
            if stopped.mode != "keep" or self.progress.step == 0:
                raise
            self._keep_the_end()
            return self._outcome(stopped_on_request=True)
        finally:
            self._end()

    def share_with(self, workers: GradientWorkers) -> None:
        """Have workers on other devices take a share of every step. They have the adapter already."""
        self._passes = workers.passes(self._objective, self._control.check_stop, self._config.seed)
        self._devices = workers.devices

    def hand_out(self) -> RunOutcome:
        """Train nothing; put the parameters in place that a run hands out which was stopped here."""
        return self._outcome(stopped_on_request=True)

    def prove(self) -> None:
        """Write a checkpoint and delete it, to know that checkpoints can be written.

        Raises:
            StorageFull: No space is left.
        """
        if self._checkpoints is not None:
            self._checkpoints.prove(self._checkpoint())

    def _begin(self) -> None:
        how = self._base.backend.begin_training(self._base.model, self._config)
        if self._devices > 1:
            how += f"; the passes of each step are dealt to {self._devices} devices"
        self._emit(Computing(request_id=self._request_id, how=how))
        self._emit(run_report(self._request_id, self._base, self._optimizer))
        if self._config.neftune_noise_alpha > 0:
            self._noise = add_noise(self._base.model.get_input_embeddings(), self._config.neftune_noise_alpha)
        self._base.model.train()

    def _end(self) -> None:
        self._base.model.eval()
        if self._noise is not None:
            self._noise.remove()
        self._base.backend.end_training(self._base.model, self._config)
        self._optimizer.zero_grad(set_to_none=True)

    def _loop(self) -> None:
        progress, size = self.progress, self._config.gradient_accumulation
        epoch, batches = progress.epoch, self._epoch(progress.epoch)
        while True:
            if progress.step >= self.total_steps:
                self._keep_the_end()  # before its evaluation, which may fail
            if progress.evaluation_due:
                self._evaluate()
            if progress.step >= self.total_steps:
                return
            if self._stopped_early:
                self._keep_the_end()
                return
            self._checkpoint_if_due()
            if progress.epoch != epoch:
                epoch, batches = progress.epoch, self._epoch(progress.epoch)
            self._step(batches[progress.position : progress.position + size], len(batches))

    @property
    def _stopped_early(self) -> bool:
        patience = self._config.early_stopping_patience
        return patience is not None and self.progress.waits >= patience

    def _outcome(self, *, stopped_on_request: bool) -> RunOutcome:
        """Return the outcome. With early stopping, put the parameters of the best evaluation in place first."""
        progress = self.progress
        if progress.first_loss is None or progress.loss is None:
            raise BadData("the run has no step: there is nothing to hand out")
        if self._best:
            with torch.no_grad():
                for name, parameter in self._named.items():
                    parameter.copy_(self._best[name])
        return RunOutcome(
            steps=progress.step,
            adapter_step=progress.best_step if self._best and progress.best_step is not None else progress.step,
            first_loss=progress.first_loss,
            final_loss=progress.loss,
            initial_eval_loss=progress.initial_eval_loss,
            final_eval_loss=progress.eval_loss,
            best_eval_loss=progress.best_eval_loss,
            tokens=progress.tokens,
            elapsed_s=self._elapsed(),
            stopped_early=self._stopped_early,
            stopped_on_request=stopped_on_request,
        )

    def _evaluates_after(self, step: int) -> bool:
        every = self._config.eval_every_steps
        return bool(self._validation) and (step == self.total_steps or (every is not None and step % every == 0))

    def _epoch(self, epoch: int) -> Batches:
        return epoch_batches(self._rows, self._grouping, seed=self._config.seed, epoch=epoch)

    def _step(self, batches: list[Batch], batches_per_epoch: int) -> None:
        """Take one optimizer step. `progress` changes only at its end, so a stop in between leaves it as it was."""
        # Normalised by the trained tokens of the whole step: an answer token weighs the same whichever
        # micro-batch it is in (the gradient accumulation fix of transformers 4.46).
        began = time.monotonic()
        learning_rate = float(self._scheduler.get_last_lr()[0])
        figures = self._passes.gradients(self.progress.step, batches, Size.of(batches), self._scaler)
        total = figures["loss"]
        self._scaler.unscale_(self._optimizer)
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, self._config.max_grad_norm))
        overflow = self._scaler.is_enabled() and not math.isfinite(norm)  # the scaler leaves such a step out
        if not math.isfinite(total) or (not math.isfinite(norm) and not overflow):
            raise self._not_finite("loss" if not math.isfinite(total) else "gradient", batches)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._scheduler.step()
        self._optimizer.zero_grad(set_to_none=True)
        progress = self.progress
        progress.step += 1
        progress.position += len(batches)
        progress.passes = progress.epoch + progress.position / batches_per_epoch
        if progress.position >= batches_per_epoch:
            progress.epoch, progress.position = progress.epoch + 1, 0
        step_tokens = sum(batch.tokens for batch in batches)
        progress.tokens += step_tokens
        progress.first_loss = total if progress.first_loss is None else progress.first_loss
        progress.loss = total
        progress.evaluation_due = self._evaluates_after(progress.step)
        step_s = time.monotonic() - began
        progress.step_time_s += step_s
        self._rng = rng_state(self._base.device)
        self._report(learning_rate, None if overflow else norm, step_s, step_tokens, figures)

    def _not_finite(self, what: str, batches: list[Batch]) -> NotFinite:
        rows = sorted({row + 1 for batch in batches for row in batch.rows})
        return NotFinite(
            f"the {what} of step {self.progress.step + 1} is not finite; its rows are {rows[:50]}",
            ["halve learning_rate", "precision bf16 or fp32", "look at the named rows"],
        )

    def _report(
        self, learning_rate: float, norm: float | None, step_s: float, step_tokens: int, figures: Figures
    ) -> None:
        progress = self.progress
        if progress.loss is None:
            raise ValueError("no step has been taken")
        self._emit(
            StepMetrics(
                request_id=self._request_id,
                step=progress.step,
                total_steps=self.total_steps,
                epoch=progress.passes,
                loss=progress.loss,
                learning_rate=learning_rate,
                grad_norm=norm,
                token_accuracy=figures.get("token_accuracy"),
                preference=preference_figures(figures),
                step_s=step_s,
                step_tokens=step_tokens,
                tokens=progress.tokens,
                tokens_per_s=progress.tokens / max(progress.step_time_s, 1e-9),
                memory_bytes=self._base.memory_bytes(),
                elapsed_s=self._elapsed(),
                eta_s=progress.step_time_s / progress.step * (self.total_steps - progress.step),
            )
        )

    def _elapsed(self) -> float:
        return self._elapsed_before_s + max(time.monotonic() - self._started, 1e-9)

    # Checkpoints

    def _checkpoint_if_due(self) -> None:
        config, step = self._config, self.progress.step
        asked = self._control.take_checkpoint_request()
        if step == 0 and not asked:
            return
        every, minutes = config.checkpoint_every_steps, config.checkpoint_every_minutes
        by_steps = every is not None and step % every == 0 and step != self._resumed_step  # that one is there
        by_time = minutes is not None and time.monotonic() - self._checkpoint_s >= 60 * minutes
        if asked or by_steps or by_time:
            self._write_checkpoint()

    def _keep_the_end(self) -> None:
        """Write the checkpoint of the last step. If a later step fails, the adapter is handed out from it.

        If the disk has no room for it, the run goes on: the adapter takes a third of the room.
        """
        if self.progress.step in (self._resumed_step, self._kept_step):
            return
        try:
            self._write_checkpoint()
        except StorageFull as error:
            sys.stderr.write(f"the checkpoint of the last step is not kept: {error.detail}\n")

    def _write_checkpoint(self) -> None:
        if self._checkpoints is None:
            return
        path = self._checkpoints.write(self._checkpoint())
        self._checkpoint_s, self._kept_step = time.monotonic(), self.progress.step
        size = sum(file.stat().st_size for file in path.iterdir())
        self._emit(CheckpointWritten(request_id=self._request_id, step=self.progress.step, size_bytes=size))

    def _checkpoint(self) -> Checkpoint:
        self.progress.elapsed_s = self._elapsed()
        tensors, plain = split_optimizer(self._optimizer)
        settings = {
            "optimizer": plain,
            "scheduler": self._scheduler.state_dict(),
            "scaler": self._scaler.state_dict(),
            "threads": torch.get_num_threads(),
        }
        return Checkpoint(self.progress, dict(self._named), tensors, self._rng, settings, self._initial, self._best)

    def _restore(self, checkpoint: Checkpoint) -> None:
        if checkpoint.adapter.keys() != self._named.keys():
            raise BadSetting("the checkpoint's parameters are not those of this adapter")
        with torch.no_grad():
            for name, parameter in self._named.items():
                parameter.copy_(checkpoint.adapter[name])
        own = settings_of(self._optimizer)
        restore_optimizer(self._optimizer, checkpoint.optimizer, checkpoint.settings["optimizer"])
        self._scheduler.load_state_dict(checkpoint.settings["scheduler"])
        go_on_with(own, self._optimizer, self._scheduler)
        self._scaler.load_state_dict(checkpoint.settings["scaler"])
        restore_rng(self._base.device, checkpoint.rng)
        self.progress, self._resumed_step = replace(checkpoint.progress), checkpoint.progress.step
        if self.progress.step:  # it may have been the last step of a shorter run, the only one that evaluates there
            self.progress.evaluation_due &= self._evaluates_after(self.progress.step)
        if self.progress.step > self.total_steps:
            raise BadSetting(f"the checkpoint is at step {self.progress.step} already, beyond {self.total_steps}")
        if self._config.early_stopping_patience is None:
            return
        self._best = checkpoint.best
        if not self._best and self.progress.best_step != self.progress.step:
            # The run began without early stopping, so the weights of its best evaluation were not kept.
            self.progress.waits, self.progress.best_step, self.progress.best_eval_loss = 0, None, None

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def _evaluate(self) -> None:
        """Measure the loss on the validation rows. It draws no random number, so it does not change the run."""
        self._base.model.eval()
        rows = self._validation
        size = Size(rows.trained_tokens, len(rows) // self._grouping.per_example)
        figures = self._passes.losses(evaluation_batches(rows, self._grouping), size)
        self._base.model.train()
        self._record_evaluation(figures)

    def _record_evaluation(self, figures: Figures) -> None:
        progress, loss = self.progress, figures["loss"]
        if not math.isfinite(loss):
            raise NotFinite(
                f"the evaluation loss after step {progress.step} is not finite",
                ["halve learning_rate", "precision bf16 or fp32", "look at the validation rows"],
            )
        progress.evaluation_due = False
        progress.eval_loss = loss
        if progress.step == 0:
            progress.initial_eval_loss = loss
        elif progress.best_eval_loss is None or loss < progress.best_eval_loss:
            progress.best_eval_loss, progress.best_step, progress.waits = loss, progress.step, 0
            if self._config.early_stopping_patience is not None:
                self._best = {name: p.detach().to("cpu", copy=True) for name, p in self._named.items()}
        else:
            progress.waits += 1
        self._emit(
            Evaluated(
                request_id=self._request_id,
                step=progress.step,
                epoch=progress.passes,
                eval_loss=loss,
                token_accuracy=figures.get("token_accuracy"),
                preference=preference_figures(figures),
                elapsed_s=self._elapsed(),
            )
        )
