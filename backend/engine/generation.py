"""The `generate` command."""

import time
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, set_seed
from transformers.generation.streamers import BaseStreamer

from domain.protocol import Generate, Token
from domain.results import Generated
from engine.answer_text import AnswerText
from engine.base import Base
from engine.channel import Channel
from engine.errors import BadSetting
from engine.served_tokenizer import ServedTokenizer

# At a lower temperature sampling also takes the likeliest token, and dividing by the temperature overflows.
_COLDEST = 1e-6


class _Pieces(BaseStreamer):
    """Takes the tokens as they come, and sends the text that is final."""

    def __init__(self, answer: AnswerText, channel: Channel, request_id: str) -> None:
        self._answer, self._channel, self._request_id = answer, channel, request_id
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            self._send(self._answer.add(value.flatten().tolist()))
        self._prompt_seen = True

    def end(self) -> None:
        self._send(self._answer.finish())

    def _send(self, text: str) -> None:
        if text:
            self._channel.emit(Token(request_id=self._request_id, text=text))


class _Ends(StoppingCriteria):
    """Ends generation when the client asks, or when a stop text has been written."""

    def __init__(self, answer: AnswerText, channel: Channel, request_id: str) -> None:
        self._answer, self._channel, self._request_id = answer, channel, request_id

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        stop = self._channel.stop_requested(self._request_id) or self._answer.stopped
        return torch.full((input_ids.shape[0],), stop, dtype=torch.bool, device=input_ids.device)


def _prompt_ids(base: Base, served: ServedTokenizer, command: Generate) -> list[int]:
    """Tokenize the prompt.

    Raises:
        BadSetting: The chat template refuses it, it is empty or too long, or it has tokens that the model lacks.
    """
    if command.messages is not None:
        text = served.renderer.prompt([message.model_dump() for message in command.messages])
        ids = list(served.tokenizer(text, add_special_tokens=False)["input_ids"])
    else:
        ids = served.text(command.prompt or "").ids
    limit = base.backend.longest(base.model)
    if not ids:
        raise BadSetting("the prompt is empty")
    if limit is not None and len(ids) + command.max_new_tokens > limit:
        raise BadSetting(
            f"{len(ids)} prompt tokens and {command.max_new_tokens} new ones exceed the {limit} it is loaded for"
        )
    if max(ids) >= base.embeddings:
        raise BadSetting(f"the prompt has the token {max(ids)}, and the model {base.embeddings} embeddings")
    return ids


def generate(base: Base, command: Generate, channel: Channel) -> Generated:
    """Generate text; every piece is also sent as a Token event."""
    served = base.served(command.adapter_id)
    ids = torch.tensor([_prompt_ids(base, served, command)], device=base.device)
    sampled = command.temperature > _COLDEST
    config = GenerationConfig(
        max_new_tokens=command.max_new_tokens,
        do_sample=sampled,
        temperature=command.temperature if sampled else None,
        top_p=command.top_p if sampled else None,
        top_k=0 if sampled else None,
        pad_token_id=served.tokenizer.pad_token_id or 0,  # of one row nothing is padded
        eos_token_id=list(served.ends.ids) or None,
    )
    if command.seed is not None:
        set_seed(command.seed)
    stop = [*command.stop, *(served.ends.texts if command.messages is not None else ())]
    answer = AnswerText(served.tokenizer, stop, served.ends.ids)
    started = time.monotonic()
    base.backend.begin_answering(base.model)
    with base.using(command.adapter_id), torch.no_grad():
        output = base.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            streamer=_Pieces(answer, channel, command.request_id),
            stopping_criteria=StoppingCriteriaList([_Ends(answer, channel, command.request_id)]),
        )
    completion = output.shape[1] - ids.shape[1]
    return Generated(
        text=answer.text,
        prompt_tokens=ids.shape[1],
        completion_tokens=completion,
        finish_reason="stop" if answer.ended or completion < command.max_new_tokens else "length",
        elapsed_s=time.monotonic() - started,
        chat_template=served.template_source if command.messages is not None else None,
    )
