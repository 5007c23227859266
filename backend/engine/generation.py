"""The `generate` command."""

import time
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    set_seed,
)
from transformers.generation.streamers import BaseStreamer

from domain.protocol import Generate, Token
from domain.results import Generated, TokenChances
from engine.answer_form import FormMask
from engine.answer_text import AnswerText
from engine.base import Base
from engine.chances import Chances, Moved
from engine.channel import Channel
from engine.errors import BadSetting
from engine.served_tokenizer import ServedTokenizer

# At a lower temperature sampling also takes the likeliest token, and dividing by the temperature overflows.
_COLDEST = 1e-6
_MOST_UNASKED = 4096  # an answer whose length nobody bounds; a model that never ends would hold the engine for hours


class _Pieces(BaseStreamer):
    """Takes the tokens as they come, and sends the text that is final, with the chances of its tokens.

    Args:
        chances: Knows how likely each token was; None where nobody asks.
    """

    def __init__(self, answer: AnswerText, chances: Chances | None, channel: Channel, request_id: str) -> None:
        self._answer, self._chances, self._channel, self._request_id = answer, chances, channel, request_id
        self._prompt_seen = False
        self._waiting: list[TokenChances] = []
        self._sent = self._told = 0  # characters of text, and of the tokens whose chances are told
        self.chances: list[TokenChances] = []

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            ids = value.flatten().tolist()
            if self._chances is not None:
                self._waiting += [self._chances.of(token) for token in ids]
            self._send(self._answer.add(ids))
        self._prompt_seen = True

    def end(self) -> None:
        self._send(self._answer.finish())

    def begin(self, text: str, chances: list[TokenChances]) -> None:
        """Send what comes before the answer."""
        self.chances += chances
        self._channel.emit(Token(request_id=self._request_id, text=text, chances=chances))

    def _send(self, text: str) -> None:
        if text:
            self._sent += len(text)
            self._channel.emit(Token(request_id=self._request_id, text=text, chances=self._of_text()))

    def _of_text(self) -> list[TokenChances]:
        """Return the chances of the tokens that begin in the text sent so far: not of what ended the answer."""
        told = []
        while self._waiting and self._told < self._sent:
            told.append(self._waiting.pop(0))
            self._told += len(told[-1].token)
        self.chances += told
        return told


class _Ends(StoppingCriteria):
    """Ends generation when the client asks, or when a stop text has been written, or the form is complete."""

    def __init__(self, answer: AnswerText, form: FormMask | None, channel: Channel, request_id: str) -> None:
        self._answer, self._form, self._channel, self._request_id = answer, form, channel, request_id

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        stop = self._channel.stop_requested(self._request_id) or self._answer.stopped
        stop = stop or (self._form is not None and self._form.complete(input_ids))
        return torch.full((input_ids.shape[0],), stop, dtype=torch.bool, device=input_ids.device)


def _prompt_ids(base: Base, served: ServedTokenizer, command: Generate) -> list[int]:
    """Tokenize the prompt.

    Raises:
        BadSetting: The chat template refuses it, it is empty or too long, or it has tokens that the model lacks.
    """
    if command.messages is not None:
        turns = [message.model_dump(exclude_none=True) for message in command.messages]
        text = served.renderer.prompt(turns, command.tools)
        ids = list(served.tokenizer(text, add_special_tokens=False)["input_ids"])
    elif command.prompt_ids is not None:
        ids = command.prompt_ids
    else:
        ids = served.text(command.prompt or "").ids
    limit = base.backend.longest(base.model)
    if not ids:
        raise BadSetting("the prompt is empty")
    least = 1 if command.max_new_tokens is None else command.max_new_tokens
    if limit is not None and len(ids) + least > limit:
        raise BadSetting(f"{len(ids)} prompt tokens and {least} new ones exceed the {limit} it is loaded for")
    for what, tokens in (("the prompt", ids), ("logit_bias", command.logit_bias)):
        if tokens and not 0 <= min(tokens) <= max(tokens) < base.embeddings:
            raise BadSetting(f"{what} has the token {max(tokens)}, and the model {base.embeddings} embeddings")
    return ids


def _most_new(base: Base, command: Generate, prompt_tokens: int) -> int:
    """Return how many tokens the answer may have: as many as are asked for, or what the context has room for."""
    if command.max_new_tokens is not None:
        return command.max_new_tokens
    limit = base.backend.longest(base.model)
    return min(_MOST_UNASKED, limit - prompt_tokens) if limit is not None else _MOST_UNASKED


def generate(base: Base, command: Generate, channel: Channel) -> Generated:
    """Generate text; every piece is also sent as a Token event."""
    served = base.served(command.adapter_id)
    prompt_ids = _prompt_ids(base, served, command)
    most = _most_new(base, command, len(prompt_ids))
    form = FormMask(command.form, served, len(prompt_ids)) if command.form is not None else None
    # A form knows its own end, and may have the text that ends a turn within it.
    ends = served.ends.texts if command.messages is not None and form is None else ()
    stop = [*command.stop, *ends]
    answer = AnswerText(served.tokenizer, stop, served.ends.ids)
    chances = Chances(served.tokenizer, command.logprobs) if command.logprobs is not None else None
    pieces = _Pieces(answer, chances, channel, command.request_id)
    started = time.monotonic()
    base.backend.begin_answering(base.model)
    completion, before = 0, ""
    with base.using(command.adapter_id), torch.no_grad():
        if command.echo:
            before = command.prompt or str(served.tokenizer.decode(prompt_ids, skip_special_tokens=False))
            pieces.begin(before, _of_prompt(base, prompt_ids, chances))
        if most > 0:
            completion = _continue(base, served, command, prompt_ids, most, answer, chances, form, pieces, channel)
    return Generated(
        text=before + answer.text,
        prompt_tokens=len(prompt_ids),
        completion_tokens=completion,
        finish_reason="stop" if answer.ended or completion < most or (form and form.ended) else "length",
        elapsed_s=time.monotonic() - started,
        chat_template=served.template_source if command.messages is not None else None,
        chances=pieces.chances,
    )


def _of_prompt(base: Base, ids: list[int], chances: Chances | None) -> list[TokenChances]:
    if chances is None:
        return []
    return chances.of_prompt(ids, base.model(input_ids=torch.tensor([ids], device=base.device)).logits[0])


def _continue(
    base: Base,
    served: ServedTokenizer,
    command: Generate,
    prompt_ids: list[int],
    most: int,
    answer: AnswerText,
    chances: Chances | None,
    form: FormMask | None,
    pieces: _Pieces,
    channel: Channel,
) -> int:
    """Generate after the prompt; return the number of new tokens."""
    ids = torch.tensor([prompt_ids], device=base.device)
    sampled = command.temperature > _COLDEST
    config = GenerationConfig(
        max_new_tokens=most,
        do_sample=sampled,
        temperature=command.temperature if sampled else None,
        top_p=command.top_p if sampled else None,
        top_k=0 if sampled else None,
        pad_token_id=served.tokenizer.pad_token_id or 0,  # of one row nothing is padded
        eos_token_id=list(served.ends.ids) or None,
    )
    if command.seed is not None:
        set_seed(command.seed)
    processors = LogitsProcessorList([chances] if chances is not None else [])
    if command.frequency_penalty or command.presence_penalty or command.logit_bias:
        penalties = (command.frequency_penalty, command.presence_penalty)
        processors.append(Moved(len(prompt_ids), *penalties, command.logit_bias))
    if form is not None:
        processors.append(form)
    output = base.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        generation_config=config,
        streamer=pieces,
        stopping_criteria=StoppingCriteriaList([_Ends(answer, form, channel, command.request_id)]),
        logits_processor=processors,
    )
    return int(output.shape[1]) - len(prompt_ids)
