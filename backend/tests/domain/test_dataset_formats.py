"""Rows to conversations."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.dataset_formats import RowRejected, detect, to_messages

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def _read(row: dict[str, Any]) -> list[dict[str, str]]:
    detection = detect(list(row))
    assert detection is not None
    return to_messages(row, detection)


@pytest.mark.parametrize(
    ("row", "contents"),
    [
        ({"messages": [USER, ANSWER]}, ["q", "a"]),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, ["q", "a"]),
        ({"instruction": "i", "input": "x", "output": "o"}, ["i\n\nx", "o"]),
        ({"instruction": "i", "input": "", "output": "o"}, ["i", "o"]),
        ({"instruction": "i", "output": "o", "system": "s"}, ["s", "i", "o"]),
        ({"prompt": "p", "completion": "c"}, ["p", "c"]),
        ({"question": "p", "answer": "c"}, ["p", "c"]),
    ],
)
def test_known_shapes_are_recognised(row: dict[str, Any], contents: list[str]) -> None:
    assert [message["content"] for message in _read(row)] == contents


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": None}, "null"),
        ({"messages": []}, "no turns"),
        ({"messages": [USER]}, "no assistant turn"),
        ({"messages": [USER, ANSWER, USER]}, "no answer"),
        ({"messages": [ANSWER]}, "no question"),
        ({"messages": [USER, {"role": "system", "content": "s"}, ANSWER]}, "only come first"),
        ({"messages": [USER, {"role": "wizard", "content": "a"}]}, "wizard"),
        ({"messages": [USER, {"role": "assistant", "content": 5}]}, "a number, not text"),
        ({"messages": [USER, {"role": "assistant", "content": "  "}]}, "is empty"),
        ({"messages": [USER, {**ANSWER, "tool_calls": [1]}]}, "tool_calls"),
        ({"messages": ["hello"]}, "not an object"),
        ({"instruction": "i", "output": None}, "'output' is missing"),
        ({"instruction": "i", "output": ["o"]}, "a list, not text"),
        ({"instruction": "\ud800", "output": "o"}, "surrogate"),
    ],
)
def test_a_refusal_says_what_is_wrong(row: dict[str, Any], words: str) -> None:
    with pytest.raises(RowRejected, match=words):
        _read(row)


@given(
    st.dictionaries(
        st.sampled_from(["messages", "instruction", "input", "output"]),
        st.recursive(
            st.one_of(st.none(), st.booleans(), st.floats(), st.text(), st.sampled_from(["user", "assistant"])),
            lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.sampled_from(["role", "content", "x"]), inner)),
        ),
    )
)
def test_any_row_is_a_conversation_that_ends_with_an_answer_or_is_refused(row: dict[str, Any]) -> None:
    detection = detect(list(row))
    if detection is None:
        return
    try:
        messages = to_messages(row, detection)
    except RowRejected:
        return
    assert messages[-1]["role"] == "assistant"
    assert json.loads(json.dumps(messages)) == messages
