"""The loss of a batch: cross-entropy over its trained tokens, by chunks of them, so that no batch has all its logits.

Shapes: B rows of T tokens, N trained tokens, hidden size H, vocabulary V. docs/decisions/0016-loss-by-chunks.md says
how a chunk's gradient is computed and why.
"""

import sys
from dataclasses import dataclass
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
        return self.with_hits(batch)[0]

    def with_hits(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the losses, and for each of the tokens whether the model finds none likelier, N bools."""
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
    ) -> tuple[torch.Tensor, torch.Tensor]:
        kept, at = torch.unique(columns, return_inverse=True)
        if self._keeps_logits:
            logits = self._model(**inputs, use_cache=False, logits_to_keep=kept.to(self._device)).logits
        else:
            logits = self._model(**inputs, use_cache=False).logits[:, kept]
        return _losses_and_hits(logits[rows, at], wanted)

    def _of_hidden(self, tail: Tail, hidden: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        bounds = chunks(len(wanted), self.most_tokens)
        # In fp16 a gradient underflows unless the scaler's factor is in it from the start.
        if torch.is_grad_enabled() and (tail.trains or hidden.dtype == torch.float16):
            parts = [_recomputed(tail, hidden[low:high], wanted[low:high]) for low, high in bounds]
            return torch.cat([losses for losses, _ in parts]), torch.cat([hits for _, hits in parts])
        losses, hits = _Losses.apply(hidden, wanted, tail, bounds)  # type: ignore[no-untyped-call]
        return losses, hits


@dataclass(frozen=True)
class BatchLoss:
    """The loss of a batch.

    Attributes:
        total: The sum over its trained tokens, with a gradient.
        hits: How many of them the model finds likeliest; None where the back end does not say.
    """

    total: torch.Tensor
    hits: int | None


class SummedLoss:
    """Cross-entropy summed over a batch's trained tokens.

    Args:
        model: With the adapter.
        device: Where it computes.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        self._losses = TokenLosses(model, device)
        self.how = self._losses.how

    def __call__(self, batch: Batch) -> BatchLoss:
        """Return the sum, and how many tokens are the likeliest ones."""
        losses, hits = self._losses.with_hits(batch)
        return BatchLoss(losses.sum(), int(hits.sum()))


class _Losses(torch.autograd.Function):
    """Losses whose gradient with respect to the hidden states is computed with them, while the logits are there.

    A token's loss depends on its own hidden state alone. So its gradient is known but for a factor, by which the
    backward pass multiplies it. Nothing is computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, wanted: torch.Tensor, tail: Tail, bounds: list[tuple[int, int]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return N losses of N hidden states, and N hits."""
        losses = hidden.new_empty(len(wanted), dtype=torch.float32)
        hits = torch.empty(len(wanted), dtype=torch.bool, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for low, high in bounds:
            part = None if gradient is None else gradient[low:high]
            made = _of_chunk(tail, hidden[low:high].detach(), wanted[low:high], part)
            losses[low:high], hits[low:high] = made
        if gradient is not None:
            ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(hits)
        return losses, hits

    @staticmethod
    def backward(ctx: Any, *factors: torch.Tensor) -> Any:
        """Return the gradient with respect to the hidden states."""
        (gradient,) = ctx.saved_tensors
        return gradient * factors[0].to(gradient.dtype)[:, None], None, None, None


def _of_chunk(
    tail: Tail, hidden: torch.Tensor, wanted: torch.Tensor, gradient: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the losses and hits of a chunk, and write the gradient of each with respect to its hidden state."""
    hidden.requires_grad_(gradient is not None)
    with torch.set_grad_enabled(gradient is not None):
        logits = tail.logits(hidden)
    scores = torch.log_softmax(logits.detach(), dim=-1, dtype=torch.float32)
    places = wanted[:, None]
    score = scores.gather(1, places).squeeze(1)
    hits = score >= scores.amax(dim=-1)
    if gradient is not None:
        # The gradient of cross-entropy: the probabilities, less one at the wanted token.
        scores.exp_().scatter_add_(1, places, torch.full_like(places, -1, dtype=scores.dtype))
        gradient.copy_(torch.autograd.grad(logits, hidden, scores.to(logits.dtype))[0])
    return -score, hits


def _recomputed(tail: Tail, hidden: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the losses and hits of a chunk, whose logits are computed again in the backward pass."""

    def compute(hidden: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return _losses_and_hits(tail.logits(hidden), wanted)

    losses, hits = checkpoint(compute, hidden, wanted, use_reentrant=False)
    return losses, hits


def _losses_and_hits(logits: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cross-entropy and hits of N rows of logits."""
    logits = logits.float()
    with torch.no_grad():
        hits = logits.gather(1, wanted[:, None]).squeeze(1) >= logits.amax(dim=-1)
    return functional.cross_entropy(logits, wanted, reduction="none"), hits
