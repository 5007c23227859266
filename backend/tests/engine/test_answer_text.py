"""An answer is one decode of all its tokens, and what is streamed are the differences of that."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.answer_text import AnswerText
from tests.engine.tokenizer_kinds import CORPUS, KINDS, byte_level, llama2_style

TOKENIZERS = {name: make() for name, make in KINDS.items()}
PARTS = [
    "def f(x):",
    "\n",
    "    ",
    " ",
    "  ",
    "return",
    "the",
    " .",
    ",",
    " isn't",
    "10",
    "é",
    "日本語",
    "😀",
    "\t",
    "▁",
    "�",
]
TEXTS = st.lists(st.sampled_from([*PARTS, *CORPUS]), max_size=12).map("".join) | st.text(max_size=30)


def collected(
    tokenizer: Any, ids: list[int], stop: list[str], ends: list[int] | None = None
) -> tuple[AnswerText, list[str]]:
    """Add tokens one at a time, as a model writes them, until the answer has ended."""
    answer, pieces = AnswerText(tokenizer, stop, ends or []), []
    for token in ids:
        pieces.append(answer.add([token]))
        if answer.ended:
            break
    return answer, [*pieces, answer.finish()]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(text=TEXTS)
def test_pieces_are_the_differences_of_the_whole_text(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    answer, pieces = collected(tokenizer, ids, [])
    assert answer.text == "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(
    text=TEXTS,
    stop=st.lists(st.sampled_from(["\n", "the", "return", " .", "x", "日本", "  ", "22"]), min_size=1, max_size=3),
)
def test_nothing_from_a_stop_text_on_is_sent(kind: str, text: str, stop: list[str]) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    answer, pieces = collected(tokenizer, ids, stop)
    assert answer.text == "".join(pieces) and not any(mark in answer.text for mark in stop)
    assert answer.stopped or answer.text == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_answer_is_decoded_as_one_too(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    text = "\n".join(f"{number} {line} 日本語 😀" for number, line in enumerate(CORPUS * 20))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    answer, pieces = collected(tokenizer, ids, ["never said"])
    assert len(ids) > 1000 and answer.text == "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
    answer, pieces = collected(tokenizer, [*ids, tokenizer.convert_tokens_to_ids("<|im_end|>"), *ids], ["<|im_end|>"])
    assert answer.text == "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_tokenizer_that_strips_at_the_start_keeps_the_indent_of_every_line() -> None:
    tokenizer = llama2_style()
    code = "def f(x):\n    if x > 10:\n        return 22\n    else:\n        return x"
    ids = tokenizer(code, add_special_tokens=False)["input_ids"]
    answer, pieces = collected(tokenizer, ids, [])
    assert answer.text == "".join(pieces) == code
    assert len([piece for piece in pieces if piece]) >= 4  # it is streamed


@pytest.mark.parametrize("make", [byte_level, llama2_style])
def test_a_stop_text_may_be_a_special_token(make: Callable[[], Any]) -> None:
    tokenizer = make()
    parts = ("the fox\n", "<|im_end|>", "<|im_start|>", "user")
    # Each by itself: behind a mark, a tokenizer that puts a space before a text would put another one.
    ids = [token for part in parts for token in tokenizer(part, add_special_tokens=False)["input_ids"]]
    for stop, text in (
        (["<|im_end|>"], "the fox\n"),
        (["\n<|im_end|>"], "the fox"),
        (["<|im_end|><|im_start|>"], "the fox\n"),
        (["fox", "<|im_end|>"], "the "),
        (["<|im_"], "the fox\n"),
    ):
        answer, pieces = collected(tokenizer, ids, stop)
        assert answer.stopped and answer.text == "".join(pieces) == text
    answer, pieces = collected(tokenizer, ids, [])
    assert not answer.ended and answer.text == "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_token_that_ends_the_answer_is_no_part_of_it_even_if_it_is_no_special_one() -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens(["<end>"])  # visible
    ids = tokenizer("the fox<end>over", add_special_tokens=False)["input_ids"]
    answer, pieces = collected(tokenizer, ids, [], [tokenizer.convert_tokens_to_ids("<end>")])
    assert answer.ended and not answer.stopped
    assert answer.text == "".join(pieces) == "the fox"


def test_a_character_of_several_tokens_is_sent_whole_and_words_are(  # as a reader sees them appear
) -> None:
    tokenizer = byte_level()
    ids = tokenizer("the 😀 fox 日本", add_special_tokens=False)["input_ids"]
    _, pieces = collected(tokenizer, ids, [])
    assert [piece for piece in pieces if piece] == ["the", " 😀", " fox", " 日", "本"]
