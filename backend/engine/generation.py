"""The `generate` command by itself: one answer, by transformers' own `generate`, with nothing beside it.

Answers that can run together go through engine/together.py.
"""

from typing import Any

import torch
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList, set_seed

from domain.protocol import Generate
from domain.results import Generated
from engine.answer import Answer, AnswerStreamer
from engine.base import Base
from engine.channel import Channel


class _Ends(StoppingCriteria):
    """Ends generation when the client asks, or when a stop text has been written, or the form is complete."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        stop = self._answer.stopped or self._answer.complete(input_ids)
        return torch.full((input_ids.shape[0],), stop, dtype=torch.bool, device=input_ids.device)


def generate(base: Base, command: Generate, channel: Channel) -> Generated:
    """Generate text; every piece is also sent as a Token event."""
    answer = Answer(base, command, channel)
    base.backend.begin_answering(base.model)
    with base.using(command.adapter_id), torch.no_grad():
        answer.begin(base)
        if answer.most > 0:
            _continue(base, answer)
    return answer.finish()


def _continue(base: Base, answer: Answer) -> None:
    """Generate after the prompt."""
    ids = torch.tensor([answer.prompt_ids], device=base.device)
    config = answer.config()
    if not hasattr(base.model.config.get_text_config(decoder=True), "num_hidden_layers"):
        config.use_cache = (
            False  # transformers cannot make a cache for a class that does not say how many layers it has
        )
    if answer.command.seed is not None:
        set_seed(answer.command.seed)
    base.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        generation_config=config,
        streamer=AnswerStreamer(answer),
        stopping_criteria=StoppingCriteriaList([_Ends(answer)]),
        logits_processor=LogitsProcessorList(answer.processors),
    )
