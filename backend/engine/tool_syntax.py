"""How a chat template writes calls of tools, read off the template itself.

A conversation with known calls is rendered. What stands around their names and arguments is the syntax.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from domain.openai.tool_calls import read_tool_calls
from engine.rendering import ChatRenderer

# No template writes these of its own. The id has the form that Mistral's templates insist on.
_NAMES = ("pqfirst", "pqsecond")
_ID = "pqid00000"
_QUESTION = {"role": "user", "content": "question"}
_NO_THOUGHT = re.compile(r"<think>\s*</think>\s*")  # what Qwen's template writes before an answer without reasoning


@dataclass(frozen=True)
class ToolSyntax:
    """The text of calls, in the order in which it is written.

    Attributes:
        before: From the start of the answer to the first name.
        middle: Between a name and its arguments, which are a JSON object.
        between: From the arguments of one call to the name of the next; None where a template writes one call alone.
        after: From the last arguments to the end of the turn.
    """

    before: str
    middle: str
    between: str | None
    after: str


def split_ids(text: str) -> list[str]:
    """Split a part of a syntax at the ids of calls, which a model chooses."""
    return text.split(_ID)


def tool_syntax(tokenizer: Any, renderer: ChatRenderer, ends: Sequence[str]) -> ToolSyntax | None:
    """Find the syntax of a template's calls.

    Args:
        ends: The texts that may end a turn.

    Returns:
        None where calls are not written as a name before a JSON object, or where answers in that form are not read.
    """
    one = _around(renderer, _NAMES[:1], ends)
    if one is None:
        return None
    two = _around(renderer, _NAMES, ends)
    same = two is not None and (two[0], two[1], two[3], two[4]) == (one[0], one[1], one[1], one[-1])
    alone = ToolSyntax(one[0], one[1], None, one[-1])
    several = ToolSyntax(one[0], one[1], two[2], one[-1]) if two is not None and same else alone
    return next((syntax for syntax in (several, alone) if _is_read(syntax, tokenizer)), None)


def _around(renderer: ChatRenderer, names: Sequence[str], ends: Sequence[str]) -> list[str] | None:
    """Return what stands before, between and after the names and arguments of calls; None if it cannot be told."""
    calls = [{"id": _ID, "type": "function", "function": {"name": n, "arguments": {n + "key": "v"}}} for n in names]
    tools = [{"type": "function", "function": {"name": n, "description": "d", "parameters": _schema(n)}} for n in names]
    answer = {"role": "assistant", "content": "", "tool_calls": calls}
    text = renderer.answer([_QUESTION], answer, tools)
    if text is None:
        return None
    parts, rest = [], _NO_THOUGHT.sub("", text)
    for name in names:
        before, found, rest = rest.partition(name)
        arguments = _object_of(rest, name + "key") if found else None
        if arguments is None:
            return None
        parts += [before, rest[: arguments[0]]]
        rest = rest[arguments[1] :]
    return [*parts, rest[: min((at for end in ends if (at := rest.find(end)) >= 0), default=len(rest.rstrip()))]]


def _schema(name: str) -> dict[str, Any]:
    return {"type": "object", "properties": {name + "key": {"type": "string", "description": "d"}}, "required": []}


def _object_of(text: str, key: str) -> tuple[int, int] | None:
    """Return where the JSON object with that one key is written."""
    at = text.find("{")
    while 0 <= at < text.find(key):
        try:
            value, end = json.JSONDecoder().raw_decode(text, at)
        except ValueError:
            value, end = None, at
        if value == {key: "v"}:
            return at, end
        at = text.find("{", at + 1)
    return None


def _is_read(syntax: ToolSyntax, tokenizer: Any) -> bool:
    """Tell whether calls in this syntax are recognised in an answer, whose special tokens are no part of its text."""
    call = "f" + syntax.middle + '{"a": 1}'
    written = syntax.before + call + (syntax.between + call if syntax.between is not None else "") + syntax.after
    for token in tokenizer.added_tokens_decoder.values():
        written = written.replace(token.content, "") if token.special else written
    text, calls = read_tool_calls(written, ["f"])
    told = [(read.name, json.loads(read.arguments)) for read in calls]
    return not text and told == [("f", {"a": 1})] * (1 if syntax.between is None else 2)
