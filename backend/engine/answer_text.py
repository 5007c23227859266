"""The text of an answer. It is the decode of all its tokens, whether it is read at the end or in pieces.

The text of a token depends on the tokens around it: a tokenizer may strip the beginning of a text, join bytes to
characters and remove spaces before punctuation. A piece is therefore the difference between two decodes of the whole.
"""

import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

_UNFINISHED = "\ufffd"  # what a decoder writes for bytes that are no character yet
# Decoding all tokens anew for each would take minutes for the longest answers. No decoder looks back as far as this.
_TAIL, _CONTEXT = 512, 64


class AnswerText:
    """Collects an answer's tokens.

    Args:
        tokenizer: Decodes them.
        stop: Texts that end the answer and are no part of it. They are searched for in everything that the model
            writes, special tokens included.
        ends: Tokens that end the answer and are no part of it.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], ends: Iterable[int]) -> None:
        self._tokenizer, self._stop, self._ends = tokenizer, tuple(stop), frozenset(ends)
        self._ids: list[int] = []
        self._sent = ""
        self._head, self._begin = "", 0  # the text that no later token changes, and the first token decoded behind it
        self.text = ""
        self.stopped = False

    @property
    def ended(self) -> bool:
        """Whether a token or a stop text has ended the answer."""
        return self.stopped or len(self._said()) < len(self._ids)

    def add(self, ids: Iterable[int]) -> str:
        """Add tokens; return the text that has become final, or nothing."""
        self._ids += ids
        text, self.stopped = self._cut()
        self.text = text
        piece = self._piece(len(text) if self.stopped else _finished(text, self._stop))
        if len(self._ids) - self._begin > _TAIL:
            self._settle(len(self._ids) - _CONTEXT)
        return piece

    def _settle(self, begin: int) -> None:
        """Begin future decodes at a later token, if the text from there on is the same by itself."""
        tail = self._decode(self._ids[begin:])
        if tail and self.text.endswith(tail):
            self._head, self._begin = self.text.removesuffix(tail), begin

    def finish(self) -> str:
        """Return the rest of the text, which has not been returned yet."""
        return self._piece(len(self.text))

    def _piece(self, end: int) -> str:
        if end <= len(self._sent) or not self.text.startswith(self._sent):
            return ""
        piece, self._sent = self.text[len(self._sent) : end], self.text[:end]
        return piece

    def _said(self) -> list[int]:
        """Return the tokens without the one that ended the answer."""
        return self._ids[:-1] if self._ids and self._ids[-1] in self._ends else self._ids

    def _cut(self) -> tuple[str, bool]:
        """Return the text before the first stop text, and whether there is a stop text."""
        text = self._head + self._decode(self._said()[self._begin :])
        at = _first(text, self._stop)
        if at is not None:
            return text[:at], True
        written = self._decode(self._ids[self._begin :], special=True) if self._stop else ""
        at = _first(written, self._stop)
        return (text, False) if at is None else (self._head + self._before(written, at), True)

    def _before(self, written: str, at: int) -> str:
        """Return the visible text before a character, which is counted in the tail with its special tokens."""
        ids, count, begun = self._ids[self._begin :], len(self._ids) - self._begin, written
        while count and len(begun) > at:
            count -= 1
            begun = self._decode(ids[:count], special=True)
        text = self._decode(ids[:count])
        # What the next token says of its own; a special one says nothing, whatever the decoder puts before it.
        own = self._decode(ids[: count + 1]).removeprefix(text)
        return text + own[: at - len(begun)]

    def _decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=not special))


def _first(text: str, marks: Sequence[str]) -> int | None:
    return min((at for mark in marks if (at := text.find(mark)) >= 0), default=None)


def _finished(text: str, stop: Sequence[str]) -> int:
    """Return how many characters are final: whole words that cannot be the beginning of a stop text."""
    whole = text.rstrip(_UNFINISHED)
    # The space before a word is a part of it: punctuation may take it away.
    word = 0 if not whole or whole.endswith("\n") or _stands_alone(whole[-1]) else len(whole) - _last_space(whole)
    return len(whole) - max(word, _unfinished_stop(whole, stop))


def _last_space(text: str) -> int:
    return max(text.rfind(space) for space in " \n\t\r") if any(space in text for space in " \n\t\r") else 0


def _stands_alone(character: str) -> bool:
    """Tell whether a character is of a script that is written without spaces between words."""
    return unicodedata.category(character) == "Lo" and unicodedata.east_asian_width(character) == "W"


def _unfinished_stop(text: str, stop: Sequence[str]) -> int:
    """Return how many characters at the end of the text may be the beginning of a stop text."""
    sizes = (size for mark in stop for size in range(1, min(len(mark), len(text) + 1)) if text.endswith(mark[:size]))
    return max(sizes, default=0)
