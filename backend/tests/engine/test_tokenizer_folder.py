"""A tokenizer's files, folders within among them, reach every place that a tokenizer is saved to."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from transformers import AutoTokenizer

from core.files import plain_files
from core.manifest import FolderDamaged, verify, write_manifest
from domain.adapter_files import kept_files, tokenizer_files
from domain.peft.algorithms import Algorithm
from engine.errors import BadData
from engine.tokenizer_folder import own_template, write_used_tokenizer
from services.adapters.staging import copy_folder, unzip
from tests.engine.test_gguf_export import run as export_gguf
from tests.engine.test_gguf_export import text
from tests.engine.test_merge import run as export_merged
from tests.engine.test_methods import config_for, load
from tests.support.adapter_double import zip_of
from tests.support.training_command import TestChannel, train_tiny

TURN = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
NAMED = {"default": TURN + PROMPT, "tool_use": "TOOLS{{ tools }}" + TURN + PROMPT, "rag": "RAG" + TURN + PROMPT}
LISTED = [{"name": name, "template": template} for name, template in NAMED.items()]


def base_with(tiny_path: Path, folder: Path, template: Any, *, in_files: bool = False) -> Path:
    """Copy the tiny model and give its tokenizer other chat templates, as a publisher does."""
    shutil.copytree(tiny_path, folder)
    (folder / "chat_template.jinja").unlink()
    if in_files:
        (folder / "additional_chat_templates").mkdir()
        for name, content in template.items():
            named = folder / "additional_chat_templates" / f"{name}.jinja"
            (folder / "chat_template.jinja" if name == "default" else named).write_text(content)
    else:
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    return folder


@pytest.mark.parametrize("in_files", [False, True])
def test_named_templates_reach_the_adapter_and_every_export(tiny_path: Path, tmp_path: Path, in_files: bool) -> None:
    path = base_with(tiny_path, tmp_path / "base", NAMED if in_files else LISTED, in_files=in_files)
    config = config_for(Algorithm.LORA, max_steps=2)
    train_tiny(path, tmp_path, config)
    adapter = (tmp_path / "adp").rename(tmp_path / "adapter")
    assert "additional_chat_templates/tool_use.jinja" in dict(plain_files(adapter))
    verify(adapter)
    assert AutoTokenizer.from_pretrained(adapter).chat_template == NAMED
    base = load(path, config)
    export_merged(base, tmp_path, adapter)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == NAMED
    assert verify(tmp_path / "merged")["adapter_id"] == "adp"
    made = export_gguf(base, tmp_path)
    reader = GGUFReader(tmp_path / "out" / made.filename)
    assert text(reader, "tokenizer.chat_template") == NAMED["default"]
    for name in ("tool_use", "rag"):
        assert text(reader, f"tokenizer.chat_template.{name}") == NAMED[name]


def test_a_row_with_tools_is_trained_in_the_template_for_tools(tiny_path: Path, tmp_path: Path) -> None:
    path = base_with(tiny_path, tmp_path / "base", LISTED)
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = tmp_path / "tools.jsonl"
    rows.write_text(json.dumps({"messages": turns, "tools": [tool]}) + "\n" + json.dumps({"messages": turns}) + "\n")
    channel = TestChannel()
    config = config_for(Algorithm.LORA, max_steps=1, train_on="all", batch_size=2, max_seq_length=256)
    train_tiny(path, tmp_path, config, channel, dataset_path=str(rows), validation_fraction=0.0)
    tokenizer = AutoTokenizer.from_pretrained(path)
    expected = [tokenizer.apply_chat_template(turns, tools=tools, tokenize=False) for tools in ([tool], None)]
    # A first token has none before it that could predict it.
    assert channel.started().trained_tokens == sum(len(tokenizer(said).input_ids) - 1 for said in expected)


def test_named_templates_without_a_default_are_refused_before_the_first_step(tiny_path: Path, tmp_path: Path) -> None:
    path = base_with(tiny_path, tmp_path / "base", [item for item in LISTED if item["name"] != "default"])
    with pytest.raises(BadData, match="no default specified"):
        train_tiny(path, tmp_path, config_for(Algorithm.LORA, max_steps=1))


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("own", ["none", "one", "named", "listed", "in its settings"])
def test_an_adapters_template_counts_and_what_it_lacks_is_the_bases(
    tiny_path: Path, tmp_path: Path, own: str, whole: bool
) -> None:
    base = AutoTokenizer.from_pretrained(base_with(tiny_path, tmp_path / "base", LISTED))
    said: dict[str, Any] = {"none": None, "one": "ONE", "named": NAMED | {"rag": "OWN"}, "listed": LISTED[:2]}
    adapter = base_with(tiny_path, tmp_path / "adapter", said.get(own, "SET") if own not in ("one", "named") else None)
    if own in ("one", "named"):
        shutil.rmtree(adapter)
        files = {"default": "ONE"} if own == "one" else said["named"]
        adapter = base_with(tiny_path, tmp_path / "adapter", files, in_files=True)
    if not whole:
        (adapter / "tokenizer.json").unlink()
    (tmp_path / "out").mkdir()
    adapted = write_used_tokenizer(base, adapter, tmp_path / "out")
    wanted = {"none": NAMED, "one": "ONE", "named": said["named"], "in its settings": "SET"}
    expected = wanted.get(own, {name: NAMED[name] for name in ("default", "tool_use")})
    found = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert found.chat_template == own_template(tmp_path / "out") == expected
    assert adapted == (own != "none")
    assert found("the quick").input_ids == base("the quick").input_ids


def test_files_in_folders_are_in_the_manifest(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "x").write_text("x")
    (tmp_path / "a/b/y").write_text("y")
    write_manifest(tmp_path, {"n": 1})
    assert verify(tmp_path) == {"n": 1}
    for name, content, why in (
        ("a/b/y", "z", "its sha256 sum differs"),
        ("a/b/y", "yy", "2 bytes instead of 1"),
        ("a/z", "z", "a/z does not belong there"),
    ):
        before = (tmp_path / name).read_bytes() if (tmp_path / name).exists() else None
        (tmp_path / name).write_text(content)
        with pytest.raises(FolderDamaged, match=why):
            verify(tmp_path)
        (tmp_path / name).write_bytes(before) if before is not None else (tmp_path / name).unlink()
    (tmp_path / "c").mkdir()
    with pytest.raises(FolderDamaged, match="c does not belong there"):
        verify(tmp_path)
    (tmp_path / "c").rmdir()
    (tmp_path / "a/b/y").unlink()
    with pytest.raises(FolderDamaged, match="a/b/y is missing"):
        verify(tmp_path)


def test_what_is_kept_of_an_adapter_that_comes_is_all_of_its_tokenizer_and_no_code(tmp_path: Path) -> None:
    tokenizer = {
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
        "merges.txt", "vocab.txt", "tokenizer.model", "tokenizer.model.v3", "spiece.model", "tekken.json",
        "qwen.tiktoken", "chat_template.jinja", "additional_chat_templates/tool_use.jinja",
    }  # fmt: skip
    adapter = {"adapter_config.json", "adapter_model.safetensors", "README.md", "training.json", "manifest.json"}
    others = {
        "tokenizer.py", "tokenization.py", "additional_chat_templates/x.py", "additional_chat_templates/a/b.jinja",
        "deep/chat_template.jinja", "optimizer.safetensors", "trainer_state.json", "notes.txt",
    }  # fmt: skip
    assert set(tokenizer_files(tokenizer | adapter | others)) == tokenizer
    assert set(kept_files(tokenizer | adapter | others)) == tokenizer | adapter
    assert kept_files(adapter)[-1] == "adapter_model.safetensors"
    files = {name: name.encode() for name in tokenizer | adapter | others}
    for name, content in files.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(content)
    (tmp_path / "copied").mkdir()
    copy_folder(tmp_path / "in", tmp_path / "copied", 10**6)
    (tmp_path / "in.zip").write_bytes(zip_of(files, "adapter/"))
    (tmp_path / "unzipped").mkdir()
    unzip(tmp_path / "in.zip", tmp_path / "unzipped", 10**6)
    for folder in ("copied", "unzipped"):
        found = {name: path.read_bytes() for name, path in plain_files(tmp_path / folder)}
        assert found == {name: files[name] for name in tokenizer | adapter}
