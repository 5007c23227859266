"""The library that loads a base, trains it and answers with it: plain transformers + PEFT, or Unsloth."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from domain.peft.config import PeftConfig
from engine.batches import Batch
from engine.loss import BatchLoss


class Backend(Protocol):
    """Loads a base, and switches it between training and answering."""

    def load(self, path: Path, config: PeftConfig, device: str) -> tuple[Any, Any]:
        """Load the model and its tokenizer from a folder. No code from the folder is run."""

    def begin_training(self, model: Any, config: PeftConfig) -> str:
        """Prepare the model, whose trainable adapter is active; return how that adapter computes."""

    def end_training(self, model: Any, config: PeftConfig) -> None:
        """Undo what `begin_training` did, so that every other adapter on the base computes as before."""

    def begin_answering(self, model: Any) -> None:
        """Prepare the model for generation."""

    def loss(self, model: Any, device: torch.device) -> Callable[[Batch], BatchLoss]:
        """Return a function from a batch to the cross-entropy summed over its trained tokens."""

    def loss_described(self) -> str:
        """Say in words how what `loss` or `token_losses` returned last computes."""

    def token_losses(self, model: Any, device: torch.device) -> Callable[[Batch], torch.Tensor]:
        """Return a function from a batch to the cross-entropy of each trained token, N, with a gradient.

        They are in the order of the batch's sequences, and of the tokens in each.

        Raises:
            BadSetting: The back end computes the sum alone.
        """

    def longest(self, model: Any) -> int | None:
        """Return the most tokens that the loaded model takes; None if it does not say."""


def backend_of(engine: str) -> Backend:
    """Return the back end of this name. Unsloth is imported only if it is named."""
    if engine == "unsloth":
        from engine.unsloth_backend import UnslothBackend

        return UnslothBackend()
    from engine.transformers_backend import TransformersBackend

    return TransformersBackend()
