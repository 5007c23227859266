"""Which tokens are learned, for the templates of many families.

What users say here is Chinese, what tools and the system say is Cyrillic, and what is to be learned is Greek: no
template has any of it, so that what was learned can be told from what was not without knowing the template.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from engine.batches import FALLBACK_TEMPLATE, RowTokenizer
from engine.errors import BadData
from engine.rendering import _TEMPLATE_ERRORS, ChatRenderer, _apply, _shaped
from engine.rows import IGNORED
from tests.support.chat_templates import WRITTEN, tokenizer_with, trl_templates, unsloth_templates

MARKED = trl_templates(with_marks=True)
# Made for a model that does not learn token by token.
NOT_CAUSAL = {"diffusion_gemma", "diffusion_gemma_training"}
FAMILIES = {
    name: template
    for name, template in {
        **trl_templates(with_marks=False),
        **unsloth_templates(),
        **MARKED,
        **WRITTEN,
        "fallback": FALLBACK_TEMPLATE,
    }.items()
    if name not in NOT_CAUSAL
}
CALL = {"type": "function", "id": "abcdefgh1", "function": {"name": "get", "arguments": {"x": "γάμμα"}}}
TOOL = {
    "type": "function",
    "function": {
        "name": "get",
        "description": "получить",
        "parameters": {
            "type": "object",
            "properties": {"x": {"type": "string", "description": "икс"}},
            "required": ["x"],
        },
    },
}


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def answer(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


RESULT = {"role": "tool", "content": "результат", "name": "get", "tool_call_id": "abcdefgh1"}
SYSTEM = {"role": "system", "content": "будь добр"}
CHATS = {
    "one turn": [user("你好"), answer("άλφα")],
    "with a system prompt": [SYSTEM, user("你好"), answer("άλφα")],
    "three turns": [user("你好"), answer("άλφα"), user("再見"), answer("βήτα"), user("你好"), answer("άλφα")],
}
WITH_TOOLS = [user("你好"), answer("", tool_calls=[CALL]), RESULT, answer("δέλτα"), user("再見"), answer("άλφα")]


def texts(tokenizer: Any, row: dict[str, Any], train_on: str = "assistant") -> tuple[str, str]:
    """What is learned of a row, and what is not."""
    tokenized = RowTokenizer(tokenizer, train_on, 10_000).whole(0, row)
    learned = [token for token, label in zip(tokenized.ids, tokenized.labels, strict=True) if label != IGNORED]
    rest = [token for token, label in zip(tokenized.ids, tokenized.labels, strict=True) if label == IGNORED]
    return tokenizer.decode(learned), tokenizer.decode(rest)


def answers_of(messages: list[dict[str, Any]]) -> list[int]:
    return [index for index, turn in enumerate(messages) if turn["role"] == "assistant"]


def letters(script: str, text: str) -> str:
    return "".join(re.findall({"greek": r"[\u0370-\u03ff]", "others": r"[\u0400-\u04ff\u4e00-\u9fff]"}[script], text))


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("chat", sorted(CHATS))
def test_all_answers_are_learned_and_nothing_else_that_anybody_says(tiny_path: Path, family: str, chat: str) -> None:
    tokenizer = tokenizer_with(tiny_path, FAMILIES[family])
    row = {"messages": CHATS[chat]}
    try:
        learned, rest = texts(tokenizer, row)
    except BadData as refusal:
        # Some templates raise on system prompts; that is told, and in its own words.
        assert chat == "with a system prompt" and re.search("(?i)system|roles|alternate|supported", refusal.message)
        return
    said = "".join(turn["content"] for turn in row["messages"] if turn["role"] == "assistant")
    assert letters("greek", learned) == said
    assert letters("greek", rest) == letters("others", learned) == ""
    first, _ = texts(tokenizer, row, "last_assistant")
    assert letters("greek", first) == row["messages"][-1]["content"]


GREETED = {
    "greeting": [answer("άλφα"), user("你好"), answer("βήτα")],
    "greeting behind a system turn": [SYSTEM, answer("άλφα"), user("你好"), answer("βήτα")],
    "system turn in the middle": [user("你好"), answer("άλφα"), SYSTEM, user("再見"), answer("βήτα")],
    "system turn before an answer": [user("你好"), answer("άλφα"), user("再見"), SYSTEM, answer("βήτα")],
}


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("chat", sorted(GREETED))
def test_greetings_and_later_system_turns_are_masked_rightly_or_refused(
    tiny_path: Path, family: str, chat: str
) -> None:
    tokenizer = tokenizer_with(tiny_path, FAMILIES[family])
    row = {"messages": GREETED[chat]}
    shape = ChatRenderer(tokenizer)._shape(0, row["messages"], None)
    try:
        whole = _apply(tokenizer, _shaped(row["messages"], shape), None)
    except _TEMPLATE_ERRORS:
        with pytest.raises(BadData, match="the model's chat template refuses it: "):
            texts(tokenizer, row)
        return
    learned, rest = texts(tokenizer, row)
    # A few templates leave out what they do not expect; the analysis says so.
    said = "".join(
        turn["content"] for turn in row["messages"] if turn["role"] == "assistant" and turn["content"] in whole
    )
    assert letters("greek", learned) == said
    assert letters("greek", rest) == letters("others", learned) == ""
    unlearned = {"messages": [{**turn, "weight": 0} if turn["content"] == "άλφα" else turn for turn in row["messages"]]}
    assert letters("greek", texts(tokenizer, unlearned)[0]) == "βήτα"


def test_the_end_mark_of_a_greeting_is_learned(tiny_path: Path) -> None:
    """A template that looks at its first turn cannot render the nothing before a greeting."""
    template = (
        "{% if messages[0]['role'] == 'system' %}{{ '' }}{% endif %}{% for m in messages %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    renderer = ChatRenderer(tokenizer_with(tiny_path, template))
    messages = GREETED["greeting"]
    rendered = renderer.render(0, {"messages": messages}, answers_of(messages))
    spans = [span for span in rendered.spans.values() if span is not None]
    assert [rendered.text[span.start : span.end] for span in spans] == ["άλφα<|im_end|>", "βήτα<|im_end|>"]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_tool_calls_are_learned_or_the_row_is_refused(tiny_path: Path, family: str) -> None:
    tokenizer = tokenizer_with(tiny_path, FAMILIES[family])
    try:
        learned, rest = texts(tokenizer, {"messages": WITH_TOOLS, "tools": [TOOL]})
    except BadData as refusal:
        assert "row 1: the model's chat template" in refusal.message
        return
    # Some templates write tools with their letters escaped.
    assert letters("greek", learned) in ("γάμμαδέλταάλφα", "δέλταάλφα")
    assert "get" in learned
    assert letters("greek", rest) == letters("others", learned) == ""


def test_most_families_take_tools(tiny_path: Path) -> None:
    taken = 0
    for template in FAMILIES.values():
        try:
            texts(tokenizer_with(tiny_path, template), {"messages": WITH_TOOLS, "tools": [TOOL]})
            taken += 1
        except BadData:
            pass
    assert taken >= 30


@pytest.mark.parametrize("family", sorted(set(MARKED) - NOT_CAUSAL))
@pytest.mark.parametrize("chat", [*sorted(CHATS), "tools"])
def test_the_ends_are_where_marks_for_training_have_them(tiny_path: Path, family: str, chat: str) -> None:
    """The marks begin before or behind the generation prompt, as their authors saw fit; the ends leave no choice."""
    tokenizer = tokenizer_with(tiny_path, MARKED[family])
    messages, tools = (WITH_TOOLS, [TOOL]) if chat == "tools" else (CHATS[chat], None)
    renderer = ChatRenderer(tokenizer)
    try:
        rendered = renderer.render(0, {"messages": messages, "tools": tools}, answers_of(messages))
    except BadData:
        return  # the tests above see to refusals
    (text,), (marks,) = render_jinja_template(
        [_shaped(messages, renderer._shape(0, messages, tools))],
        tools=tools,
        chat_template=MARKED[family],
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    assert text == rendered.text
    ends = [low + len(text[low:high].rstrip()) for low, high in marks if text[low:high].strip()]
    for index, span in rendered.spans.items():
        assert span is not None, index
        mark = span.end if not span.cuts_end else max(end for end in ends if end - span.end < len("<|end|>"))
        # gpt-oss ends a turn with one mark when it is said and with another when it is history.
        assert mark in ends and text[span.end : mark] in ("", "end|>"), (text[span.start : span.end], marks)
        assert text[span.end - 1] != "\n"


@pytest.mark.parametrize(
    ("family", "learned"),
    [
        ("qwen3", ["άλφα<|im_end|>", "βήτα<|im_end|>", "<think>\n\n</think>\n\nάλφα<|im_end|>"]),
        ("qwen2_5", ["άλφα<|im_end|>", "βήτα<|im_end|>", "άλφα<|im_end|>"]),
        (
            "deepseek_r1_distill",
            ["άλφα<｜end▁of▁sentence｜>", "βήτα<｜end▁of▁sentence｜>", "άλφα<｜end▁of▁sentence｜>"],
        ),
        ("llama3_2", ["άλφα<|eot_id|>", "βήτα<|eot_id|>", "άλφα<|eot_id|>"]),
        ("gemma", ["άλφα<end_of_turn>", "βήτα<end_of_turn>", "άλφα<end_of_turn>"]),
        ("phi3", ["άλφα<|end|>", "βήτα<|end|>", "άλφα<|end|>\n</s>"]),
        (
            "gptoss",
            [
                "<|channel|>final<|message|>άλφα",
                "<|channel|>final<|message|>βήτα",
                "<|channel|>final<|message|>άλφα<|return|>",
            ],
        ),
        ("unsloth mistral_template", ["άλφα</s>", "βήτα</s>", "άλφα</s>"]),
        ("unsloth llama_template", [" άλφα </s>", " βήτα </s>", " άλφα </s>"]),
        ("unsloth vicuna_template", [" άλφα</s>", " βήτα</s>", " άλφα</s>"]),
        ("exaone", ["άλφα[|endofturn|]", "βήτα[|endofturn|]", "άλφα[|endofturn|]"]),
        ("rewrites every turn but the last", ["άλφα<|end|>", "βήτα<|end|>", "final: άλφα<|end|>"]),
    ],
)
def test_what_exactly_is_learned(tiny_path: Path, family: str, learned: list[str]) -> None:
    tokenizer = tokenizer_with(tiny_path, FAMILIES[family])
    assert texts(tokenizer, {"messages": CHATS["three turns"]})[0] == "".join(learned)


def test_a_call_behind_reasoning_that_a_template_strips_is_still_found(tiny_path: Path) -> None:
    """Qwen3 drops the reasoning of all turns before the last question, so nothing that is cut short looks the same."""
    tokenizer = tokenizer_with(tiny_path, FAMILIES["qwen3"])
    turns = [turn | ({"reasoning_content": "ρ"} if turn["role"] == "assistant" else {}) for turn in WITH_TOOLS]
    learned, rest = texts(tokenizer, {"messages": turns, "tools": [TOOL]})
    assert learned == (
        '<tool_call>\n{"name": "get", "arguments": {"x": "γάμμα"}}\n</tool_call><|im_end|>δέλτα<|im_end|>'
        "<think>\nρ\n</think>\n\nάλφα<|im_end|>"
    )
    assert letters("greek", rest) == ""


@pytest.mark.parametrize("family", ["qwen3", "llama3", "gemma", "no marks at all", "gptoss", "unsloth llama_template"])
def test_weight_0_is_not_learned_whatever_else_is(tiny_path: Path, family: str) -> None:
    tokenizer = tokenizer_with(tiny_path, FAMILIES[family])
    turns = [user("你好"), answer("άλφα", weight=0), user("再見"), answer("βήτα")]
    assert letters("greek", texts(tokenizer, {"messages": turns})[0]) == "βήτα"
    everything, rest = texts(tokenizer, {"messages": turns}, "all")
    assert (letters("greek", everything), letters("greek", rest)) == ("βήτα", "άλφα")
    assert letters("others", everything) == "你好再見"
    last = [*turns[:3], answer("βήτα", weight=0)]
    assert texts(tokenizer, {"messages": last}, "last_assistant")[0] == ""


marks = st.sampled_from(["<|im_end|>", "<|im_start|>assistant\n", "</think>", "[/INST]", "<|assistant|>", "\n\n", " "])
saying = st.lists(st.one_of(marks, st.text("你好再見們", min_size=1, max_size=4)), min_size=1, max_size=4).map("".join)
replying = st.lists(st.one_of(marks, st.text("αβγδε", min_size=1, max_size=4)), min_size=1, max_size=4).map("".join)


@given(
    st.lists(st.tuples(saying.filter(str.strip), replying.filter(str.strip)), min_size=1, max_size=3),
    st.sampled_from(["qwen2_5", "qwen3_instruct_2507", "llama3", "phi3", "granite", "kimi", "fallback", "cohere"]),
)
def test_nothing_that_is_said_can_pass_for_a_mark(tiny_path: Path, pairs: list[tuple[str, str]], family: str) -> None:
    tokenizer = tokenizer_with(tiny_path, FAMILIES[family])
    learned, rest = texts(tokenizer, {"messages": [turn for q, a in pairs for turn in (user(q), answer(a))]})
    assert letters("greek", learned) == letters("greek", "".join(reply for _, reply in pairs))
    assert letters("greek", rest) == letters("others", learned) == ""
    assert letters("others", rest) == letters("others", "".join(question for question, _ in pairs))


def test_what_a_template_will_not_take_is_told_by_row(tiny_path: Path) -> None:
    renderer = ChatRenderer(tokenizer_with(tiny_path, FAMILIES["gemma"]))
    with pytest.raises(BadData, match="row 5: the model's chat template refuses it: System role not supported"):
        renderer.render(4, {"messages": CHATS["with a system prompt"]}, [2])
    with pytest.raises(BadData, match=r"row 1: .*refuses it: Conversation roles must alternate"):
        renderer.render(0, {"messages": [user("你好"), user("你好"), answer("άλφα")]}, [2])
    with pytest.raises(BadData, match=r"leaves tool calls out"):
        texts(tokenizer_with(tiny_path, FAMILIES["llama3"]), {"messages": WITH_TOOLS, "tools": [TOOL]}, "all")


def test_an_answer_that_a_template_drops_teaches_nothing(tiny_path: Path) -> None:
    template = "{% for m in messages %}{% if not loop.first and m['role'] == 'assistant' and loop.index < 3 %}" + (
        "{% else %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endif %}{% endfor %}<|assistant|>"
    )
    rendered = ChatRenderer(tokenizer_with(tiny_path, template)).render(0, {"messages": CHATS["three turns"]}, [1, 3])
    assert rendered.spans[1] is None and rendered.spans[3] is not None


def test_the_row_that_is_read_is_left_as_it_is(tiny_path: Path) -> None:
    row = {"messages": WITH_TOOLS, "tools": [TOOL]}
    kept = json.dumps(row)
    texts(tokenizer_with(tiny_path, FAMILIES["deepseekv3"]), row)
    assert json.dumps(row) == kept
