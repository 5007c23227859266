"""How likely the tokens of an answer were, and what moves their logits before one is taken."""

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from transformers import LogitsProcessor
from transformers.convert_slow_tokenizer import bytes_to_unicode

from domain.results import TokenChance, TokenChances

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_BROKEN = "\ufffd"
_LEAST = -9999.0  # what OpenAI's API says of a token that cannot come; minus infinity is no JSON


class Chances(LogitsProcessor):
    """Keeps the model's own distribution of the next token, before anything changes it.

    Args:
        tokenizer: Names the tokens.
        top: How many of the likeliest are told.
    """

    def __init__(self, tokenizer: Any, top: int) -> None:
        self._tokenizer, self._top = tokenizer, top
        self._logprobs: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Keep the scores of the first row, of shape (1, vocabulary)."""
        self._logprobs = torch.log_softmax(scores[0].float(), dim=-1)
        return scores

    def of(self, token: int) -> TokenChances:
        """Return the chances of the token that was taken, beside the likeliest in its place."""
        if self._logprobs is None:
            raise RuntimeError("no distribution was kept before the token")
        return self._told(token, self._logprobs)

    def of_prompt(self, ids: list[int], logits: torch.Tensor) -> list[TokenChances]:
        """Return the chances of a prompt's tokens.

        Args:
            ids: T tokens.
            logits: (T, vocabulary).
        """
        first = TokenChances(**vars(self._named(ids[0], None)), top=[])
        rows = torch.log_softmax(logits[:-1].float(), dim=-1)
        return [first, *(self._told(token, row) for token, row in zip(ids[1:], rows, strict=True))]

    def _told(self, token: int, logprobs: torch.Tensor) -> TokenChances:
        values, places = logprobs.topk(min(self._top, len(logprobs)))
        top = [self._named(place, value) for place, value in zip(places.tolist(), values.tolist(), strict=True)]
        return TokenChances(**vars(self._named(token, float(logprobs[token]))), top=top)

    def _named(self, token: int, logprob: float | None) -> TokenChance:
        text = str(self._tokenizer.decode([token], skip_special_tokens=False))
        content = _bytes_of(self._tokenizer.convert_ids_to_tokens(token), text)
        return TokenChance(
            token=text, bytes=list(content), logprob=max(logprob, -9999.0) if logprob is not None else None
        )


def _bytes_of(piece: str, text: str) -> bytes:
    """Return a token's bytes. One that is a part of a character is read off its name in the vocabulary."""
    if _BROKEN not in text:
        return text.encode()
    byte = _BYTE.fullmatch(piece)
    if byte is not None:  # SentencePiece's name for a byte
        return bytes([int(byte[1], 16)])
    letters = _letters()
    if all(letter in letters for letter in piece):
        return bytes(letters[letter] for letter in piece)
    return text.encode()


@cache
def _letters() -> dict[str, int]:
    """Return the letters that stand for bytes in byte-level vocabularies. Source: GPT-2's encoder."""
    return {letter: byte for byte, letter in bytes_to_unicode().items()}


class Moved(LogitsProcessor):
    """Adds OpenAI's penalties and biases to the logits.

    A token that the answer has n times loses n times the frequency penalty, and the presence penalty once. Source:
    OpenAI's guide to text generation, "Frequency and presence penalties".

    Args:
        prompt_tokens: The tokens before the answer, which do not count.
        bias: Token → what is added.
    """

    def __init__(self, prompt_tokens: int, frequency: float, presence: float, bias: Mapping[int, float]) -> None:
        self._prompt_tokens, self._frequency, self._presence = prompt_tokens, frequency, presence
        self._bias = bias

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores, of shape (1, vocabulary), as moved."""
        counts = torch.bincount(input_ids[0, self._prompt_tokens :], minlength=scores.shape[-1])
        moved = scores - self._frequency * counts - self._presence * (counts > 0)
        for token, value in self._bias.items():
            moved[0, token] += value
        return moved
