"""A tokenizer out of a GGUF file reads text as the one that the file was made from."""

import json
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter, TokenType
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from domain.models import gguf as gguf_models
from domain.models.gguf import pre_tokenizer_name, pre_tokenizer_of
from domain.protocol import PrepareGguf
from engine.batches import RowTokenizer
from engine.errors import BadModel
from engine.gguf import prepare_gguf
from engine.gguf_reading import GgufMetadata, read_tokenizer
from engine.gguf_tokenizer import read_gguf_tokenizer
from engine.turn_ends import TurnEnds
from services.models.embedded import MODEL_ID, EmbeddedModel
from tests.engine.tokenizer_kinds import CORPUS, SPECIAL
from tests.support.training_command import TestChannel

KNOWN = ("gpt-2", "smollm", *gguf_models._SPLITS.values())
TEXTS = [
    *CORPUS,
    "Steps:\n\n1. Mix\n\n2. Bake\n\nx = [\n    1,\n    22,\n]",
    "It'S  12345 don't\r\n\r\n  CamelCaseWORD /path é 日本語 😀 ",
    "<|im_start|>user\nthe fox<|im_end|>",
]
NO_ENDS = TurnEnds(None, (), ())


def published(name: str, folder: Path, *, adds_bos: bool = False) -> Any:
    """Train a tokenizer that splits in a named way, and write it as a publisher does."""
    found = pre_tokenizer_of(name)
    assert found is not None
    body: dict[str, Any] = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "decoder": None,
        "normalizer": {"type": "NFC"} if found.composes else None, "post_processor": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": list(found.steps)},
        "model": {"type": "BPE", "vocab": {}, "merges": [], "ignore_merges": found.ignores_merges},
    }  # fmt: skip
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = Tokenizer.from_str(json.dumps(_with_trims(body))).pre_tokenizer
    from tokenizers import pre_tokenizers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(
        [*CORPUS, *TEXTS], trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    model = json.loads(trained.to_str())["model"] | {"ignore_merges": found.ignores_merges}
    core = Tokenizer.from_str(json.dumps(_with_trims(body) | {"model": model}))
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in SPECIAL])
    core.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    if adds_bos:
        from tokenizers import processors

        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="<|im_end|>", unk_token="<unk>", pad_token="</s>"
    )
    tokenizer.chat_template = {"default": "DEFAULT", "tool_use": "TOOLS"}
    tokenizer.save_pretrained(folder)
    return tokenizer


def _with_trims(body: dict[str, Any]) -> dict[str, Any]:
    """Give ByteLevel the field that tokenizers wants, and that changes no token."""
    pre = body["pre_tokenizer"]
    steps = [
        step | ({"trim_offsets": True} if step["type"] == "ByteLevel" else {})
        for step in pre.get("pretokenizers", [pre])
    ]
    return body | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps} if len(steps) > 1 else steps[0]}


def through_gguf(folder: Path, vocabulary: int, pre: str | None = None, **changes: Any) -> GgufMetadata:
    """Write a folder's tokenizer into a GGUF file, under another name of its way if one is given."""
    (folder / "config.json").write_text("{}")
    found = read_gguf_tokenizer(folder, folder, vocabulary, NO_ENDS)
    path = folder / "t.gguf"
    writer = GGUFWriter(path, "llama")
    object.__setattr__(found, "pre", pre if pre is not None else found.pre)
    for name, value in changes.items():
        object.__setattr__(found, name, value)
    found.write(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return GgufMetadata(path)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Any]]:
    """The published tokenizer and the one that is read, by the way of splitting."""
    made = {}
    for name in KNOWN:
        folder = tmp_path_factory.mktemp("t")
        tokenizer = published(name, folder)
        made[name] = (tokenizer, read_tokenizer(through_gguf(folder, len(tokenizer) + 7)))
    return made


@pytest.mark.parametrize("name", KNOWN)
def test_every_known_way_of_splitting_is_read_as_it_was_written(name: str, pairs: Any, tmp_path: Path) -> None:
    original, read = pairs[name]
    for text in TEXTS:
        assert read(text)["input_ids"] == original(text)["input_ids"], text
        assert read.decode(read(text)["input_ids"]) == original.decode(original(text)["input_ids"])
    assert read.get_vocab() == original.get_vocab()
    assert set(read.all_special_tokens) >= {"<s>", "<|im_end|>", "<unk>", "</s>"}
    assert (read.bos_token, read.eos_token, read.pad_token) == ("<s>", "<|im_end|>", "</s>")
    assert read.chat_template == original.chat_template
    assert not read.added_tokens_decoder[read.convert_tokens_to_ids("<tool>")].special
    read.save_pretrained(tmp_path)
    assert pre_tokenizer_name(json.loads((tmp_path / "tokenizer.json").read_text())) == name
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(TEXTS[-2])["input_ids"] == original(TEXTS[-2])["input_ids"]


@settings(max_examples=60)
@given(text=st.text(max_size=40), name=st.sampled_from(KNOWN))
def test_any_text_is_read_so(pairs: Any, text: str, name: str) -> None:
    original, read = pairs[name]
    assert read(text)["input_ids"] == original(text)["input_ids"]


@pytest.mark.parametrize(("alias", "name"), gguf_models._ALIASES.items())
def test_other_names_of_a_way_are_known(alias: str, name: str, tmp_path: Path) -> None:
    tokenizer = published(name, tmp_path)
    read = read_tokenizer(through_gguf(tmp_path, len(tokenizer), pre=alias))
    assert [read(text)["input_ids"] for text in TEXTS] == [tokenizer(text)["input_ids"] for text in TEXTS]


@pytest.mark.parametrize("pre", ["default", "", "deepseek-v3", "falcon", "smollm2", "SMOLLM"])
def test_a_way_that_is_not_known_is_refused(tmp_path: Path, pre: str) -> None:
    tokenizer = published("smollm", tmp_path)
    with pytest.raises(BadModel, match="splits text"):
        read_tokenizer(through_gguf(tmp_path, len(tokenizer), pre=pre))


@pytest.mark.parametrize("adds_bos", [True, False])
def test_what_is_put_around_a_text_is_read(tmp_path: Path, adds_bos: bool) -> None:
    tokenizer = published("llama-bpe", tmp_path, adds_bos=adds_bos)
    read = read_tokenizer(through_gguf(tmp_path, len(tokenizer)))
    assert (read("the")["input_ids"][0] == read.bos_token_id) == adds_bos
    assert read("the", "fox")["input_ids"].count(read.bos_token_id) == 2 * adds_bos
    ended = read_tokenizer(through_gguf(tmp_path, len(tokenizer), adds_eos=True))
    assert ended("the")["input_ids"] == [*read("the")["input_ids"], read.eos_token_id]


def test_unused_places_are_no_tokens(pairs: Any) -> None:
    for original, read in pairs.values():
        assert len(read) == len(original)
        assert "[PAD" not in "".join(read.get_vocab())
    assert TokenType.UNUSED == 5


def test_the_embedded_models_tokenizer_takes_digits_apart(embedded_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded_path)
    sample = "Steps:\n\n1. Mix\n\n2. Bake\n\nx = [\n    1,\n    22,\n]"
    assert len(RowTokenizer(tokenizer, "all", 64).whole(0, {"text": sample}).ids) == 25  # with the end
    assert tokenizer.convert_ids_to_tokens(tokenizer(" 123")["input_ids"]) == ["Ġ", "1", "2", "3"]
    assert tokenizer.decode(tokenizer(sample + "▁ , é")["input_ids"]) == sample + "▁ , é"
    assert pre_tokenizer_name(json.loads((embedded_path / "tokenizer.json").read_text())) == "smollm"
    assert tokenizer.chat_template.startswith("{% for message in messages %}")
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")


def test_a_model_that_an_earlier_version_prepared_otherwise_is_prepared_anew(tmp_path: Path) -> None:
    folder = tmp_path / "models" / MODEL_ID.replace("/", "--")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    embedded = EmbeddedModel(tmp_path, tmp_path)
    assert embedded.path is None
    for content, found in (('{"version": 1}', False), ("[]", False), ("{", False), ('{"version": 2}', True)):
        (folder / "conversion.json").write_text(content)
        assert (embedded.path == folder) == found


def test_a_file_whose_tokenizer_is_not_known_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    tokenizer = published("smollm", tmp_path)
    through_gguf(tmp_path, len(tokenizer), pre="default")
    command = PrepareGguf(
        request_id="r", gguf_path=str(tmp_path / "t.gguf"), output_path=str(tmp_path / "out"), model_id="m"
    )
    with pytest.raises(BadModel, match="'default', which is not known here"):
        prepare_gguf(command, TestChannel())
    assert not (tmp_path / "out").exists()
