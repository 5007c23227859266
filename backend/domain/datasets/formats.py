"""Which format a file's rows are in, and how a row becomes what is trained on.

A normal row is one of four kinds: a conversation `{"messages", "tools"}`, a text `{"text"}`, a preference
`{"prompt", "chosen", "rejected", "tools"}` or a judged answer (KTO) `{"prompt", "completion", "label", "tools"}`.
`domain.peft.objectives` says what is learned from which.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, get_args

from domain.datasets.turns import (
    RowRejected,
    Turn,
    check_conversation,
    from_text,
    kind_of,
    read_tools,
    read_turn,
    read_turns,
)

DatasetFormat = Literal["messages", "sharegpt", "alpaca", "prompt_completion", "text", "preference", "kto"]
FORMATS: tuple[DatasetFormat, ...] = get_args(DatasetFormat)


@dataclass(frozen=True)
class FormatFields:
    """A format's fields, each with the columns under which it is commonly published, likeliest first."""

    required: Mapping[str, tuple[str, ...]]
    optional: Mapping[str, tuple[str, ...]]

    @property
    def all(self) -> Mapping[str, tuple[str, ...]]:
        """The required fields and the optional ones."""
        return {**self.required, **self.optional}


_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)
_TURNS = ("messages", "conversations", "conversation")
_PROMPT = ("prompt", "question", "query", "input")
_ANSWER = ("completion", "response", "output", "answer")
_SYSTEM = {"system": ("system", "system_prompt")}
_TOOLS = {"tools": ("tools", "functions")}
FIELDS: MappingProxyType[DatasetFormat, FormatFields] = MappingProxyType(
    {
        "messages": FormatFields({"messages": _TURNS}, {**_SYSTEM, **_TOOLS}),
        "sharegpt": FormatFields({"messages": ("conversations", "conversation", "messages")}, {**_SYSTEM, **_TOOLS}),
        # Dolly's context, response and category are alpaca's input and output under other names.
        "alpaca": FormatFields(
            {"instruction": ("instruction",), "output": ("output", "response", "completion", "answer")},
            {"input": ("input",), "context": ("context",), "history": ("history",), **_SYSTEM},
        ),
        "prompt_completion": FormatFields(
            {"prompt": _PROMPT, "completion": _ANSWER}, {"context": ("context",), **_SYSTEM, **_TOOLS}
        ),
        "text": FormatFields({"text": ("text", "content")}, {}),
        "preference": FormatFields(
            # The third of each are OpenAI's.
            {
                "chosen": ("chosen", "chosen_messages", "preferred_output"),
                "rejected": ("rejected", "rejected_messages", "non_preferred_output"),
            },
            {
                "prompt": ("prompt", "question", "instruction", "conversations", "messages", "input.messages"),
                **_SYSTEM,
                "tools": (*_TOOLS["tools"], "input.tools"),
            },
        ),
        "kto": FormatFields(
            {"label": ("label", "kto_tag")},
            {"messages": _TURNS, "prompt": _PROMPT, "completion": _ANSWER, **_SYSTEM, **_TOOLS},
        ),
    }
)


@dataclass(frozen=True)
class Reading:
    """How a file's rows are read.

    Attributes:
        fields: The format's field → the columns to look in; the first that has a value counts.
        evidence: What it was recognised by, or who said so.
    """

    format: DatasetFormat
    fields: Mapping[str, tuple[str, ...]]
    evidence: str

    @property
    def columns(self) -> frozenset[str]:
        """The columns that are read."""
        return frozenset(column for columns in self.fields.values() for column in columns)


@dataclass(frozen=True)
class NormalRow:
    """A row in its stored form.

    Attributes:
        line: The row as a line of JSON in UTF-8.
        learnable: Whether any answer may be learned, and whether the last one may.
        notes: What is worth telling about it.
    """

    line: bytes
    learnable: tuple[bool, bool]
    notes: frozenset[str] = field(default_factory=frozenset)


def normalise(row: Mapping[str, Any], reading: Reading) -> NormalRow:
    """Turn a row into its normal form.

    Raises:
        RowRejected: A field is missing, of the wrong type or empty, or the turns make no conversation.
    """
    notes: set[str] = set()
    try:
        normal = _READERS[reading.format](_Row(row, reading, notes))
        line = (_ENCODER.encode(normal) + "\n").encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowRejected(f"half a surrogate pair at character {error.start} of the row") from error
    except RecursionError as error:
        raise RowRejected("nested too deeply") from error
    except ValueError as error:
        raise error if isinstance(error, RowRejected) else RowRejected(f"a number is not finite: {error}") from error
    answers = [turn.get("weight", 1) != 0 for turn in normal.get("messages", ()) if turn["role"] == "assistant"]
    learnable = (any(answers), answers[-1]) if answers else (True, True)
    return NormalRow(line, learnable, frozenset(notes))


class _Row:
    """A row with its columns found."""

    def __init__(self, row: Mapping[str, Any], reading: Reading, notes: set[str]) -> None:
        self._row, self._fields, self.notes = row, reading.fields, notes

    def find(self, name: str) -> tuple[Any, str]:
        """Return a field's value, None if it has none, and the column it is in."""
        columns = self._fields.get(name, ())
        for column in columns:
            value = column_value(self._row, column)
            if value is not None:
                return value, column
        return None, next((column for column in columns if column in self._row), columns[0] if columns else name)

    def needed(self, name: str) -> tuple[Any, str]:
        value, column = self.find(name)
        if value is None:
            raise RowRejected(f"{column!r} is missing")
        return value, column

    def text(self, name: str) -> str:
        value, column = self.needed(name)
        if not isinstance(value, str):
            raise RowRejected(f"{column!r} is {kind_of(value)}, not text")
        if not value.strip():
            raise RowRejected(f"{column!r} is empty")
        return value

    def optional_text(self, name: str) -> str:
        value, column = self.find(name)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise RowRejected(f"{column!r} is {kind_of(value)}, not text")
        return value if value.strip() else ""

    def turns(self, name: str) -> list[Turn]:
        value, column = self.needed(name)
        return read_turns(value, column, self.notes)

    def text_or_turns(self, name: str, role: str) -> list[Turn]:
        """Read a field that is a text, a turn or a list of turns."""
        value, column = self.needed(name)
        if isinstance(value, Mapping):
            return [read_turn(value, column, self.notes)]
        if isinstance(value, list) or (isinstance(value, str) and value.lstrip().startswith("[{")):
            try:
                return read_turns(value, column, self.notes)
            except RowRejected:
                if isinstance(value, list):
                    raise
        return [{"role": role, "content": self.text(name)}]

    def with_system(self, turns: list[Turn]) -> list[Turn]:
        system = self.optional_text("system")
        if not system:
            return turns
        if turns and turns[0]["role"] == "system":
            if turns[0]["content"].strip() == system.strip():
                return turns
            raise RowRejected("there is a system column and a system turn, and they differ")
        return [{"role": "system", "content": system}, *turns]

    def tools(self) -> dict[str, Any]:
        value, column = self.find("tools")
        tools = read_tools(value, column)
        return {"tools": tools} if tools else {}


def column_value(row: Mapping[str, Any], column: str) -> Any:
    """Return a column's value; a name with dots that is no column leads into nested values: `answers.0.text`."""
    if column in row or "." not in column:
        return row.get(column)
    value: Any = row
    for part in column.split("."):
        if isinstance(value, Mapping):
            value = value.get(part)
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value


def _conversation(row: _Row, turns: list[Turn]) -> dict[str, Any]:
    turns = row.with_system(turns)
    check_conversation(turns, row.notes)
    return {"messages": turns, **row.tools()}


def _messages(row: _Row) -> dict[str, Any]:
    return _conversation(row, row.turns("messages"))


def _joined(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part.strip())


def _alpaca(row: _Row) -> dict[str, Any]:
    value, column = row.needed("instruction")
    if not isinstance(value, str):
        raise RowRejected(f"{column!r} is {kind_of(value)}, not text")
    prompt = _joined(value, row.optional_text("input"), row.optional_text("context"))
    if not prompt:
        raise RowRejected(f"{column!r} is empty")
    asked = {"role": "user", "content": prompt}
    return _conversation(row, [*_history(row), asked, {"role": "assistant", "content": row.text("output")}])


def _history(row: _Row) -> list[Turn]:
    value, column = row.find("history")
    if value in (None, ""):
        return []
    pairs = from_text(value, column)
    turns: list[Turn] = []
    for index, pair in enumerate(pairs if isinstance(pairs, list) else [pairs]):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) and text for text in pair):
            raise RowRejected(f"{column}[{index}] is not a pair of a question and its answer")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return turns


def _prompt_completion(row: _Row) -> dict[str, Any]:
    prompt = row.text_or_turns("prompt", "user")
    context = row.optional_text("context")
    if context:
        prompt = [*prompt[:-1], {**prompt[-1], "content": _joined(prompt[-1]["content"], context)}]
    answer = row.text_or_turns("completion", "assistant")
    if prompt[-1]["role"] == "assistant":
        raise RowRejected("the prompt ends with an answer")
    return _conversation(row, [*prompt, *answer])


def _plain_text(row: _Row) -> dict[str, Any]:
    return {"text": row.text("text")}


def _preference(row: _Row) -> dict[str, Any]:
    chosen, rejected = row.text_or_turns("chosen", "assistant"), row.text_or_turns("rejected", "assistant")
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    prompt = chosen[:shared]
    if row.find("prompt")[0] is not None:
        told = row.text_or_turns("prompt", "user")
        if prompt and prompt[-len(told) :] != told:
            raise RowRejected("'chosen' begins with other turns than the prompt")
        prompt = prompt or told
    chosen, rejected = chosen[shared:], rejected[shared:]
    if not prompt:
        raise RowRejected("there is no prompt: no column of it, and 'chosen' and 'rejected' begin differently")
    if chosen == rejected:
        raise RowRejected("'chosen' and 'rejected' are the same: there is no preference")
    prompt = row.with_system(prompt)
    for answer in (chosen, rejected):
        check_conversation([*prompt, *answer], row.notes)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **row.tools()}


_LABELS = {"true": True, "false": False, "1": True, "0": False}


def _kto(row: _Row) -> dict[str, Any]:
    if row.find("messages")[0] is not None:
        turns = row.turns("messages")
        prompt, completion = turns[:-1], turns[-1:]
    else:
        prompt, completion = row.text_or_turns("prompt", "user"), row.text_or_turns("completion", "assistant")
    value, column = row.needed("label")
    label = _LABELS.get(str(value).lower())
    if label is None:
        raise RowRejected(f"{column!r} is {value!r:.40}, neither true nor false")
    prompt = row.with_system(prompt)
    check_conversation([*prompt, *completion], row.notes)
    return {"prompt": prompt, "completion": completion, "label": label, **row.tools()}


_READERS: Mapping[DatasetFormat, Callable[[_Row], dict[str, Any]]] = MappingProxyType(
    {
        "messages": _messages,
        "sharegpt": _messages,
        "alpaca": _alpaca,
        "prompt_completion": _prompt_completion,
        "text": _plain_text,
        "preference": _preference,
        "kto": _kto,
    }
)
