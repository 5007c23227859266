"""What a run minimises: the answers' cross-entropy, or a loss on pairs of answers or on judged ones.

Shapes: N trained tokens, R rows, P pairs.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from domain.jobs.progress import PreferenceFigures
from domain.peft.config import PeftConfig
from engine.base import Base
from engine.batches import Batch
from engine.continuing import InitialWeights
from engine.loss import BatchLoss
from engine.rows import IGNORED

# The loss of each trained token of a batch, N in fp32, in the order of its sequences and of the tokens in them.
TokenLosses = Callable[[Batch], torch.Tensor]
Figures = Mapping[str, float]


@dataclass(frozen=True)
class Size:
    """What a mean is taken over: the trained tokens and the examples of a whole step, or of all validation rows."""

    trained_tokens: int
    examples: int

    @classmethod
    def of(cls, batches: Iterable[Batch]) -> "Size":
        """Count those of some batches."""
        counts = [(batch.trained_tokens, batch.examples) for batch in batches]
        return cls(sum(tokens for tokens, _ in counts), sum(examples for _, examples in counts))


@dataclass(frozen=True)
class PassLoss:
    """What one pass adds to the means of its step: the loss with a gradient, and figures by name."""

    loss: torch.Tensor
    figures: Figures

    def all_figures(self) -> Figures:
        """Return the figures, the loss among them."""
        return {"loss": float(self.loss.detach()), **self.figures}


Objective = Callable[[Batch, Size], PassLoss]
# Has the model compute, in its block, as what a preference is compared with.
Reference = Callable[[], AbstractContextManager[None]]


def add(figures: Iterable[Figures]) -> dict[str, float]:
    """Add up the figures of passes, in order."""
    total: dict[str, float] = {}
    for some in figures:
        for name, value in some.items():
            total[name] = total.get(name, 0.0) + value
    return total


def preference_figures(figures: Figures) -> PreferenceFigures | None:
    """Return what a step or an evaluation says of preferences; None for one without them."""
    named = {name: value for name, value in figures.items() if name in PreferenceFigures.model_fields}
    return PreferenceFigures(**named) if named else None


def objective_of(base: Base, config: PeftConfig) -> Objective:
    """Return what a run on a base minimises, with the adapter that is active.

    Preferences are compared with the base with the adapter switched off. In a run that continues an adapter they are
    compared with that adapter, which is the active one as it is now: no step may have been taken yet.
    """
    if config.objective == "sft":
        return Supervised(base.backend.loss(base.model, base.device))
    losses = base.backend.token_losses(base.model, base.device)
    beta = config.preference_beta
    if beta is None:
        raise ValueError("the configuration has no weight for its preferences")
    if config.objective == "orpo":
        return Orpo(losses, beta)
    kind = Dpo if config.objective == "dpo" else Kto
    reference: Reference = base.model.disable_adapter
    if config.init_weights == "adapter":
        reference = InitialWeights(base.trained.values()).computing
    return kind(losses, base.model, beta, reference)


class Supervised:
    """Cross-entropy, a mean over the trained tokens; and the share of them that the model finds likeliest.

    Args:
        summed: From a batch to the sum of its trained tokens' losses.
    """

    def __init__(self, summed: Callable[[Batch], BatchLoss]) -> None:
        self._summed = summed

    def __call__(self, batch: Batch, size: Size) -> PassLoss:
        """Return what the batch adds to the mean."""
        made = self._summed(batch)
        figures = {} if made.hits is None else {"token_accuracy": made.hits / size.trained_tokens}
        return PassLoss(made.total / size.trained_tokens, figures)


class Dpo:
    """Direct preference optimisation: −log σ(β·(Δ of the better answer − Δ of the worse one)), a mean over the pairs.

    Δ is the log-probability of an answer less that under the reference.
    Source: arXiv 2305.18290, equation 7.
    """

    def __init__(self, losses: TokenLosses, model: Any, beta: float, reference: Reference) -> None:
        self._losses, self._model, self._beta, self._reference = losses, model, beta, reference

    def __call__(self, batch: Batch, size: Size) -> PassLoss:
        """Return what the batch adds to the mean."""
        before = _under(self._reference, self._losses, self._model, batch)
        rewards = self._beta * (_log_probabilities(self._losses(batch), batch) - before)
        chosen, rejected = rewards[0::2], rewards[1::2]
        loss = -functional.logsigmoid(chosen - rejected).sum() / size.examples
        return PassLoss(loss, _pair_figures(chosen, rejected, size))


class Orpo:
    """Odds ratio preference optimisation: the better answer's cross-entropy, and λ times −log σ of the log odds ratio.

    The odds are those of the mean log-probability of an answer's tokens. No base is compared with.
    Source: arXiv 2403.07691, equations 4 to 7.
    """

    def __init__(self, losses: TokenLosses, weight: float) -> None:
        self._losses, self._weight = losses, weight

    def __call__(self, batch: Batch, size: Size) -> PassLoss:
        """Return what the batch adds to the mean."""
        counts = _tokens_of_rows(batch).to(torch.float32)
        means = _log_probabilities(self._losses(batch), batch) / counts.to(torch.float32)
        chosen, rejected = means[0::2], means[1::2]
        log_odds = (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))
        supervised = -chosen.sum() / size.examples
        loss = supervised - self._weight * functional.logsigmoid(log_odds).sum() / size.examples
        rewards = self._weight * chosen, self._weight * rejected
        return PassLoss(loss, _pair_figures(*rewards, size) | {"answer_loss": float(supervised.detach())})


class Kto:
    """Kahneman-Tversky optimisation: 1 − σ(±β·(Δ − z)), a mean over the judged answers.

    The sign is that of the judgement. z is how far the model has moved from the reference on prompts with answers of
    other rows, a mean over the pass, at least 0 and without a gradient. Source: arXiv 2402.01306, equation 8.
    """

    def __init__(self, losses: TokenLosses, model: Any, beta: float, reference: Reference) -> None:
        self._losses, self._model, self._beta, self._reference = losses, model, beta, reference

    def __call__(self, batch: Batch, size: Size) -> PassLoss:
        """Return what the batch adds to the mean."""
        if batch.mismatched is None:
            raise ValueError("a batch for KTO has no mismatched answers")
        with torch.no_grad():
            moved = self._change(batch.mismatched).mean().clamp(min=0)
        change = self._change(batch)
        liked = torch.tensor(batch.liked, device=change.device)
        signed = torch.where(liked, change - moved, moved - change)
        rewards = (self._beta * change).detach()
        figures = {
            "margin": float(torch.where(liked, rewards, -rewards).sum()) / size.examples,
            "accuracy": float((signed > 0).sum()) / size.examples,
            "moved": float(moved) * batch.examples / size.examples,
        }
        return PassLoss((1 - torch.sigmoid(self._beta * signed)).sum() / size.examples, figures)

    def _change(self, batch: Batch) -> torch.Tensor:
        """Return, for each row, its log-probability less that under the reference."""
        before = _under(self._reference, self._losses, self._model, batch)
        return _log_probabilities(self._losses(batch), batch) - before


def _under(reference: Reference, losses: TokenLosses, model: Any, batch: Batch) -> torch.Tensor:
    """Return each row's log-probability under a reference, R, without a gradient and without dropout."""
    with torch.no_grad(), _evaluating(model), reference():
        return _log_probabilities(losses(batch), batch)


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    trains = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(trains)


def _rows_of_trained_tokens(batch: Batch) -> torch.Tensor:
    """Return which row each trained token belongs to, N."""
    return batch.row_of_each_token()[:, 1:][batch.labels[:, 1:] != IGNORED]


def _tokens_of_rows(batch: Batch) -> torch.Tensor:
    return torch.bincount(_rows_of_trained_tokens(batch), minlength=len(batch.rows))


def _log_probabilities(losses: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return the log-probability of each row's trained tokens, R."""
    rows = _rows_of_trained_tokens(batch).to(losses.device)
    return torch.zeros(len(batch.rows), device=losses.device).index_add(0, rows, -losses)


def log1mexp(value: torch.Tensor) -> torch.Tensor:
    """Return log(1 − exp(value)) of negative numbers, exact near 0 and far from it.

    Source: Mächler, "Accurately Computing log(1 − exp(−|a|))", 2012.
    """
    near = value > -0.6931472
    safe_near, safe_far = torch.where(near, value, -0.1), torch.where(near, -10.0, value)
    return torch.where(near, torch.log(-torch.expm1(safe_near)), torch.log1p(-torch.exp(safe_far)))


def _pair_figures(chosen: torch.Tensor, rejected: torch.Tensor, size: Size) -> dict[str, float]:
    """Return the mean margin between the rewards of a pair, and the share of pairs in which the better one has more."""
    margins = (chosen - rejected).detach()
    return {
        "margin": float(margins.sum()) / size.examples,
        "accuracy": float((margins > 0).sum()) / size.examples,
    }
