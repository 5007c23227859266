"""Rows to what is trained on."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.datasets.detection import NotRecognised, settle
from domain.datasets.formats import FORMATS, normalise
from domain.datasets.turns import RowRejected
from domain.peft.objectives import SPECS as OBJECTIVES

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


def read(row: dict[str, Any], **more: Any) -> dict[str, Any]:
    values = {"format_": None, "column_map": {}} | more
    return dict(json.loads(normalise(row, settle([row], **values)).line))


def notes(row: dict[str, Any]) -> set[str]:
    return set(normalise(row, settle([row], None, {})).notes)


def chat(*contents: str) -> dict[str, Any]:
    roles = ("user", "assistant") * len(contents)
    return {"messages": [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]}


@pytest.mark.parametrize(
    ("row", "format_", "normal"),
    [
        ({"messages": [USER, ANSWER]}, "messages", chat("q", "a")),
        ({"conversations": [USER, ANSWER]}, "messages", chat("q", "a")),
        ({"messages": json.dumps([USER, ANSWER])}, "messages", chat("q", "a")),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            "sharegpt",
            chat("q", "a"),
        ),
        ({"instruction": "i", "input": "x", "output": "o"}, "alpaca", chat("i\n\nx", "o")),
        ({"instruction": "i", "input": "", "output": "o"}, "alpaca", chat("i", "o")),
        ({"instruction": "", "input": "x", "output": "o"}, "alpaca", chat("x", "o")),
        (
            {"instruction": "i", "output": "o", "history": [["q", "a"]]},
            "alpaca",
            chat("q", "a", "i", "o"),
        ),
        ({"instruction": "i", "context": "x", "response": "o", "category": "c"}, "alpaca", chat("i\n\nx", "o")),
        ({"prompt": "p", "completion": "c"}, "prompt_completion", chat("p", "c")),
        ({"prompt": [USER], "completion": [ANSWER]}, "prompt_completion", chat("q", "a")),
        ({"prompt": [USER], "completion": "a"}, "prompt_completion", chat("q", "a")),
        ({"question": "p", "answer": "c"}, "prompt_completion", chat("p", "c")),
        ({"question": "p", "context": "x", "answer": "c"}, "prompt_completion", chat("p\n\nx", "c")),
        ({"text": "t", "url": "u"}, "text", {"text": "t"}),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b"},
            "preference",
            {"prompt": [USER], "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "b"}]},
        ),
        (
            {"chosen": [USER, ANSWER], "rejected": [USER, {**ANSWER, "content": "b"}]},
            "preference",
            {"prompt": [USER], "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "b"}]},
        ),
        (
            {"prompt": "q", "completion": "a", "label": False},
            "kto",
            {"prompt": [USER], "completion": [ANSWER], "label": False},
        ),
        (
            {"messages": [USER, ANSWER], "label": True},
            "kto",
            {"prompt": [USER], "completion": [ANSWER], "label": True},
        ),
    ],
)
def test_known_shapes_are_recognised(row: dict[str, Any], format_: str, normal: dict[str, Any]) -> None:
    reading = settle([row], None, {})
    assert (reading.format, read(row)) == (format_, normal)
    named = reading.evidence.split("'")[1]
    assert named in row


def test_a_system_prompt_goes_first_whichever_way_it_comes() -> None:
    system = {"role": "system", "content": "s"}
    assert read({"instruction": "i", "output": "o", "system": "s"})["messages"][0] == system
    assert read({"system_prompt": "s", "question": "i", "response": "o"})["messages"][0] == system
    assert read({"messages": [{"role": "developer", "content": "s"}, USER, ANSWER]})["messages"][0] == system
    assert read({"messages": [system, USER, ANSWER], "system": "s"})["messages"] == [system, USER, ANSWER]
    with pytest.raises(RowRejected, match="they differ"):
        read({"messages": [system, USER, ANSWER], "system": "other"})


@pytest.mark.parametrize(
    "calling",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]},
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"role": "assistant", "content": [{"type": "tool_call", "value": '{"name": "f", "arguments": {"x": 1}}'}]},
    ],
)
@pytest.mark.parametrize("tools", [[TOOL], [TOOL["function"]], json.dumps([TOOL])])
def test_tool_calls_of_every_kind_are_one_kind(calling: dict[str, Any], tools: Any) -> None:
    answered = {"role": "function", "content": "2"} if "role" in calling else {"from": "observation", "value": "2"}
    asked = USER if "role" in calling else {"from": "human", "value": "q"}
    said = ANSWER if "role" in calling else {"from": "gpt", "value": "a"}
    row = read({"conversations": [asked, calling, answered, said], "tools": tools})
    assert row == {
        "messages": [
            USER,
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "2"},
            ANSWER,
        ],
        "tools": [TOOL],
    }


def test_reasoning_is_kept_apart_from_the_answer() -> None:
    parts = [{"type": "reasoning", "value": "hm"}, {"type": "text", "value": "a"}]
    assert read({"messages": [USER, {"role": "assistant", "content": parts}]})["messages"][1] == {
        "role": "assistant",
        "content": "a",
        "reasoning_content": "hm",
    }


@pytest.mark.parametrize("given", [{"weight": 0}, {"loss_weight": 0.0}, {"train": False}])
def test_an_answer_that_must_not_be_learned_is_marked(given: dict[str, Any]) -> None:
    row = {"messages": [USER, {**ANSWER, **given}, USER, {**ANSWER, "weight": 1}]}
    assert [turn.get("weight") for turn in read(row)["messages"]] == [None, 0, None, None]
    assert normalise(row, settle([row], None, {})).learnable == (True, True)
    row = {"messages": [USER, ANSWER, USER, {**ANSWER, **given}]}
    assert normalise(row, settle([row], None, {})).learnable == (True, False)
    row = {"messages": [{**USER, "weight": 0}, {**ANSWER, **given}]}
    assert normalise(row, settle([row], None, {})).learnable == (False, False)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": [None]}, "null"),
        ({"messages": [USER]}, "no assistant turn"),
        ({"messages": [USER, ANSWER, USER]}, "no answer"),
        ({"messages": [ANSWER]}, "no question"),
        ({"messages": [USER, {"role": "wizard", "content": "a"}]}, "wizard"),
        ({"messages": [USER, {"role": "assistant", "content": 5}]}, "a number, not text"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "null, not text"),
        ({"messages": [USER, {"role": "assistant", "content": "  "}]}, "is empty"),
        ({"messages": [USER, {**ANSWER, "tool_calls": [1]}]}, "tool_calls is no tool call"),
        ({"messages": [USER, {**ANSWER, "tool_calls": [{"name": "f", "arguments": "{"}]}]}, "not JSON"),
        ({"messages": [{**USER, "tool_calls": [CALL]}, ANSWER]}, "a user turn with tool calls"),
        ({"messages": [USER, {**ANSWER, "content": [{"type": "image_url"}]}]}, "'image_url'"),
        ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, "0 or 1"),
        ({"messages": [USER, {**ANSWER, "weight": True}]}, "0 or 1"),
        ({"messages": [{**USER, "weight": 1}, ANSWER]}, "only answers can carry loss"),
        ({"messages": ["hello"]}, "not an object"),
        ({"messages": [USER, ANSWER], "tools": [{"a": 1}]}, "no tool"),
        ({"messages": [USER, ANSWER], "tools": [{"name": "f", "default": float("inf")}]}, "not finite"),
        ({"instruction": "i", "output": "", "input": "x"}, "'output' is empty"),
        ({"instruction": "i", "output": ["o"]}, "a list, not text"),
        ({"instruction": "i", "output": "o", "history": ["q"]}, "not a pair"),
        ({"instruction": "\ud800", "output": "o"}, "surrogate"),
        ({"prompt": [USER, ANSWER], "completion": "c"}, "ends with an answer"),
        ({"chosen": "a", "rejected": "b"}, "no prompt"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "no preference"),
        ({"prompt": "other", "chosen": [USER, ANSWER], "rejected": [USER, {**ANSWER, "content": "b"}]}, "other turns"),
    ],
)
def test_a_refusal_says_what_is_wrong(row: dict[str, Any], words: str) -> None:
    with pytest.raises(RowRejected, match=words):
        read(row)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "p", "text": "long enough", "id": "1"}, '"completion": "text"'),
        ({"instruction": "i"}, "nothing to learn from"),
        ({"instruction": "i", "instances": [{"input": "x", "output": "o"}]}, "instances.0.output"),
        ({"output": "o", "source": "s"}, '"prompt": "source"'),
        ({"prompt": "p", "answer": "a", "completion": "b"}, "several could be"),
        ({"label": 1, "review": "r"}, "not recognised"),
        ({"data": [{"prompt": "p", "completion": "c"}]}, "the list 'data'"),
    ],
)
def test_what_is_not_recognised_gets_advice(row: dict[str, Any], words: str) -> None:
    with pytest.raises(NotRecognised, match=words):
        settle([row], None, {})


def test_columns_are_mapped_by_hand_into_nested_values_too() -> None:
    row = {"instruction": "i", "instances": [{"input": "x", "output": "o"}]}
    mapping = {"instruction": "instruction", "input": "instances.0.input", "output": "instances.0.output"}
    assert read(row, column_map=mapping) == chat("i\n\nx", "o")
    with pytest.raises(NotRecognised, match="column_map names"):
        read(row, column_map={"prompt": "nothing", "completion": "instruction"})
    with pytest.raises(NotRecognised, match="fields"):
        read(row, column_map={"wrong": "instruction"})
    with pytest.raises(NotRecognised, match="lack"):
        read(row, format_="preference")


def test_a_column_that_only_later_rows_have_is_read() -> None:
    rows = [{"instruction": "i", "output": "o"}, {"instruction": "i", "output": "o", "system": "s"}]
    reading = settle(rows[:1], None, {})
    assert json.loads(normalise(rows[1], reading).line)["messages"][0]["role"] == "system"


def test_what_is_kept_but_odd_is_noted() -> None:
    assert "two turns of one role" in str(notes({"messages": [USER, USER, ANSWER]}))
    assert "no call before" in str(notes({"messages": [USER, ANSWER, {"role": "tool", "content": "x"}, ANSWER]}))
    assert "'mood'" in str(notes({"messages": [USER, {**ANSWER, "mood": "good"}]}))
    system = {"role": "system", "content": "s"}
    assert "begin with an answer" in str(notes({"messages": [system, ANSWER, USER, ANSWER]}))
    assert "begin with an answer" in str(notes({"messages": [ANSWER, USER, ANSWER]}))
    assert "system turn behind the first" in str(notes({"messages": [USER, system, ANSWER]}))
    assert notes({"messages": [system, USER, ANSWER]}) == set()
    empty = {"role": "system", "content": ""}
    assert "empty system turn" in str(notes({"messages": [empty, USER, ANSWER]}))
    assert read({"messages": [empty, USER, ANSWER]}) == chat("q", "a")


SPACED = "    def f(self):\n        return 1\n"


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        ({"instruction": "Fix", "input": SPACED, "output": SPACED}, f"Fix\n\n{SPACED}"),
        ({"instruction": "Fix", "context": SPACED, "response": SPACED}, f"Fix\n\n{SPACED}"),
        ({"instruction": SPACED, "input": " ", "output": SPACED}, SPACED),
        ({"prompt": "Fix", "context": SPACED, "completion": SPACED}, f"Fix\n\n{SPACED}"),
        ({"prompt": SPACED, "system": SPACED, "completion": SPACED}, SPACED),
        ({"messages": [{"role": "user", "content": SPACED}, {"role": "assistant", "content": SPACED}]}, SPACED),
    ],
)
def test_the_space_around_what_was_written_is_kept(row: dict[str, Any], asked: str) -> None:
    turns = read(row)["messages"]
    assert [turn["content"] for turn in turns] == ([SPACED] if "system" in row else []) + [asked, SPACED]


@given(
    st.dictionaries(
        st.sampled_from(["messages", "instruction", "input", "output", "tools", "chosen", "rejected", "text", "label"]),
        st.recursive(
            st.one_of(st.none(), st.booleans(), st.floats(), st.text(), st.sampled_from(["user", "assistant"])),
            lambda inner: st.one_of(
                st.lists(inner),
                st.dictionaries(st.sampled_from(["role", "content", "tool_calls", "weight", "name", "type"]), inner),
            ),
        ),
    ),
    st.sampled_from([None, *FORMATS]),
)
def test_any_row_becomes_something_that_can_be_learned_or_is_refused(row: dict[str, Any], format_: Any) -> None:
    try:
        reading = settle([row], format_, {})
        normal = json.loads(normalise(row, reading).line)
    except (NotRecognised, RowRejected):
        return
    if reading.format in OBJECTIVES["sft"].formats and reading.format != "text":
        assert normal["messages"][-1]["role"] == "assistant"
    # What is normal stays as it is.
    again = settle([normal], None, {})
    assert json.loads(normalise(normal, again).line) == normal


def test_a_column_that_cannot_be_told_is_mapped_by_the_advices_example() -> None:
    row = {"prompt": "def f():", "canonical_solution": "return 1", "test": "assert f() == 1 and f() is not None"}
    with pytest.raises(NotRecognised) as refusal:
        read(row)
    assert 'column_map={"prompt": "prompt", "completion": "canonical_solution"}' in str(refusal.value)
    read(row, column_map={"prompt": "prompt", "completion": "canonical_solution"})
