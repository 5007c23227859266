"""One answer: its prompt, what moves its logits, its text as it grows, and what ends it."""

import time
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor
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


class Answer:
    """An answer that is being written. It knows nothing of others.

    Args:
        base: Has the adapter that the command names.
        command: What is asked for.
        channel: Takes the pieces of the text, and knows whether the client asked for the end.

    Attributes:
        prompt_ids: The prompt.
        most: How many tokens the answer may have.
        count: How many it has.
        processors: What looks at its logits or changes them, in this order, before the sampling does. Each is called
            with the tokens so far, of shape (1, T), and the logits in fp32, of shape (1, vocabulary).

    Raises:
        BadForm: It cannot be held to its form.
        BadSetting: The prompt cannot be tokenized, is empty or too long, or has tokens that the model lacks.
    """

    def __init__(self, base: Base, command: Generate, channel: Channel) -> None:
        self._started_s = time.monotonic()
        self.command, self._channel = command, channel
        self._served = base.served(command.adapter_id)
        self.prompt_ids = _prompt_ids(base, self._served, command)
        self.most = _most_new(base, command, len(self.prompt_ids))
        self.count = 0
        self._form = FormMask(command.form, self._served, len(self.prompt_ids)) if command.form is not None else None
        ends = self._served.ends
        # A form knows its own end, and may have the text that ends a turn within it.
        stop = [*command.stop, *(ends.texts if command.messages is not None and self._form is None else ())]
        self._text = AnswerText(self._served.tokenizer, stop, ends.ids)
        self._chances = Chances(self._served.tokenizer, command.logprobs) if command.logprobs is not None else None
        self._pieces = _Pieces(self._text, self._chances, channel, command.request_id)
        self._before = ""
        self.processors: list[LogitsProcessor] = [self._chances] if self._chances is not None else []
        if command.frequency_penalty or command.presence_penalty or command.logit_bias:
            penalties = (command.frequency_penalty, command.presence_penalty)
            self.processors.append(Moved(len(self.prompt_ids), *penalties, command.logit_bias))
        if self._form is not None:
            self.processors.append(self._form)

    @property
    def sampled(self) -> bool:
        """Whether its tokens are drawn; else the likeliest are taken."""
        return self.command.temperature > _COLDEST

    def config(self) -> GenerationConfig:
        """Return what is asked for in transformers' terms."""
        return GenerationConfig(
            max_new_tokens=self.most,
            do_sample=self.sampled,
            temperature=self.command.temperature if self.sampled else None,
            top_p=self.command.top_p if self.sampled else None,
            top_k=0 if self.sampled else None,
            pad_token_id=self._served.tokenizer.pad_token_id or 0,  # of one row nothing is padded
            eos_token_id=list(self._served.ends.ids) or None,
        )

    @property
    def longest(self) -> int:
        """How many tokens it may come to have with its prompt."""
        return len(self.prompt_ids) + self.most

    @property
    def _ended(self) -> bool:
        return self._text.ended or self.count < self.most or (self._form is not None and self._form.ended)

    def begin(self, base: Base) -> None:
        """Send the prompt, if it is to be a part of the text. The caller has made its adapter the active one."""
        if self.command.echo:
            decoded = self._served.tokenizer.decode(self.prompt_ids, skip_special_tokens=False)
            self._before = self.command.prompt or str(decoded)
            self._pieces.begin(self._before, _of_prompt(base, self.prompt_ids, self._chances))

    def add(self, tokens: list[int]) -> None:
        """Add tokens, and send the text that is final with them."""
        self.count += len(tokens)
        self._pieces.add(tokens)

    @property
    def stopped(self) -> bool:
        """Whether the client asked for its end, or a stop text has been written."""
        return self._channel.stop_requested(self.command.request_id) or self._text.stopped

    def complete(self, input_ids: torch.Tensor) -> bool:
        """Tell whether its form lets nothing follow.

        Args:
            input_ids: The prompt and the answer so far, of shape (1, tokens).
        """
        return self._form is not None and self._form.complete(input_ids)

    def finish(self) -> Generated:
        """Send the rest of the text; return the whole."""
        self._pieces.finish()
        return Generated(
            text=self._before + self._text.text,
            prompt_tokens=len(self.prompt_ids),
            completion_tokens=self.count,
            finish_reason="stop" if self._ended else "length",
            elapsed_s=time.monotonic() - self._started_s,
            chat_template=self._served.template_source if self.command.messages is not None else None,
            chances=self._pieces.chances,
        )


class AnswerStreamer(BaseStreamer):
    """Hands the tokens that transformers' `generate` makes to an answer."""

    def __init__(self, answer: Answer) -> None:
        self._answer, self._prompt_seen = answer, False

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, once, and then each token."""
        if self._prompt_seen:
            self._answer.add(value.flatten().tolist())
        self._prompt_seen = True

    def end(self) -> None:
        """Do nothing: the answer is finished by its owner."""


class _Pieces:
    """Takes the tokens as they come, and sends the text that is final, with the chances of its tokens.

    Args:
        chances: Knows how likely each token was; None where nobody asks.
    """

    def __init__(self, text: AnswerText, chances: Chances | None, channel: Channel, request_id: str) -> None:
        self._text, self._chances, self._channel, self._request_id = text, chances, channel, request_id
        self._waiting: list[TokenChances] = []
        self._sent = self._told = 0  # characters of text, and of the tokens whose chances are told
        self.chances: list[TokenChances] = []

    def add(self, tokens: list[int]) -> None:
        if self._chances is not None:
            self._waiting += [self._chances.of(token) for token in tokens]
        self._send(self._text.add(tokens))

    def finish(self) -> None:
        self._send(self._text.finish())

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


def _of_prompt(base: Base, ids: list[int], chances: Chances | None) -> list[TokenChances]:
    if chances is None:
        return []
    with torch.no_grad():
        logits: Any = base.model(input_ids=torch.tensor([ids], device=base.device)).logits[0]
    return chances.of_prompt(ids, logits)
