"""The answers of a long conversation are found in windows of it, and are those that are found in the whole."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import rendering
from engine.answer_span import Span
from engine.answer_windows import spans_by_windows
from engine.errors import BadData
from engine.rendering import ChatRenderer, _Chat
from tests.engine.test_rendering import CALL, FAMILIES, RESULT, SYSTEM, TOOL, answer, answers_of, user
from tests.support.chat_templates import WRITTEN, tokenizer_with

REGULAR = [turn for at in range(30) for turn in (user(f"你好{at}"), answer(f"άλφα{at}"))]
WITH_CALLS = [
    turn
    for at in range(30)
    for turn in (
        (user(f"你好{at}"), answer("", tool_calls=[CALL], reasoning_content="ρ"), RESULT, answer(f"δ{at}"))
        if at % 3 == 1
        else (user("你好"), answer("άλφα", reasoning_content=f"ρ{at}"))
    )
]


def chat_of(tokenizer: Any, messages: list[dict[str, Any]], tools: Any = None) -> _Chat:
    shape = ChatRenderer(tokenizer)._shape(0, messages, tools)
    return _Chat(tokenizer, 0, messages, tools, shape)


def both_ways(chat: _Chat) -> tuple[dict[int, Span] | None, Callable[[], dict[int, Span | None]]]:
    answers = [index for index, turn in enumerate(chat.messages) if turn["role"] == "assistant"]
    return spans_by_windows(chat, answers), lambda: {index: chat.span(index) for index in answers}


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("kind", ["regular", "with a system turn", "with calls and reasoning"])
def test_windows_find_what_the_whole_has(tiny_path: Path, family: str, kind: str) -> None:
    messages = {"regular": REGULAR, "with a system turn": [SYSTEM, *REGULAR], "with calls and reasoning": WITH_CALLS}
    tokenizer = tokenizer_with(tiny_path, FAMILIES[family])
    try:
        chat = chat_of(tokenizer, messages[kind], [TOOL] if "calls" in kind else None)
    except BadData:
        return  # the template takes no such conversation
    found, whole = both_ways(chat)
    if found is not None:
        assert found == whole()


def test_windows_suffice_in_most_families(tiny_path: Path) -> None:
    unsure = set()
    for family, template in FAMILIES.items():
        chat = chat_of(tokenizer_with(tiny_path, template), REGULAR)
        if both_ways(chat)[0] is None:
            unsure.add(family)
    assert unsure <= {"numbers its turns"}


pieces = st.sampled_from(
    ["<|im_end|>", "<|im_start|>assistant\n", "</think>", "<think>\n", "[/INST]", "\n\n", " ", "άλφα", "βήτα", "你好"]
)
words = st.lists(pieces, max_size=3).map("".join)
reasoned: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.just({}), words.map(lambda said: {"reasoning_content": said})
)
exchanges = st.one_of(
    st.tuples(words.map(user), st.builds(lambda said, more: answer(said, **more), words, reasoned)),
    st.builds(
        lambda asked, called, said, more: (
            user(asked),
            answer(called, tool_calls=[CALL], **more),
            RESULT,
            answer(said, **more),
        ),
        words,
        words,
        words,
        reasoned,
    ),
)
# A few kinds of exchanges that come again: the windows take a conversation only if it is regular.
rows = st.tuples(
    st.sampled_from([[], [SYSTEM], [answer("άλφα")]]),
    st.lists(exchanges, min_size=1, max_size=3),
    st.lists(st.integers(0, 2), min_size=28, max_size=32),
    st.one_of(st.none(), st.none(), st.integers(1, 40)),
)


@settings(max_examples=60)
@given(rows, st.sampled_from(sorted(FAMILIES)))
def test_both_ways_give_the_same(tiny_path: Path, row: tuple[Any, Any, Any, int | None], family: str) -> None:
    lead, drawn, order, system_at = row
    messages = [*lead, *(turn for at in order for turn in drawn[at % len(drawn)])]
    if system_at is not None:
        messages.insert(system_at, SYSTEM)
    try:
        chat = chat_of(tokenizer_with(tiny_path, FAMILIES[family]), messages, [TOOL])
    except BadData:
        return
    found, whole = both_ways(chat)
    if found is not None:
        assert found == whole()


@pytest.mark.parametrize("at", [0, 9, 30, 55])
@pytest.mark.parametrize(
    "odd",
    [
        answer(""),
        answer("</think>"),
        answer("<think>\n"),
        answer("<|im_end|>\n<|im_start|>assistant\nάλφα"),
        answer("άλφα", reasoning_content="ρ"),
        answer("άλφα29"),
    ],
)
@pytest.mark.parametrize("family", ["qwen3", "deepseek_r1_distill", "gptoss", "unsloth llama_template"])
def test_one_odd_answer_among_many_is_found_as_before(
    tiny_path: Path, family: str, odd: dict[str, Any], at: int
) -> None:
    messages = list(REGULAR)
    messages[at | 1] = odd
    found, whole = both_ways(chat_of(tokenizer_with(tiny_path, FAMILIES[family]), messages))
    if found is not None:
        assert found == whole()


def test_a_template_that_counts_its_turns_is_followed_in_the_whole(tiny_path: Path) -> None:
    """A window of it has other text, though no text that differs belongs to an answer."""
    tokenizer = tokenizer_with(tiny_path, FAMILIES["numbers its turns"])
    chat = chat_of(tokenizer, REGULAR)
    assert both_ways(chat)[0] is None
    spans = ChatRenderer(tokenizer).render(0, {"messages": REGULAR}, answers_of(REGULAR)).spans
    assert spans == both_ways(chat)[1]()


def test_system_turns_that_a_template_gathers_are_followed_in_the_whole(tiny_path: Path) -> None:
    messages = list(REGULAR)
    messages.insert(30, SYSTEM)
    chat = chat_of(tokenizer_with(tiny_path, FAMILIES["granite"]), messages)
    assert both_ways(chat)[0] is None


@pytest.mark.parametrize(
    "header",
    [
        # The windows before the call do not have it.
        "{% if messages | selectattr('role', 'equalto', 'tool') | list %}[tools]{% endif %}",
        # No window has it, nor has the whole: only the beginnings of the whole that end at some answers.
        "{% if 25 < messages | length < 50 %}[long]{% endif %}",
    ],
)
def test_what_far_turns_change_is_followed_in_the_whole(tiny_path: Path, header: str) -> None:
    messages = [*REGULAR[:50], user("你好"), answer("γ"), RESULT, answer("δ"), *REGULAR[50:]]
    chat = chat_of(tokenizer_with(tiny_path, header + WRITTEN["granite"]), messages)
    found, whole = both_ways(chat)
    assert found is None
    assert len({span.cuts_start for span in whole().values() if span is not None}) == 2


def test_text_that_differs_between_the_compared_answers_is_seen(tiny_path: Path) -> None:
    """Two answers are a character further on, and all behind them are not."""
    template = (
        "{% for m in messages %}{{ {26: '--', 30: ''}.get(loop.index0, '-') + m['role'] + ':' + m['content'] }}</end>"
        "{% endfor %}{% if add_generation_prompt %}-assistant:{% endif %}"
    )
    chat = chat_of(tokenizer_with(tiny_path, template), REGULAR)
    assert both_ways(chat)[0] is None


class Counter:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        apply = rendering._apply

        def counted(tokenizer: Any, messages: list[dict[str, Any]], tools: Any, *, prompt: bool = False) -> str:
            self.sizes.append(len(messages))
            return apply(tokenizer, messages, tools, prompt=prompt)

        monkeypatch.setattr(rendering, "_apply", counted)

    def take(self) -> list[int]:
        sizes, self.sizes = self.sizes, []
        return sizes


@pytest.mark.parametrize("family", ["qwen3", "llama3", "gptoss", "fallback"])
def test_the_turns_rendered_grow_with_the_conversation(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    renderer = ChatRenderer(tokenizer_with(tiny_path, FAMILIES[family]))
    counter = Counter(monkeypatch)
    long = {}
    for turns in (500, 2000):
        messages = [(user, answer)[at % 2](f"άλφα{at}") for at in range(turns)]
        renderer.render(0, {"messages": messages}, answers_of(messages))
        sizes = counter.take()
        long[turns] = sum(size > 40 for size in sizes)
        assert sum(size for size in sizes if size <= 40) < 60 * turns
    assert long[2000] == long[500] < 40


def test_two_renderings_tell_that_nothing_is_left_out(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    renderer = ChatRenderer(tokenizer_with(tiny_path, FAMILIES["qwen3"]))
    counter = Counter(monkeypatch)
    messages = [(user, answer)[at % 2](f"w{at}") for at in range(2000)]
    assert renderer.left_out(0, {"messages": messages}) == set()
    assert len(counter.take()) == 2


@settings(max_examples=40)
@given(rows, st.sampled_from(sorted(FAMILIES)))
def test_what_is_left_out_is_what_each_turn_alone_tells(
    tiny_path: Path, row: tuple[Any, Any, Any, int | None], family: str
) -> None:
    lead, drawn, _, system_at = row
    messages = [*lead, *(turn for exchange in drawn for turn in exchange)]
    if system_at is not None:
        messages.insert(min(system_at, len(messages) - 1), SYSTEM)
    try:
        chat = chat_of(tokenizer_with(tiny_path, FAMILIES[family]), messages, [TOOL])
        alone = {turn["role"] for index, turn in enumerate(messages) if chat.leaves_out(index)}
    except BadData:
        return
    assert chat.left_out_roles() == alone
