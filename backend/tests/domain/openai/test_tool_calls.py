"""Calls of tools are read in the forms that models write them, and nothing else is taken for one."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.openai.tool_calls import ToolCall, read_tool_calls

ARGUMENTS = {"zone": "utc", "n": [1, None]}
CALL = ToolCall("now", json.dumps(ARGUMENTS))
WRITTEN = json.dumps({"name": "now", "arguments": ARGUMENTS})


@pytest.mark.parametrize(
    ("text", "rest", "calls"),
    [
        (f"<tool_call>\n{WRITTEN}\n</tool_call>", "", [CALL]),
        (
            f"Let me look.\n<tool_call>{WRITTEN}</tool_call>\n<tool_call>{WRITTEN}</tool_call>",
            "Let me look.",
            [CALL, CALL],
        ),
        (f"<tool_call>{WRITTEN}", "", [CALL]),
        (f"<tool_call>{WRITTEN}</tool_call>\n<tool_call>{WRITTEN[:9]}", f"<tool_call>{WRITTEN[:9]}", [CALL]),
        (f"<tool_call>{WRITTEN[:9]}", None, []),
        (f"[TOOL_CALLS][{WRITTEN}, {WRITTEN}]", "", [CALL, CALL]),
        (f"[{WRITTEN}]", "", [CALL]),
        (json.dumps({"name": "now", "parameters": ARGUMENTS}), "", [CALL]),
        (f"<|python_tag|>{WRITTEN}", "", [CALL]),
        (json.dumps({"name": "now"}), "", [ToolCall("now", "{}")]),
        (json.dumps({"name": "now", "arguments": "{}"}), "", [ToolCall("now", "{}")]),
        (json.dumps({"name": "later", "arguments": {}}), None, []),
        ("<tool_call>{not json}</tool_call>", None, []),
        (f"It is {WRITTEN}", None, []),
        ("[]", None, []),
        ("3", None, []),
    ],
)
def test_each_form(text: str, rest: str | None, calls: list[ToolCall]) -> None:
    assert read_tool_calls(text, ["now"]) == (text if rest is None else rest, calls)


@given(st.text())
def test_a_text_without_calls_stays_as_it_is(text: str) -> None:
    assert read_tool_calls(text, ["now"]) == (text, [])
