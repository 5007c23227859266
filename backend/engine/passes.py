"""The forward and backward passes of an optimizer step, or of an evaluation, in this process."""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch

from engine.batches import Batch
from engine.objectives import Figures, Objective, Size, add


class Passes(Protocol):
    """Computes what a step needs before the optimizer takes it."""

    def gradients(self, step: int, batches: Sequence[Batch], size: Size, scaler: torch.amp.GradScaler) -> Figures:
        """Add the gradient of the mean loss to every trained parameter's `grad`.

        Args:
            step: Optimizer steps that are done.
            batches: Those of this step.
            size: What the mean is taken over: the size of all of them.
            scaler: Scales the loss before its backward pass.

        Returns:
            The mean loss, unscaled, as `loss`, and the objective's own figures.

        Raises:
            Stopped: The client ended the run.
        """

    def losses(self, batches: Iterable[Batch], size: Size) -> Figures:
        """Return the same figures of some batches, without a gradient. The model is in evaluation mode.

        Raises:
            Stopped: The client ended the run.
        """


class OwnPasses:
    """All passes one after the other on this process's model.

    Args:
        objective: What is minimised.
        check_stop: Called before each pass; raises Stopped to end the run.
    """

    def __init__(self, objective: Objective, check_stop: Callable[[], None]) -> None:
        self._objective, self._check_stop = objective, check_stop

    def gradients(self, step: int, batches: Sequence[Batch], size: Size, scaler: torch.amp.GradScaler) -> Figures:
        """Do as `Passes.gradients` says."""
        figures = []
        for batch in batches:
            self._check_stop()
            made = self._objective(batch, size)
            scaler.scale(made.loss).backward()
            figures.append(made.all_figures())
        return add(figures)

    def losses(self, batches: Iterable[Batch], size: Size) -> Figures:
        """Do as `Passes.losses` says."""
        figures = []
        for batch in batches:
            self._check_stop()
            figures.append(self._objective(batch, size).all_figures())
        return add(figures)
