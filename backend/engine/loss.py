"""The loss of a batch: cross-entropy over its trained tokens, by chunks of them, so that no batch has all its logits.

Shapes: B rows of T tokens, N trained tokens, hidden size H, vocabulary V. docs/decisions/0016-loss-by-chunks.md says
how a chunk's gradient is computed and why.
"""

import sys
from inspect import signature
from typing import Any

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from domain.memory.loss_chunks import chunks, most_tokens
from engine.batches import Batch
from engine.frozen_weights import unwrapped
from engine.logits import NotSplit, Tail, tail_of
from engine.rows import IGNORED


class TokenLosses:
    """Cross-entropy of each trained token of a batch.

    The head runs on trained tokens alone, for one chunk of them after another. Where a class cannot be taken apart, it
    runs once over the columns in which some row has a trained token.

    Args:
        model: With the adapter.
        device: Where it computes.
        tokens: Trained tokens a chunk at most; by default what the vocabulary and the kind of device ask for.
    """

    def __init__(self, model: Any, device: torch.device, tokens: int | None = None) -> None:
        self._model, self._device = model, device
        vocabulary = int(unwrapped(model).config.get_text_config(decoder=True).vocab_size)
        self.most_tokens = tokens or most_tokens(vocabulary, on_gpu=device.type == "cuda")
        self._keeps_logits = "logits_to_keep" in signature(unwrapped(model).forward).parameters
        self._tail: Tail | None = None
        try:
            self._tail = tail_of(model)
            self.how = f"by chunks of {self.most_tokens} trained tokens at most"
        except NotSplit as why:
            self.how = f"over all logits at once: {type(unwrapped(model)).__name__} is not taken apart, since {why}"
            sys.stderr.write(f"the loss is computed {self.how}\n")

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Return the losses, N in fp32 with a gradient, row by row and in the order of the tokens in each."""
        targets = batch.labels[:, 1:]
        rows, columns = torch.nonzero(targets != IGNORED, as_tuple=True)
        wanted = targets[rows, columns].to(self._device)
        inputs: dict[str, Any] = {
            name: None if tensor is None else tensor.to(self._device)
            for name, tensor in (
                ("input_ids", batch.input_ids),
                ("attention_mask", batch.attention_mask),
                ("position_ids", batch.position_ids),
            )
        }
        if self._tail is None:
            return self._of_whole_logits(inputs, rows, columns, wanted)
        hidden = self._tail.hidden(lambda: self._model(**inputs, use_cache=False))
        places = (rows * batch.labels.shape[1] + columns).to(self._device)
        return self._of_hidden(self._tail, hidden.flatten(0, 1).index_select(0, places), wanted)

    def _of_whole_logits(
        self, inputs: dict[str, Any], rows: torch.Tensor, columns: torch.Tensor, wanted: torch.Tensor
    ) -> torch.Tensor:
        kept, at = torch.unique(columns, return_inverse=True)
        if self._keeps_logits:
            logits = self._model(**inputs, use_cache=False, logits_to_keep=kept.to(self._device)).logits
        else:
            logits = self._model(**inputs, use_cache=False).logits[:, kept]
        return functional.cross_entropy(logits[rows, at].float(), wanted, reduction="none")

    def _of_hidden(self, tail: Tail, hidden: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        bounds = chunks(len(wanted), self.most_tokens)
        # In fp16 a gradient underflows unless the scaler's factor is in it from the start.
        if torch.is_grad_enabled() and (tail.trains or hidden.dtype == torch.float16):
            return torch.cat([_recomputed(tail, hidden[low:high], wanted[low:high]) for low, high in bounds])
        losses: torch.Tensor = _Losses.apply(hidden, wanted, tail, bounds)  # type: ignore[no-untyped-call]
        return losses


class SummedLoss:
    """Cross-entropy summed over a batch's trained tokens.

    Args:
        model: With the adapter.
        device: Where it computes.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        self._losses = TokenLosses(model, device)
        self.how = self._losses.how

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Return the sum, a scalar with a gradient."""
        return self._losses(batch).sum()


class _Losses(torch.autograd.Function):
    """Losses whose gradient with respect to the hidden states is computed with them, while the logits are there.

    A token's loss depends on its own hidden state alone. So its gradient is known but for a factor, by which the
    backward pass multiplies it. Nothing is computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, wanted: torch.Tensor, tail: Tail, bounds: list[tuple[int, int]]
    ) -> torch.Tensor:
        """Return N losses of N hidden states."""
        losses = hidden.new_empty(len(wanted), dtype=torch.float32)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for low, high in bounds:
            part = None if gradient is None else gradient[low:high]
            losses[low:high] = _of_chunk(tail, hidden[low:high].detach(), wanted[low:high], part)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, *factors: torch.Tensor) -> Any:
        """Return the gradient with respect to the hidden states."""
        (gradient,) = ctx.saved_tensors
        return gradient * factors[0].to(gradient.dtype)[:, None], None, None, None


def _of_chunk(tail: Tail, hidden: torch.Tensor, wanted: torch.Tensor, gradient: torch.Tensor | None) -> torch.Tensor:
    """Return the losses of a chunk, and write the gradient of each with respect to its hidden state."""
    hidden.requires_grad_(gradient is not None)
    with torch.set_grad_enabled(gradient is not None):
        logits = tail.logits(hidden)
    scores = torch.log_softmax(logits.detach(), dim=-1, dtype=torch.float32)
    places = wanted[:, None]
    losses = -scores.gather(1, places).squeeze(1)
    if gradient is not None:
        # The gradient of cross-entropy: the probabilities, less one at the wanted token.
        scores.exp_().scatter_add_(1, places, torch.full_like(places, -1, dtype=scores.dtype))
        gradient.copy_(torch.autograd.grad(logits, hidden, scores.to(logits.dtype))[0])
    return losses


def _recomputed(tail: Tail, hidden: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return the losses of a chunk, whose logits are computed again in the backward pass."""

    def compute(hidden: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(tail.logits(hidden).float(), wanted, reduction="none")

    losses: torch.Tensor = checkpoint(compute, hidden, wanted, use_reentrant=False)
    return losses
