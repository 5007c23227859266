"""A chat template that takes too long or too much is refused, and the engine has its limits and its memory back."""

import resource
from typing import Any

import psutil
import pytest

from engine.errors import BadModel, BadSetting
from engine.rendering import ChatRenderer

pytestmark = pytest.mark.engine
_TURNS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
_DOUBLED = "{% set ns = namespace(x=START) %}{% for i in range(99) %}{% set ns.x = ns.x STEP ns.x %}{% endfor %}"
TOO_MUCH = {
    "a long text": "{{ 'a' * 10**11 }}",
    "a text that doubles": _DOUBLED.replace("START", "'a'").replace("STEP", "~"),
    "a wide column": "{{ 'a'.center(10**10) }}",
}
NUMBERS = {
    "a power": "{% set x = 9 ** (9 ** 9) %}",
    "squares": _DOUBLED.replace("START", "3").replace("STEP", "*"),
}


@pytest.fixture(scope="module")
def tokenizer(tiny_path: Any) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_path)


def _prompt(tokenizer: Any, template: str) -> str:
    tokenizer.chat_template = template + _TURNS
    return ChatRenderer(tokenizer).prompt([{"role": "user", "content": "hello"}])


@pytest.mark.parametrize("kind", TOO_MUCH)
def test_a_template_takes_no_more_memory_than_it_may_and_leaves_none(tokenizer: Any, kind: str) -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    held = psutil.Process().memory_info().rss
    for _ in range(2):
        with pytest.raises(BadModel, match="too much memory"):
            _prompt(tokenizer, TOO_MUCH[kind])
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    assert _prompt(tokenizer, "") == "user: hello\n"
    assert psutil.Process().memory_info().rss < held + 600 * 2**20


@pytest.mark.parametrize("kind", NUMBERS)
def test_numbers_do_not_grow_without_an_end(tokenizer: Any, kind: str) -> None:
    with pytest.raises(BadSetting, match="more than 10000 bits"):
        _prompt(tokenizer, NUMBERS[kind])


def test_numbers_and_texts_of_usual_size_are_computed(tokenizer: Any) -> None:
    assert _prompt(tokenizer, "{{ 2 ** 100 * 3 }}{{ 'ab' * 2 }}").startswith(f"{2**100 * 3}abab")
