"""Renders conversations with a model's chat template, and finds the characters of each answer in the text.

To find an answer, the conversation is rendered again, cut short or with one turn changed. The answer is where the texts
differ. No marker is searched for, so no text in a turn can be mistaken for one. This works for templates without
generation marks, and for templates that rewrite earlier turns when more turns follow.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from jinja2 import TemplateError

from engine.answer_span import Span
from engine.answer_windows import spans_by_windows
from engine.errors import BadData, BadSetting
from engine.template_limits import bound_numbers, template_limits

bound_numbers()
Turn = Mapping[str, Any]
# A character that Unicode assigns to nothing. It differs from every character of a turn.
_OTHER = "\ue000"
# The errors that a template raises on purpose, and those of a template that was not written for such turns.
_TEMPLATE_ERRORS = (
    TemplateError,
    ArithmeticError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    RecursionError,
    MemoryError,
)


@dataclass(frozen=True)
class Rendered:
    """A conversation as the model sees it.

    Attributes:
        spans: The index of each turn that was asked for → its characters, from behind the prompt that the template
            gives for an answer through its end mark; None where the template leaves the turn out.
    """

    text: str
    spans: dict[int, Span | None]


@dataclass(frozen=True)
class _Shape:
    """The form in which a template takes its turns. A template does not name it, and silently drops turns in another.

    Attributes:
        parts: Contents as lists of parts.
        null: No content, rather than an empty one, beside tool calls.
        text_arguments: Arguments of tool calls as JSON in a text.
    """

    parts: bool = False
    null: bool = False
    text_arguments: bool = False


class ChatRenderer:
    """Renders conversations with one tokenizer's chat template."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._parts = self._wants_parts()

    def render(self, number: int, row: Mapping[str, Any], answers: Iterable[int]) -> Rendered:
        """Render a conversation.

        Args:
            number: The row's position in the dataset, from 0, for messages.
            row: `messages`, and `tools` if it has any.
            answers: The indices of the turns to find in the text.

        Raises:
            BadData: The template refuses it, leaves tool calls out, or cannot be followed.
        """
        messages, tools = row["messages"], row.get("tools")
        shape = self._shape(number, messages, tools)
        chat = _Chat(self._tokenizer, number, messages, tools, shape)
        wanted = sorted(answers)
        spans: dict[int, Span | None] = {**(spans_by_windows(chat, wanted) or {})}
        return Rendered(chat.text, spans or {index: chat.span(index) for index in wanted})

    def prompt(self, messages: Sequence[Turn], tools: Any = None) -> str:
        """Render a conversation up to the start of the next answer, in the same shape as rows.

        Raises:
            BadSetting: The template refuses it, or leaves the tools out.
        """
        try:
            shape = self._shape(0, messages, tools)
            text = _apply(self._tokenizer, _shaped(messages, shape), tools, prompt=True)
            if tools and text == _apply(self._tokenizer, _shaped(messages, shape), None, prompt=True):
                raise BadSetting("the model's chat template knows no tools; send none, or use a model that calls them")
            return text
        except BadData as error:
            why = error.message.removeprefix("row 1: ")
            raise BadSetting(f"the conversation cannot be rendered: {why}") from error
        except _TEMPLATE_ERRORS as error:
            raise BadSetting(f"the model's chat template refuses the conversation: {error}") from error

    def answer(self, messages: Sequence[Turn], answer: Turn, tools: Any) -> str | None:
        """Render what the template writes behind its prompt for an answer; None if it cannot be told apart.

        Args:
            messages: The turns before it.
        """
        turns = [*messages, answer]
        try:
            shape = self._shape(0, turns, tools)
            prompt = _apply(self._tokenizer, _shaped(messages, shape), tools, prompt=True)
            text = _apply(self._tokenizer, _shaped(turns, shape), tools)
        except (BadData, *_TEMPLATE_ERRORS):
            return None
        return text.removeprefix(prompt) if text.startswith(prompt) else None

    def left_out(self, number: int, row: Mapping[str, Any]) -> set[str]:
        """Return the parts of a conversation that the template silently drops: `tools`, `reasoning`, or a turn's role.

        Raises:
            BadData: As for `render`.
        """
        messages, tools = row["messages"], row.get("tools")
        chat = _Chat(self._tokenizer, number, messages, tools, self._shape(number, messages, tools))
        left_out = chat.left_out_roles()
        if tools and not chat.needs_tools():
            left_out.add("tools")
        # Templates drop the reasoning of earlier turns on purpose.
        if messages[-1].get("reasoning_content") and not chat.needs_reasoning():
            left_out.add("reasoning")
        return left_out

    def _wants_parts(self) -> bool:
        """Tell whether the template takes lists of parts only, as those of models that see do."""
        for parts in (False, True):
            texts = []
            for content in ("a", "b"):
                turns = [{"role": "user", "content": content}, {"role": "assistant", "content": content}]
                try:
                    texts.append(_apply(self._tokenizer, _shaped(turns, _Shape(parts=parts)), None))
                except _TEMPLATE_ERRORS:
                    break
            if len(texts) == 2 and texts[0] != texts[1]:
                return parts
        return False

    def _shape(self, number: int, messages: Sequence[Turn], tools: Any) -> _Shape:
        """Find the shape in which the template takes this row's tool calls, so that they change the text.

        Raises:
            BadData: It takes them in no shape.
        """
        if not any(turn.get("tool_calls") for turn in messages):
            return _Shape(parts=self._parts)
        renamed = [_renamed(turn) for turn in messages]
        reasons = []
        for text_arguments, null in product((False, True), (False, True)):
            shape = _Shape(self._parts, null, text_arguments)
            try:
                text = _apply(self._tokenizer, _shaped(messages, shape), tools)
                if text != _apply(self._tokenizer, _shaped(renamed, shape), tools):
                    return shape
                reasons.append("leaves tool calls out")
            except _TEMPLATE_ERRORS as error:
                reasons.append(f"refuses it: {error}")
        raise _refused(number, reasons[0])


class _Chat:
    """One conversation, rendered as often as needed."""

    def __init__(self, tokenizer: Any, number: int, messages: Sequence[Turn], tools: Any, shape: _Shape) -> None:
        self._tokenizer, self._number, self._messages = tokenizer, number, messages
        self._tools, self._shape = tools, shape
        self._text = self._render(messages)

    @property
    def text(self) -> str:
        """The rendered conversation."""
        return self._text

    @property
    def messages(self) -> Sequence[Turn]:
        """Its turns."""
        return self._messages

    def of(self, messages: Sequence[Turn]) -> "_Chat":
        """Return another conversation with the same template, tools and shape."""
        return _Chat(self._tokenizer, self._number, messages, self._tools, self._shape)

    def span(self, index: int) -> Span | None:
        """Return the span of a turn's answer; None if the template leaves the turn out.

        Raises:
            BadData: The text does not tell.
        """
        if not self._is_asked(index):
            return self._greeting_span(index)
        before = self._render(self._messages[:index], prompt=True)
        through = self.text if index == len(self._messages) - 1 else self._render(self._messages[: index + 1])
        starts, ends = self.text.startswith(before), self.text.startswith(through.rstrip())
        content = self._messages[index]["content"].strip()
        plain = starts and ends and len(before) < len(through.rstrip())
        if plain and content and content in self.text[len(before) : len(through)]:
            return Span(len(before), len(through.rstrip()))
        other = self._render(_changed(self._messages, index))
        if other == self.text:
            return None
        begins = _common_prefix(self.text, other)
        plain = starts and len(before) <= begins
        start = len(before) if plain else min(begins, self._prompt_end(index, before))
        end = len(through.rstrip()) if ends else self._answer_end(index, other, through)
        if start >= end:
            raise _refused(self._number, f"cannot be followed at turn {index + 1}", "train_on=all")
        return Span(start, end, cuts_start=not plain, cuts_end=not ends)

    def _is_asked(self, index: int) -> bool:
        """Tell whether an answer has a question before it, or the template renders what is before it on its own."""
        before = self._messages[:index]
        if any(turn["role"] != "system" for turn in before[:-1]) or (before and before[-1]["role"] != "system"):
            return True
        try:
            prompt = _apply(self._tokenizer, _shaped(before, self._shape), self._tools, prompt=True)
            _apply(self._tokenizer, _shaped(self._messages[: index + 1], self._shape), self._tools)
        except _TEMPLATE_ERRORS:
            return False
        return self.text.startswith(prompt)

    def _greeting_span(self, index: int) -> Span | None:
        """Return the span of an answer that nobody asked for, where the template cannot render what is before it alone.

        It begins with the first character that depends on the turn. Its end mark is the one behind the same answer to a
        question.
        """
        other = self._render(_changed(self._messages, index))
        if other == self.text:
            return None
        start = _common_prefix(self.text, other)
        there = len(self.text) - _common_suffix(self.text, other)
        asked = [{"role": "user", "content": "a"}, self._messages[index]]
        answered = self._render(asked)
        here = self._end_of(1, answered, asked)
        mark = self.text[there : there + _common_prefix(self.text[there:], answered[here:])]
        return Span(start, there + len(mark.rstrip()), cuts_start=True, cuts_end=True)

    def left_out_roles(self) -> set[str]:
        """Return the roles of the turns that the template leaves out.

        All turns say a word of their own in one rendering. Only a turn whose word is missing there is looked at alone.
        """
        word = "w"
        while word in self.text:
            word += "w"
        marked = [_changed([turn], 0, f"{word}{index}e")[0] for index, turn in enumerate(self._messages)]
        try:
            text = self._render(marked)
        except BadData:
            text = ""  # each turn is looked at alone
        said = {int(found) for found in re.findall(f"{word}([0-9]+)e", text)}
        roles: set[str] = set()
        for index, turn in enumerate(self._messages):
            if turn["role"] not in roles and index not in said and self.leaves_out(index):
                roles.add(turn["role"])
        return roles

    def leaves_out(self, index: int) -> bool:
        """Tell whether the text stays the same whatever a turn says."""
        return self._render(_changed(self._messages, index)) == self.text

    def needs_tools(self) -> bool:
        """Tell whether the tools change the text."""
        return _apply(self._tokenizer, _shaped(self._messages, self._shape), None) != self.text

    def needs_reasoning(self) -> bool:
        """Tell whether the last turn's reasoning changes the text."""
        last = {name: value for name, value in self._messages[-1].items() if name != "reasoning_content"}
        return self._render([*self._messages[:-1], last]) != self.text

    def _prompt_end(self, index: int, before: str) -> int:
        """Return the end of the answer's prompt. It is the text that both renderings have behind the turn before."""
        there = self._end_of(index - 1, self.text, self._messages)
        here = self._end_of(index - 1, before, self._messages[:index], prompt=True)
        return there + _common_prefix(self.text[there:], before[here:])

    def _answer_end(self, index: int, other: str, through: str) -> int:
        """Return the end of the answer's end mark. The mark is the text that both renderings have behind the turn."""
        there = len(self.text) - _common_suffix(self.text, other)
        here = self._end_of(index, through, self._messages[: index + 1])
        mark = self.text[there : there + _common_prefix(self.text[there:], through[here:])]
        return there + len(mark.rstrip())

    def _end_of(self, index: int, text: str, messages: Sequence[Turn], *, prompt: bool = False) -> int:
        """Return the place in a text at which the words of a turn end."""
        other = self._render(_changed(messages, index), prompt=prompt)
        if other == text:
            what = f"leaves turn {index + 1} out, so the next answer cannot be found"
            raise _refused(self._number, what, "train_on=all")
        return len(text) - _common_suffix(text, other)

    def _render(self, messages: Sequence[Turn], *, prompt: bool = False) -> str:
        try:
            return _apply(self._tokenizer, _shaped(messages, self._shape), self._tools, prompt=prompt)
        except _TEMPLATE_ERRORS as error:
            raise _refused(self._number, f"refuses it: {error}") from error


def _apply(tokenizer: Any, messages: list[dict[str, Any]], tools: Any, *, prompt: bool = False) -> str:
    with template_limits():
        text: str = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt)
    return text


def _refused(number: int, what: str, *suggestions: str) -> BadData:
    return BadData(
        f"row {number + 1}: the model's chat template {what}",
        [*suggestions, "leave the row out", "a model whose template takes such turns"],
    )


def _shaped(messages: Sequence[Turn], shape: _Shape) -> list[dict[str, Any]]:
    """Write turns in a template's shape, without the fields that only the trainer reads."""
    return [_shaped_turn(turn, shape) for turn in messages]


def _shaped_turn(turn: Turn, shape: _Shape) -> dict[str, Any]:
    shaped = {name: value for name, value in turn.items() if name != "weight"}
    if "reasoning_content" in turn:
        shaped["thinking"] = turn["reasoning_content"]  # gpt-oss's name for it
    calls = turn.get("tool_calls")
    if calls and shape.text_arguments:
        shaped["tool_calls"] = [_with_text_arguments(call) for call in calls]
    if calls and shape.null and not turn["content"]:
        shaped["content"] = None
    elif shape.parts:
        shaped["content"] = [{"type": "text", "text": turn["content"]}]
    return shaped


def _with_text_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": arguments}}


def _changed(messages: Sequence[Turn], index: int, other: str = _OTHER) -> list[Turn]:
    """Return the conversation with one turn changed from its first character to its last."""
    turn = dict(messages[index])
    if turn["content"] or not turn.get("tool_calls"):
        turn["content"] = other
    if turn.get("reasoning_content"):
        turn["reasoning_content"] = other
    if turn.get("tool_calls"):
        turn["tool_calls"] = [
            # The name stays, since templates repeat it in the turn that answers the call.
            {**call, "function": {**call["function"], "arguments": {other: other}}}
            for call in turn["tool_calls"]
        ]
    return [*messages[:index], turn, *messages[index + 1 :]]


def _renamed(turn: Turn) -> Turn:
    calls = [
        {**call, "function": {**call["function"], "name": call["function"]["name"] + _OTHER}}
        for call in turn.get("tool_calls", ())
    ]
    return {**turn, "tool_calls": calls} if calls else turn


def _common_prefix(first: str, second: str) -> int:
    # Halving is faster than character by character: strings compare at memory speed.
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _common_suffix(first: str, second: str) -> int:
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[len(first) - middle : len(first) - low] == second[len(second) - middle : len(second) - low]:
            low = middle
        else:
            high = middle - 1
    return low
