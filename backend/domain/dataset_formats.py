"""How a row of a client's file becomes a conversation. Every refusal says what is wrong with which field."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

DatasetFormat = Literal["messages", "alpaca", "prompt_completion"]
FORMATS: tuple[DatasetFormat, ...] = ("messages", "alpaca", "prompt_completion")
# Column names under which prompts and answers are commonly published.
_PAIRS = (("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("input", "output"))
_ROLES = frozenset({"system", "user", "assistant", "tool"})


class RowRejected(ValueError):
    """The row cannot be used; the message says why."""


@dataclass(frozen=True)
class Detection:
    """A recognised format and the columns it was recognised by."""

    format: DatasetFormat
    columns: Mapping[str, str]


def detect(columns: Sequence[str]) -> Detection | None:
    """Recognise a format by its column names, or return None."""
    names = set(columns)
    if "messages" in names:
        return Detection("messages", {"messages": "messages"})
    if "conversations" in names:
        return Detection("messages", {"messages": "conversations"})
    if {"instruction", "output"} <= names:
        optional: dict[str, str] = {name: name for name in ("input", "system") if name in names}
        return Detection("alpaca", {"instruction": "instruction", "output": "output", **optional})
    for prompt, completion in _PAIRS:
        if {prompt, completion} <= names:
            return Detection("prompt_completion", {"prompt": prompt, "completion": completion})
    return None


def required_columns(format_: DatasetFormat) -> tuple[str, ...]:
    """Return the fields that a format cannot do without."""
    return {
        "messages": ("messages",),
        "alpaca": ("instruction", "output"),
        "prompt_completion": ("prompt", "completion"),
    }[format_]


def to_messages(row: Mapping[str, Any], detection: Detection) -> list[dict[str, str]]:
    """Turn a row into a conversation that ends with an answer.

    Raises:
        RowRejected: A field is missing, of the wrong type or empty, or the turns make no conversation.
    """
    if detection.format == "messages":
        return _conversation(row, detection.columns["messages"])
    if detection.format == "alpaca":
        columns = detection.columns
        instruction = _text(row, columns["instruction"])
        context = _optional_text(row, columns.get("input"))
        system = _optional_text(row, columns.get("system"))
        prompt = f"{instruction}\n\n{context}" if context else instruction
        turns = [{"role": "system", "content": system}] if system else []
        return [*turns, *_pair(prompt, _text(row, columns["output"]))]
    return _pair(_text(row, detection.columns["prompt"]), _text(row, detection.columns["completion"]))


def _pair(prompt: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _text(row: Mapping[str, Any], column: str) -> str:
    if column not in row or row[column] is None:
        raise RowRejected(f"{column!r} is missing")
    value = row[column]
    if not isinstance(value, str):
        raise RowRejected(f"{column!r} is {_kind(value)}, not text")
    if not value.strip():
        raise RowRejected(f"{column!r} is empty")
    return _encodable(value, column)


def _optional_text(row: Mapping[str, Any], column: str | None) -> str:
    value = None if column is None else row.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RowRejected(f"{column!r} is {_kind(value)}, not text")
    return _encodable(value.strip(), str(column))


def _encodable(value: str, column: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowRejected(f"{column!r} holds half a surrogate pair at character {error.start}") from error
    return value


def _conversation(row: Mapping[str, Any], column: str) -> list[dict[str, str]]:
    turns = row.get(column)
    if not isinstance(turns, list):
        raise RowRejected(f"{column!r} is {_kind(turns)}, not a list of turns")
    if not turns:
        raise RowRejected(f"{column!r} has no turns")
    messages = [_turn(turn, f"{column}[{index}]") for index, turn in enumerate(turns)]
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        raise RowRejected(f"turn {roles.index('system', 1) + 1} is a system turn; it can only come first")
    if "assistant" not in roles:
        raise RowRejected("no assistant turn: there is nothing to learn")
    if roles[-1] != "assistant":
        raise RowRejected(f"the last turn is a {roles[-1]} turn: it has no answer")
    if roles[0] == "assistant" or roles[:2] == ["system", "assistant"]:
        raise RowRejected("the conversation starts with an answer: there is no question")
    return messages


# ShareGPT's names for the same roles.
_ALIASES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}


def _turn(turn: Any, where: str) -> dict[str, str]:
    if not isinstance(turn, Mapping):
        raise RowRejected(f"{where} is {_kind(turn)}, not an object with a role and content")
    role = turn.get("role", turn.get("from"))
    content_name = "content" if "content" in turn else "value"
    role = _ALIASES.get(role, role) if isinstance(role, str) else role
    if not isinstance(role, str) or role not in _ROLES:
        raise RowRejected(f"{where} has the role {role!r:.40}; known are {sorted(_ROLES)}")
    ignored = sorted(set(turn) - {"role", "from", "content", "value", "name"})
    if any(turn[name] is not None for name in ignored):
        raise RowRejected(f"{where} has {ignored[0]!r}, which is not supported and would be lost")
    content = turn.get(content_name)
    if not isinstance(content, str):
        raise RowRejected(f"{where}.content is {_kind(content)}, not text")
    if not content.strip():
        raise RowRejected(f"{where}.content is empty")
    return {"role": str(role), "content": _encodable(content, where)}


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "text"}
    return names.get(type(value), "a list" if isinstance(value, list) else "an object")
