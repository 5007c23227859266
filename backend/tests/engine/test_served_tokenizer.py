"""Which tokenizer and chat template count: one rule for answers and for every export, and it is said."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from transformers import AutoTokenizer

from domain.peft.algorithms import Algorithm
from domain.protocol import ChatMessage
from engine.base import Base
from engine.batches import FALLBACK_TEMPLATE
from engine.errors import BadModel, BadSetting
from tests.engine.test_gguf_export import run as export_gguf
from tests.engine.test_gguf_export import text
from tests.engine.test_merge import make_adapter
from tests.engine.test_merge import run as export_merged
from tests.engine.test_methods import config_for, load
from tests.engine.test_tokenizer_folder import LISTED, NAMED, base_with
from tests.engine.test_turn_ends import ask
from tests.support.training_command import TestChannel, train_tiny

OWN = "{% for m in messages %}<|system|>{{ m.content }}<|user|>{% endfor %}"
PARTS = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% for p in m['content'] %}{% if p['type']=='text' %}{{ p['text'] }}"
    "{% endif %}{% endfor %}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def base_and_adapter(path: Path, folder: Path) -> tuple[Base, Path]:
    base = load(path, config_for(Algorithm.LORA))
    make_adapter(base, config_for(Algorithm.LORA), folder / "adapter")
    return base, folder / "adapter"


def rendered(base: Base, template: str, content: str = "the quick?") -> int:
    """Count the tokens of one question."""
    prompt = base.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], chat_template=template, tokenize=False, add_generation_prompt=True
    )
    return len(base.tokenizer(prompt, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("whole", [True, False])
def test_an_adapters_own_template_counts_in_answers_as_in_exports(tiny_path: Path, tmp_path: Path, whole: bool) -> None:
    base, adapter = base_and_adapter(tiny_path, tmp_path)
    (adapter / "chat_template.jinja").write_text(OWN)
    if not whole:
        (adapter / "tokenizer.json").unlink()
    base.attach("adp", adapter)
    with_it, bare = ask(base, "adp"), ask(base, None)
    assert with_it.prompt_tokens == rendered(base, OWN) != bare.prompt_tokens
    assert (with_it.chat_template, bare.chat_template) == ("adapter", "model")
    assert ask(base, "adp", messages=None, prompt="the").chat_template is None
    assert base.served("adp").ends.mark == base.tokenizer.convert_tokens_to_ids("<|user|>")
    notes = export_merged(base, tmp_path, adapter).notes
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == OWN
    assert "The chat template is the adapter's own, not the base's." in notes
    made = export_gguf(base, tmp_path)
    assert text(GGUFReader(tmp_path / "out" / made.filename), "tokenizer.chat_template") == OWN
    assert "The chat template is the adapter's own, not the base's." in made.notes


@pytest.mark.parametrize("own", [LISTED, "in its settings", None])
def test_wherever_an_adapter_keeps_its_template(tiny_path: Path, tmp_path: Path, own: Any) -> None:
    base, adapter = base_and_adapter(tiny_path, tmp_path)
    (adapter / "chat_template.jinja").unlink()
    settings = json.loads((adapter / "tokenizer_config.json").read_text())
    said = f"{OWN}{own}" if isinstance(own, str) else own
    (adapter / "tokenizer_config.json").write_text(json.dumps(settings | ({"chat_template": said} if said else {})))
    base.attach("adp", adapter)
    expected = {str: said, list: NAMED["default"], type(None): base.tokenizer.chat_template}[type(own)]
    answer = ask(base, "adp")
    assert answer.prompt_tokens == rendered(base, expected)
    assert answer.chat_template == ("model" if own is None else "adapter")
    export_merged(base, tmp_path, adapter)
    found = AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template
    assert found == (NAMED if own is LISTED else expected)


def test_adapters_with_the_bases_tokenizer_share_it(tiny_path: Path, tmp_path: Path) -> None:
    base, adapter = base_and_adapter(tiny_path, tmp_path)
    shutil.copytree(adapter, tmp_path / "other")
    (tmp_path / "other/chat_template.jinja").write_text(OWN)
    base.attach("adp", adapter)
    base.attach("other", tmp_path / "other")
    assert base.served("adp").tokenizer is base.tokenizer
    assert base.served("other").tokenizer is base.served("other").tokenizer is not base.tokenizer
    base.detach("other")
    with pytest.raises(BadSetting, match="other is not on this base"):
        base.served("other")


def test_a_base_without_a_template_says_so(tiny_path: Path, tmp_path: Path) -> None:
    base, adapter = base_and_adapter(base_with(tiny_path, tmp_path / "base", None), tmp_path)
    base.attach("adp", adapter)
    assert base.tokenizer.chat_template == FALLBACK_TEMPLATE
    assert {ask(base, name).chat_template for name in ("adp", None)} == {"none: a plain one is used"}


def test_a_template_for_parts_gets_parts_in_answers_as_in_training(tiny_path: Path, tmp_path: Path) -> None:
    base = load(base_with(tiny_path, tmp_path / "base", PARTS), config_for(Algorithm.LORA))
    for content in ("a", "the quick brown fox"):
        said = ask(base, None, messages=[ChatMessage(role="user", content=content)])
        expected = base.tokenizer(f"<|user|>{content}<|end|>\n<|assistant|>", add_special_tokens=False)["input_ids"]
        assert said.prompt_tokens == len(expected)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('System role not supported') }}", "System role not supported"),
        ("{% if messages[0].nothing.at_all %}{% endif %}", "nothing"),
        ("{{ messages[7].content }}", "no element 7|undefined"),
        ("{% for m in messages %", "unexpected"),
    ],
)
def test_what_a_template_refuses_is_the_clients_to_change(
    tiny_path: Path, tmp_path: Path, template: str, words: str
) -> None:
    base = load(base_with(tiny_path, tmp_path / "base", template), config_for(Algorithm.LORA))
    with pytest.raises(BadSetting, match=f"chat template refuses the conversation: .*({words})"):
        ask(base, None)
    assert ask(base, None, messages=None, prompt="the").completion_tokens > 0


def test_a_template_without_an_end_does_not_hold_an_answer_up(tiny_path: Path, tmp_path: Path) -> None:
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    base = load(base_with(tiny_path, tmp_path / "base", endless), config_for(Algorithm.LORA))
    with pytest.raises(BadModel, match="does not come to an end"):
        ask(base, None)


def grown(adapter: Path, how: str) -> None:
    """Give an adapter's tokenizer more tokens, as it is saved after `add_tokens` and without trained embeddings."""
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    if how == "tokens":
        tokenizer.add_tokens(["<new>"])
    elif how == "special tokens":
        tokenizer.add_special_tokens({"additional_special_tokens": ["<new>"]})
    else:
        tokenizer.add_special_tokens({"pad_token": "<new>"})
    tokenizer.save_pretrained(adapter)


@pytest.mark.parametrize("how", ["tokens", "special tokens", "a pad token"])
def test_a_tokenizer_that_has_grown_beyond_the_embeddings_is_refused_by_both_exports(
    tiny_path: Path, tmp_path: Path, how: str
) -> None:
    base, adapter = base_and_adapter(tiny_path, tmp_path)
    grown(adapter, how)
    beyond = rf"has a token {base.embeddings}, and the model {base.embeddings} embeddings"
    with pytest.raises(BadSetting, match=beyond):
        export_merged(base, tmp_path, adapter)
    with pytest.raises(BadSetting, match=beyond):
        export_gguf(base, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}
    base.attach("adp", adapter)
    assert ask(base, "adp").completion_tokens > 0
    with pytest.raises(BadSetting, match="the prompt has the token"):
        ask(base, "adp", messages=[ChatMessage(role="user", content="the <new>")])


def test_a_tokenizer_with_neither_pad_nor_end_trains_answers_and_is_exported(tiny_path: Path, tmp_path: Path) -> None:
    path = base_with(tiny_path, tmp_path / "base", NAMED["default"])
    settings = json.loads((path / "tokenizer_config.json").read_text())
    bare = {name: value for name, value in settings.items() if not name.startswith(("eos", "pad"))}
    (path / "tokenizer_config.json").write_text(json.dumps(bare))
    for name in ("config.json", "generation_config.json"):
        said = json.loads((path / name).read_text())
        (path / name).write_text(json.dumps(said | {"eos_token_id": None, "pad_token_id": None}))
    config = config_for(Algorithm.LORA, max_steps=2)
    channel = TestChannel()
    train_tiny(path, tmp_path, config, channel)
    assert channel.losses().keys() == {1, 2}
    base = load(path, config)
    base.attach("adp", tmp_path / "adp")
    assert base.tokenizer.pad_token is None
    assert ask(base, "adp").completion_tokens > 0
    base.detach("adp")
    (tmp_path / "adp").rename(tmp_path / "adapter")
    export_merged(base, tmp_path, tmp_path / "adapter")
    export_gguf(base, tmp_path)


def test_the_coldest_temperatures_take_the_likeliest_token(tiny_path: Path) -> None:
    base = load(tiny_path, config_for(Algorithm.LORA))
    texts = [ask(base, None, temperature=cold, seed=1).text for cold in (0.0, 1e-320, 1e-40, 1e-9, 1e-5)]
    assert len(set(texts)) == 1


def test_a_tokenizer_that_cannot_be_read_is_named(tiny_path: Path, tmp_path: Path) -> None:
    base, adapter = base_and_adapter(tiny_path, tmp_path)
    (adapter / "tokenizer.json").write_text("{}")
    base.attach("adp", adapter)
    with pytest.raises(BadSetting, match="the adapter's tokenizer cannot be used"):
        ask(base, "adp")
    assert ask(base, None).completion_tokens > 0
