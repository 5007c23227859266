"""Reads turns and tools in the forms that people write them in, and returns one form.

It reads OpenAI's messages (content parts, `tool_calls`, `weight`), ShareGPT's (`from`, `value`, `function_call`,
`observation`) and LLaMA-Factory's (`loss_weight`, parts of reasoning and tool calls). The result is what chat templates
take: `role`, `content`, and if present `reasoning_content`, `tool_calls`, `tool_call_id`, `name`
and, on an answer that must not be learned, `weight: 0`.
"""

import json
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

Turn = dict[str, Any]
# ShareGPT's and OpenAI's newer and older names for the same roles.
_ROLES = {
    **{name: name for name in ("system", "user", "assistant", "tool")},
    **dict.fromkeys(("human", "instruction"), "user"),
    **dict.fromkeys(("gpt", "model", "bot", "chatgpt", "bing", "bard", "claude", "function_call"), "assistant"),
    **dict.fromkeys(("observation", "function", "function_response", "ipython"), "tool"),
    "developer": "system",
}
_PLAIN = {"role", "content"}
_KEPT = ("user", "assistant", "system", "tool")  # a tuple, because a row's role may be a value that is not hashable
_READ = frozenset(
    (
        *("role", "from", "content", "value", "name", "tool_calls", "tool_call_id", "function_call", "weight"),
        *("loss_weight", "train", "reasoning_content", "reasoning", "thinking"),
    )
)


class RowRejected(ValueError):
    """The row cannot be used; the message says why."""


def kind_of(value: Any) -> str:
    """Name a value's type in JSON's terms."""
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "text"}
    return names.get(type(value), "a list" if isinstance(value, list) else "an object")


def read_turns(value: Any, where: str, notes: set[str]) -> list[Turn]:
    """Read a list of turns.

    Args:
        where: The column, for messages.
        notes: Collects remarks about rows that are kept.

    Raises:
        RowRejected: The value is no list of turns, or a turn is broken.
    """
    value = from_text(value, where)
    if not isinstance(value, list):
        raise RowRejected(f"{where!r} is {kind_of(value)}, not a list of turns")
    if not value:
        raise RowRejected(f"{where!r} has no turns")
    turns = [read_turn(turn, f"{where}[{index}]", notes) for index, turn in enumerate(value)]
    if any(turn["role"] == "system" and not turn["content"].strip() for turn in turns):
        notes.add("have an empty system turn, which is left out")
        turns = [turn for turn in turns if turn["role"] != "system" or turn["content"].strip()]
    return turns


def read_turn(turn: Any, where: str, notes: set[str]) -> Turn:
    """Read one turn.

    Raises:
        RowRejected: A field is missing, has the wrong type, or would be lost.
    """
    if not isinstance(turn, dict):
        raise RowRejected(f"{where} is {kind_of(turn)}, not an object with a role and content")
    if turn.keys() == _PLAIN and turn["role"] in _KEPT and isinstance(turn["content"], str) and turn["content"].strip():
        return {"role": turn["role"], "content": turn["content"]}  # the short way for most turns
    told = turn["role"] if "role" in turn else turn.get("from")
    role = _ROLES.get(told.lower()) if isinstance(told, str) else None
    if role is None:
        raise RowRejected(f"{where} has the role {told!r:.40}; known are {sorted(_ROLES)}")
    notes.update(f"have turns with {name!r}, which is not used" for name in turn if name not in _READ)
    content, reasoning, calls = _content(turn, where)
    if told == "function_call":
        content, calls = "", [*calls, *read_calls(content, where)]
    for name in ("tool_calls", "function_call"):
        if turn.get(name) is not None:
            calls = [*calls, *read_calls(turn[name], f"{where}.{name}")]
    reasoning = _first_text(turn, ("reasoning_content", "reasoning", "thinking"), where) or reasoning
    _check_place(role, content, reasoning, calls, where)
    read: Turn = {"role": role, "content": content}
    read |= {"reasoning_content": reasoning} if reasoning else {}
    read |= {"tool_calls": calls} if calls else {}
    for name in ("tool_call_id", "name"):
        if turn.get(name) is not None:
            read[name] = _text(turn[name], f"{where}.{name}")
    return read | _weight(turn, role, where)


def _check_place(role: str, content: str, reasoning: str, calls: list[Turn], where: str) -> None:
    if (calls or reasoning) and role != "assistant":
        raise RowRejected(f"{where} is a {role} turn with {'tool calls' if calls else 'reasoning'}")
    if not content.strip() and not calls and role not in ("tool", "system"):
        raise RowRejected(f"{where}.content is empty")


def _content(turn: Mapping[str, Any], where: str) -> tuple[str, str, list[Turn]]:
    """Return the text, the reasoning and the tool calls of a turn's content."""
    content = turn["content"] if "content" in turn else turn.get("value")
    if content is None and (turn.get("tool_calls") or turn.get("function_call")):
        return "", "", []
    if isinstance(content, str):
        return content, "", []
    if not isinstance(content, list):
        raise RowRejected(f"{where}.content is {kind_of(content)}, not text")
    texts, reasonings = [], []
    calls: list[Turn] = []
    for index, part in enumerate(content):
        place = f"{where}.content[{index}]"
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in ("text", "input_text", "output_text"):
            texts.append(_first_text(part, ("text", "value"), place))
        elif kind in ("reasoning", "thinking"):
            reasonings.append(_first_text(part, ("text", "value", "reasoning", "thinking"), place))
        elif kind in ("tool_call", "tool_calls"):
            calls += read_calls(part.get("value"), place)
        else:
            raise RowRejected(f"{place} is of the type {kind!r:.40}; only text can be trained on")
    return "".join(texts), "".join(reasonings), calls


def _first_text(source: Mapping[str, Any], names: tuple[str, ...], where: str) -> str:
    return next((_text(source[name], f"{where}.{name}") for name in names if source.get(name) is not None), "")


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise RowRejected(f"{where} is {kind_of(value)}, not text")
    return value


def _weight(turn: Mapping[str, Any], role: str, where: str) -> dict[str, int]:
    """Return `weight: 0` for an answer that must not be learned; OpenAI allows 0 and 1, on answers only."""
    given = [(name, turn[name]) for name in ("weight", "loss_weight", "train") if turn.get(name) is not None]
    if not given:
        return {}
    name, value = given[0]
    if isinstance(value, bool) != (name == "train") or value not in (0, 1):
        raise RowRejected(f"{where}.{name} is {value!r:.40}; it can be {'a boolean' if name == 'train' else '0 or 1'}")
    if role != "assistant":
        if value:
            raise RowRejected(f"{where}.{name} is {value!r} on a {role} turn; only answers can carry loss")
        return {}
    return {} if value else {"weight": 0}


def read_calls(value: Any, where: str) -> list[Turn]:
    """Read tool calls: one or a list, as JSON or as JSON in text, with or without OpenAI's envelope.

    Raises:
        RowRejected: A call has no name, or its arguments are no object.
    """
    value = from_text(value, where)
    calls = []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
            raise RowRejected(f"{where} is no tool call: it has no name ({call!s:.60})")
        arguments = function.get("arguments", function.get("parameters"))
        arguments = {} if arguments in (None, "") else from_text(arguments, f"{where}.arguments")
        if not isinstance(arguments, Mapping):
            raise RowRejected(f"{where}: the arguments of {function['name']!r:.60} are {kind_of(arguments)}")
        identity = {"id": _text(call["id"], f"{where}.id")} if call.get("id") is not None else {}
        named = {"name": function["name"], "arguments": dict(arguments)}
        calls.append({**identity, "type": "function", "function": named})
    return calls


def read_tools(value: Any, where: str) -> list[dict[str, Any]]:
    """Read a row's tools, each wrapped as OpenAI does: `{"type": "function", "function": {"name": ...}}`.

    Raises:
        RowRejected: It is no list, or one of them has no name.
    """
    value = from_text(value, where) if value != "" else None
    if value is None:
        return []
    if not isinstance(value, list):
        raise RowRejected(f"{where!r} is {kind_of(value)}, not a list of tools")
    tools = []
    for index, tool in enumerate(value):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RowRejected(f"{where}[{index}] is no tool: it has no name")
        tools.append(dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)})
    return tools


def from_text(value: Any, where: str) -> Any:
    """Read JSON that stands in a text, as it does in CSV cells and in ShareGPT's `tools`.

    Raises:
        RowRejected: The text is not JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, parse_constant=refuse_constant)
    except RecursionError as error:
        raise RowRejected(f"{where!r} is nested too deeply") from error
    except ValueError as error:
        raise RowRejected(f"{where!r} is text, and not JSON: {error}") from error


def refuse_constant(name: str) -> Any:
    """Refuse NaN and Infinity, which Python's parser accepts.

    Raises:
        ValueError: Always.
    """
    raise ValueError(f"{name} is not JSON")


def check_conversation(turns: list[Turn], notes: set[str]) -> None:
    """Check that the turns are a conversation that ends with an answer.

    Raises:
        RowRejected: They are not.
    """
    roles = [turn["role"] for turn in turns]
    if "assistant" not in roles:
        raise RowRejected("no assistant turn: there is nothing to learn")
    if roles[-1] != "assistant":
        raise RowRejected(f"the last turn is a {roles[-1]} turn: it has no answer")
    if set(roles) == {"assistant"}:
        raise RowRejected("there are answers only: there is no question")
    if next(role for role in roles if role != "system") == "assistant":
        notes.add("begin with an answer, such as a greeting; some chat templates refuse that")
    if "system" in roles[1:]:
        notes.add("have a system turn behind the first turn; some chat templates refuse that, or leave it out")
    if any(first == second and first in ("user", "assistant") for first, second in pairwise(roles)):
        notes.add("have two turns of one role in a row; some chat templates refuse that")
    for before, turn in pairwise(turns):
        if turn["role"] == "tool" and before["role"] != "tool" and not before.get("tool_calls"):
            notes.add("have a tool's answer with no call before it; some chat templates refuse that")
