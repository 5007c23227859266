"""The forward and backward passes of an optimizer step, or of an evaluation, in this process."""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch

from engine.batches import Batch

Loss = Callable[[Batch], torch.Tensor]


class Passes(Protocol):
    """Computes what a step needs before the optimizer takes it."""

    def gradients(self, step: int, batches: Sequence[Batch], count: int, scaler: torch.amp.GradScaler) -> float:
        """Add the gradient of the mean loss to every trained parameter's `grad`.

        Args:
            step: Optimizer steps that are done.
            batches: Those of this step.
            count: Trained tokens of all of them: the loss of each token weighs 1 / count.
            scaler: Scales the loss before its backward pass.

        Returns:
            The mean loss a trained token, unscaled.

        Raises:
            Stopped: The client ended the run.
        """

    def losses(self, batches: Iterable[Batch]) -> float:
        """Return the loss summed over all trained tokens of some batches, without a gradient.

        The model is in evaluation mode.

        Raises:
            Stopped: The client ended the run.
        """


class OwnPasses:
    """All passes one after the other on this process's model.

    Args:
        loss: From a batch to its summed loss.
        check_stop: Called before each pass; raises Stopped to end the run.
    """

    def __init__(self, loss: Loss, check_stop: Callable[[], None]) -> None:
        self._loss, self._check_stop = loss, check_stop

    def gradients(self, step: int, batches: Sequence[Batch], count: int, scaler: torch.amp.GradScaler) -> float:
        """Do as `Passes.gradients` says."""
        total = 0.0
        for batch in batches:
            self._check_stop()
            loss = self._loss(batch) / count
            scaler.scale(loss).backward()
            total += float(loss.detach())
        return total

    def losses(self, batches: Iterable[Batch]) -> float:
        """Do as `Passes.losses` says."""
        total = 0.0
        for batch in batches:
            self._check_stop()
            total += float(self._loss(batch))
        return total
