"""Finds the answers of a long conversation in short windows of it, so that the time grows with its length.

To find one answer, the conversation is rendered at least twice more. For all answers of a long conversation the time
would grow with the square of its length. A window is a short conversation: the system turns, and a few exchanges. The
same algorithm finds the answers in it. The text between a known answer and the answers behind it must be the same in
the window and in the conversation, character for character. Where a window does not suffice, nothing is returned, and
the caller looks for every answer in the whole conversation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from engine.answer_span import Span
from engine.errors import BadData

Turn = Mapping[str, Any]
_LONG = 24  # exchanges; windows are slower than the whole below about that many
_FIRST = 3  # exchanges at the start whose answers are looked for in the whole conversation
_STEP = 4  # exchanges whose answers are looked for in one window
_MOST = 32  # answers that are looked for in one window
_BEHIND = 1  # exchanges before the known answer's: templates look back to the question
_AHEAD = 2  # exchanges behind the last one: templates look ahead to the next question
_LEAD = 4  # turns before the first question
_COMPARED = 24  # answers that are looked for both ways; a conversation with more kinds of exchanges is not regular


class Chat(Protocol):
    """A conversation that is rendered as often as needed."""

    @property
    def text(self) -> str:
        """The rendered conversation."""

    @property
    def messages(self) -> Sequence[Turn]:
        """Its turns."""

    def span(self, index: int) -> Span | None:
        """Find an answer by rendering the conversation anew."""

    def of(self, messages: Sequence[Turn]) -> "Chat":
        """Return another conversation with the same template, tools and shape."""


def spans_by_windows(chat: Chat, answers: Sequence[int]) -> dict[int, Span] | None:
    """Find the answers of a long, regular conversation.

    Args:
        answers: The indices of the turns to find, in their order.

    Returns:
        Their spans; None if the conversation is short, or if a window is not sure to tell the same as the whole.
    """
    try:
        return _Windows(chat, answers).spans()
    except (_Unsure, BadData):
        return None  # the caller looks in the whole conversation, and says what is wrong with it


class _Unsure(Exception):
    """A window does not tell where an answer is in the whole conversation."""


class _Windows:
    def __init__(self, chat: Chat, answers: Sequence[int]) -> None:
        self._chat, self._messages, self._answers = chat, chat.messages, answers
        roles = ["", *(turn["role"] for turn in self._messages)]
        # An exchange begins with a question. Each holds its first turn's index.
        self._exchanges = [at for at in range(len(roles) - 1) if roles[at + 1] == "user" != roles[at]]
        self._exchange_of = [-1] * len(self._messages)
        for exchange, start in enumerate(self._exchanges):
            stop = self._start(exchange + 1)
            self._exchange_of[start:stop] = [exchange] * (stop - start)

    def spans(self) -> dict[int, Span]:
        """Find all answers.

        Raises:
            _Unsure: The windows do not suffice.
            BadData: The template refuses a window, or cannot be followed in it.
        """
        exchanges, messages = self._exchanges, self._messages
        if len(exchanges) < _LONG or len(self._answers) < _LONG or exchanges[0] > _LEAD:
            raise _Unsure
        # Some templates gather the system turns, wherever they are.
        if any(turn["role"] not in ("user", "assistant", "tool") for turn in messages[exchanges[0] :]):
            raise _Unsure
        found = {index: self._exact(index) for index in self._answers if self._exchange_of[index] < _FIRST}
        rest = [index for index in self._answers if self._exchange_of[index] >= _FIRST]
        compared = self._compared(rest)
        while rest:
            stop = self._exchange_of[rest[0]] + _STEP
            group = [index for index in rest[:_MOST] if self._exchange_of[index] < stop]
            found.update(self._located(found, group))
            rest = rest[len(group) :]
        if any(self._exact(index) != found[index] for index in compared):
            raise _Unsure
        return found

    def _compared(self, rest: Sequence[int]) -> set[int]:
        """Choose answers to look for both ways: the first and last in each kind of exchange, and some in between."""
        kinds: dict[tuple[Any, ...], tuple[int, int]] = {}
        for index in rest:
            exchange = self._exchange_of[index]
            turns = self._messages[self._start(exchange) : self._start(exchange + 1)]
            kind = tuple(_kind(turn) for turn in turns)
            kinds[kind] = (kinds.get(kind, (index, index))[0], index)
        chosen = {index for ends in kinds.values() for index in ends}
        chosen |= {rest[len(rest) * quarter // 4] for quarter in (1, 2, 3)} if rest else set()
        if not rest or len(chosen) > _COMPARED:
            raise _Unsure
        return chosen

    def _located(self, found: dict[int, Span], group: Sequence[int]) -> dict[int, Span]:
        """Find a few answers in a window that begins before the last one found."""
        if not found:
            raise _Unsure
        known = next(reversed(found))  # the last one
        lead = self._exchanges[0]
        low = self._start(max(0, self._exchange_of[known] - _BEHIND))
        high = self._start(self._exchange_of[group[-1]] + _AHEAD + 1)
        shift = low - lead
        window = self._chat.of([*self._messages[:lead], *self._messages[low:high]])
        here = window.span(known - shift)
        if here is None:
            raise _Unsure
        moved = found[known].start - here.start
        spans = {known: here}
        for index in group:
            span = window.span(index - shift)
            if span is None:
                raise _Unsure
            spans[index] = span
        is_last = high == len(self._messages)
        end = len(window.text) if is_last else spans[group[-1]].end
        if window.text[here.start : end] != self._chat.text[found[known].start : None if is_last else end + moved]:
            raise _Unsure
        located = {
            index: replace(span, start=span.start + moved, end=span.end + moved) for index, span in spans.items()
        }
        if located.pop(known) != found[known]:
            raise _Unsure
        return located

    def _exact(self, index: int) -> Span:
        span = self._chat.span(index)
        if span is None:
            raise _Unsure
        return span

    def _start(self, exchange: int) -> int:
        return self._exchanges[exchange] if exchange < len(self._exchanges) else len(self._messages)


def _kind(turn: Turn) -> tuple[Any, ...]:
    """Return what templates look at in a turn: its role, its fields, and whether it contains marks of its own."""
    content = turn["content"]
    reasoning = bool(turn.get("reasoning_content"))
    return turn["role"], reasoning, len(turn.get("tool_calls") or ()), bool(content.strip()), "</" in content
