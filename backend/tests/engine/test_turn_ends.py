"""What ends a trained turn ends a generated one, and in every export."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from transformers import AutoModelForCausalLM, AutoTokenizer

from domain.peft.algorithms import Algorithm
from domain.protocol import ChatMessage, Generate, Token
from domain.results import Generated
from engine.batches import FALLBACK_TEMPLATE, RowTokenizer
from engine.generation import generate
from engine.rendering import ChatRenderer
from engine.rows import IGNORED
from engine.turn_ends import turn_ends
from tests.engine.test_gguf_export import run as export_gguf
from tests.engine.test_gguf_export import text
from tests.engine.test_merge import run as export_merged
from tests.engine.test_methods import config_for, load
from tests.support.chat_templates import WRITTEN, tokenizer_with, trl_templates
from tests.support.training_command import TestChannel, train_tiny

QUESTION, ANSWER = "the quick?", "five dozen"
TURNS = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
SETTINGS: dict[str, Any] = {"rank": 16, "max_steps": 120, "learning_rate": 5e-3, "batch_size": 4, "scheduler": "linear"}


def base_that_ends_in(tiny_path: Path, folder: Path, end: str, template: str | None = None) -> Path:
    """Copy the tiny model as bases are published: texts end in one token, its template's turns in another."""
    shutil.copytree(tiny_path, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = tokenizer.pad_token = end
    tokenizer.chat_template = template or tokenizer.chat_template
    tokenizer.save_pretrained(folder)
    for name in ("config.json", "generation_config.json"):
        ids = dict.fromkeys(("eos_token_id", "pad_token_id"), tokenizer.eos_token_id)
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | ids))
    return folder


class Listener(TestChannel):
    """A channel for answers."""

    def stop_requested(self, _request_id: str) -> bool:
        return False

    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Token))


def ask(base: Any, adapter: str | None, channel: Any = None, **changes: Any) -> Generated:
    values: dict[str, Any] = {
        "request_id": "r", "messages": [ChatMessage(role="user", content=QUESTION)], "prompt": None,
        "adapter_id": adapter, "max_new_tokens": 40, "temperature": 0.0, "top_p": 1.0, "seed": None, "stop": [],
    }  # fmt: skip
    return generate(base, Generate(**values | changes), channel or Listener())


def trained(path: Path, folder: Path) -> Any:
    """Teach one answer; return a base with the adapter on it."""
    rows = folder / "one.jsonl"
    rows.parent.mkdir(parents=True, exist_ok=True)
    rows.write_text((json.dumps({"messages": TURNS}) + "\n") * 4)
    config = config_for(Algorithm.LORA, **SETTINGS)
    train_tiny(path, folder, config, dataset_path=str(rows), validation_fraction=0.0)
    (folder / "adp").rename(folder / "adapter")
    base = load(path, config)
    base.attach("adp", folder / "adapter")
    return base


def test_a_base_whose_turns_end_in_another_mark_than_its_texts(tiny_path: Path, tmp_path: Path) -> None:
    path = base_that_ends_in(tiny_path, tmp_path / "base", "<|system|>")
    base = trained(path, tmp_path)
    mark, own = base.tokenizer.convert_tokens_to_ids(["<|end|>", "<|system|>"])
    channel = Listener()
    said = ask(base, "adp", channel)
    assert (said.text, said.finish_reason, channel.text()) == (ANSWER, "stop", ANSWER)
    assert said.completion_tokens == len(base.tokenizer(ANSWER).input_ids) + 1
    assert ask(base, "adp", stop=["<|end|>"]).text == ANSWER
    assert ask(base, "adp", stop=["dozen<|end|>"]).text == ANSWER.removesuffix("dozen")

    export_merged(base, tmp_path, tmp_path / "adapter")
    for name in ("generation_config.json", "config.json"):
        found = json.loads((tmp_path / "merged" / name).read_text())
        assert found["eos_token_id"] == [mark, own]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    prompt = tokenizer.apply_chat_template(TURNS[:1], add_generation_prompt=True, return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(output) == f"{ANSWER}<|end|>"

    made = export_gguf(base, tmp_path)
    reader = GGUFReader(tmp_path / "out" / made.filename)
    roles = {role: text(reader, f"tokenizer.ggml.{role}_token_id") for role in ("eos", "eot", "eom")}
    assert roles == {"eos": mark, "eot": mark, "eom": own}


def test_a_base_whose_turns_end_as_its_texts_do_is_exported_as_it_was(tiny_path: Path, tmp_path: Path) -> None:
    base = trained(tiny_path, tmp_path)
    assert ask(base, "adp").finish_reason == "stop"
    export_merged(base, tmp_path, tmp_path / "adapter")
    for name in ("generation_config.json", "config.json"):
        before, after = (json.loads((folder / name).read_text()) for folder in (tiny_path, tmp_path / "merged"))
        assert before["eos_token_id"] == after["eos_token_id"]
    assert (tmp_path / "merged/generation_config.json").read_bytes() == (
        tiny_path / "generation_config.json"
    ).read_bytes()
    made = export_gguf(base, tmp_path)
    reader = GGUFReader(tmp_path / "out" / made.filename)
    assert reader.get_field("tokenizer.ggml.eot_token_id") is None
    assert text(reader, "tokenizer.ggml.eos_token_id") == base.tokenizer.eos_token_id


def test_a_turn_that_ends_in_a_text_ends_there_too(tiny_path: Path, tmp_path: Path) -> None:
    """Whose mark is no token of the vocabulary: pieces of one are learned, and the text of it ends the answer."""
    template = (
        "{% for m in messages %}### {{ m.role }}\n{{ m.content }}\n### end\n{% endfor %}"
        "{% if add_generation_prompt %}### assistant\n{% endif %}"
    )
    base = trained(base_that_ends_in(tiny_path, tmp_path / "base", "<|system|>", template), tmp_path)
    channel = Listener()
    said = ask(base, "adp", channel)
    assert (said.text, said.finish_reason, channel.text()) == (ANSWER, "stop", ANSWER)
    notes = export_merged(base, tmp_path, tmp_path / "adapter").notes
    assert any("'### end'" in note for note in notes)


LOOP = "{% for m in messages %}"
CHATML = f"{LOOP}<|im_start|>{{{{ m.role }}}}\n{{{{ m.content }}}}<|im_end|>\n{{% endfor %}}"
ENDS = {
    "chatml": (CHATML, "<|im_end|>"),
    "llama 3": (LOOP + "<|h|>{{ m.role }}<|/h|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}", "<|eot_id|>"),
    "gemma": (LOOP + "<s>{{ m.role }}\n{{ m.content }}</end_of_turn>\n{% endfor %}", "</end_of_turn>"),
    "phi 3": (
        LOOP + "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}",
        "<|end|>",
    ),
    "mistral": (
        LOOP + "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}"
        "{{ eos_token }}{% endif %}{% endfor %}",
        "</s>",
    ),
    "reasoning": (
        LOOP + "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n"
        "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}",
        "<|im_end|>",
    ),
    "parts": (
        LOOP + "<|im_start|>{% for p in m.content %}{{ p.text }}{% endfor %}<|im_end|>\n{% endfor %}",
        "<|im_end|>",
    ),
    "wants a system turn": (
        "{% if messages[0].role != 'system' %}{{ raise_exception('no') }}{% endif %}"
        + LOOP + "{{ m.content }}<|eot_id|>{% endfor %}",
        "<|eot_id|>",
    ),
    "always asks on": (LOOP + "<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|>", "<|end|>"),
    "fallback": (FALLBACK_TEMPLATE, "</s>"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ENDS)
def test_the_mark_of_a_turn_is_found_by_rendering_one(tiny_path: Path, kind: str) -> None:
    template, mark = ENDS[kind]
    tokenizer = tokenizer_with(tiny_path, template)
    found = turn_ends(tokenizer, ChatRenderer(tokenizer), [7, 9])
    expected = tokenizer.convert_tokens_to_ids(mark)
    assert found.mark == expected and found.texts == ()
    assert found.ids == tuple(dict.fromkeys([expected, 7, 9, tokenizer.eos_token_id]))
    assert 0 in turn_ends(tokenizer, ChatRenderer(tokenizer), 0).ids
    assert turn_ends(tokenizer, ChatRenderer(tokenizer), None).ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("name", [*trl_templates(with_marks=False), *WRITTEN])
def test_the_mark_is_what_training_teaches(tiny_path: Path, name: str) -> None:
    """Of every template that ends a turn with a token, that one is among the learned tokens behind the answer."""
    tokenizer = tokenizer_with(tiny_path, (trl_templates(with_marks=False) | WRITTEN)[name])
    found = turn_ends(tokenizer, ChatRenderer(tokenizer), None)
    if found.mark is None:
        return
    row = RowTokenizer(tokenizer, "assistant", 10**6).encode(0, {"messages": TURNS})
    learned = [label for label in row.labels if label != IGNORED]
    assert found.mark in learned


def test_a_template_that_marks_no_end_has_none(tiny_path: Path) -> None:
    tokenizer = tokenizer_with(tiny_path, WRITTEN["no marks at all"])
    found = turn_ends(tokenizer, ChatRenderer(tokenizer), None)
    assert (found.mark, found.ids, found.texts) == (None, (tokenizer.eos_token_id,), ())
