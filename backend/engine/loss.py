"""The loss of a batch: cross-entropy over the trained tokens."""

from inspect import signature
from typing import Any

import torch
from torch.nn import functional

from engine.batches import Batch
from engine.rows import IGNORED


class SummedLoss:
    """Cross-entropy summed over a batch's trained tokens; the head runs only where some row has one."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self._model, self._device = model, device
        self._keeps_logits = "logits_to_keep" in signature(model.get_base_model().forward).parameters

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Return the sum, a scalar with a gradient."""
        targets = batch.labels[:, 1:]
        columns = torch.nonzero((targets != IGNORED).any(dim=0)).flatten().to(self._device)
        inputs = {
            name: None if tensor is None else tensor.to(self._device)
            for name, tensor in (
                ("input_ids", batch.input_ids),
                ("attention_mask", batch.attention_mask),
                ("position_ids", batch.position_ids),
            )
        }
        if self._keeps_logits:
            logits = self._model(**inputs, use_cache=False, logits_to_keep=columns).logits
        else:
            logits = self._model(**inputs, use_cache=False).logits[:, columns]
        wanted = targets.to(self._device)[:, columns]
        return functional.cross_entropy(
            logits.float().flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="sum"
        )
