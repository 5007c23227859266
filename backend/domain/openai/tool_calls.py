"""Calls of tools in an answer's text, in the forms that models write them.

Hermes and Qwen write `<tool_call>{"name": …, "arguments": …}</tool_call>`; Mistral a list of such objects behind
`[TOOL_CALLS]`; Llama 3 one object with `parameters`. A text in another form is an answer.
"""

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

_TAGGED = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|\Z)", re.DOTALL)
_BEFORE = re.compile(r"^\s*(?:\[TOOL_CALLS\]|<\|python_tag\|>)?\s*")


@dataclass(frozen=True)
class ToolCall:
    """A call. `arguments` is JSON."""

    name: str
    arguments: str


def read_tool_calls(text: str, names: Collection[str]) -> tuple[str, list[ToolCall]]:
    """Read the calls in an answer.

    Args:
        names: The tools that there are. What names another tool is no call.

    Returns:
        The text without the calls, and the calls. A call that is cut short stays in the text.
    """
    text, cut = _without_cut(text, names)
    tagged = _TAGGED.findall(text)
    if tagged:
        calls = [call for part in tagged for call in _calls(part, names)]
        return (_TAGGED.sub("", text).strip() + cut, calls) if len(calls) >= len(tagged) else (text + cut, [])
    calls = _calls(_BEFORE.sub("", text), names)
    return ("", calls) if calls else (text, [])


def _without_cut(text: str, names: Collection[str]) -> tuple[str, str]:
    """Return a text before a last call that was cut short behind others, and from there on."""
    at = text.rfind("<tool_call>")
    cut = text.find("<tool_call>") < at and "</tool_call>" not in text[at:]
    return (text[:at], text[at:]) if cut and not _calls(_TAGGED.findall(text[at:])[0], names) else (text, "")


def _calls(text: str, names: Collection[str]) -> list[ToolCall]:
    """Return the calls that a text consists of; none if it is anything else."""
    try:
        told = json.loads(text)
    except (ValueError, RecursionError):
        return []
    calls = [_call(item, names) for item in (told if isinstance(told, list) else [told])]
    return [call for call in calls if call is not None] if calls and None not in calls else []


def _call(told: Any, names: Collection[str]) -> ToolCall | None:
    if not isinstance(told, dict) or told.get("name") not in names:
        return None
    arguments = told.get("arguments", told.get("parameters", {}))
    return ToolCall(
        told["name"], arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    )
