"""A text that has a mark itself is not given it again, in training, analysis and prompts."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from domain.peft.algorithms import Algorithm
from engine.batches import RowTokenizer
from engine.text_tokens import TextTokenizer
from tests.engine.test_analysis import run as analyze
from tests.engine.test_methods import config_for, load
from tests.engine.test_turn_ends import ask
from tests.engine.tokenizer_kinds import KINDS, byte_level


@pytest.mark.parametrize("adds", [(True, False), (False, True), (True, True), (False, False)])
@pytest.mark.parametrize("text", ["the fox", "<s>the fox", "the fox</s>", "<s>the fox</s>", "<s>", "", "a<s>b"])
def test_each_mark_is_there_once(adds: tuple[bool, bool], text: str) -> None:
    tokenizer = byte_level(adds_bos=adds[0], adds_eos=adds[1])
    found = TextTokenizer(tokenizer)(text)
    plain = tokenizer(text.removeprefix("<s>").removesuffix("</s>"), add_special_tokens=False)["input_ids"]
    begins = [tokenizer.bos_token_id] if adds[0] or text.startswith("<s>") else []
    ends = [tokenizer.eos_token_id] if adds[1] or text.endswith("</s>") else []
    assert found.ids == [*begins, *plain, *ends]
    assert len(found.offsets) == len(found.ids)
    own = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert [place for place in found.offsets if place[0] < place[1]] == [place for place in own if place[0] < place[1]]
    assert found.offsets == sorted(found.offsets)


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_without_marks_is_tokenized_as_the_tokenizer_does(kind: str) -> None:
    tokenizer = KINDS[kind]()
    for text in ("the fox", " 10 ", "é日"):
        assert TextTokenizer(tokenizer)(text).ids == tokenizer(text)["input_ids"]


def test_a_text_row_trains_one_of_each() -> None:
    tokenizer = byte_level(adds_bos=True)
    for text in ("the fox", "<s>the fox", "<s>the fox</s>"):
        row = RowTokenizer(tokenizer, "all", 64).whole(0, {"text": text})
        assert [row.ids.count(token) for token in (tokenizer.bos_token_id, tokenizer.eos_token_id)] == [1, 1]
        assert row.labels == row.ids


@pytest.fixture
def adding(tiny_path: Path, tmp_path: Path) -> Path:
    """The tiny model with a tokenizer that begins every text with a mark."""
    folder = tmp_path / "adding"
    shutil.copytree(tiny_path, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    mark = {"SpecialToken": {"id": "<|user|>", "type_id": 0}}
    tokens = {"<|user|>": {"id": "<|user|>", "ids": [1], "tokens": ["<|user|>"]}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    added = {"type": "TemplateProcessing", "single": [mark, text], "pair": [mark, text], "special_tokens": tokens}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer | {"post_processor": added}))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": "<|user|>"}))
    assert AutoTokenizer.from_pretrained(folder)("the").input_ids[0] == 1
    return folder


def test_a_prompt_has_one_too_and_analysis_counts_it_so(adding: Path, tmp_path: Path) -> None:
    base = load(adding, config_for(Algorithm.LORA))
    counts = [ask(base, None, messages=None, prompt=text).prompt_tokens for text in ("the fox", "<|user|>the fox")]
    assert counts[0] == counts[1] == len(base.tokenizer("the fox").input_ids)
    found = [analyze(adding, tmp_path, [{"text": text}]) for text in ("the fox", "<|user|>the fox")]
    assert found[0]["tokens"] == found[1]["tokens"]
