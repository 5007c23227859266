"""The analysis says what training does."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from domain.peft.algorithms import Algorithm
from domain.protocol import Analyze
from engine.analysis import analyze
from engine.batches import Grouping, RowTokenizer, epoch_batches, read_rows
from engine.errors import BadModel
from engine.optimizer import planned_steps
from engine.rows import RowStore
from engine.transformers_backend import load_tokenizer
from tests.engine.test_methods import config_for
from tests.support.channel_double import RecordingChannel
from tests.support.chat_templates import WRITTEN, trl_templates


def chat(question: str, *answers: str) -> dict[str, Any]:
    turns = [
        turn
        for answer in answers
        for turn in ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    ]
    return {"messages": turns}


def run(path: Path, folder: Path, rows: list[dict[str, Any]], **settings: Any) -> dict[str, Any]:
    dataset = folder / "rows.jsonl"
    dataset.write_text("".join(json.dumps(row) + "\n" for row in rows))
    example_row = settings.pop("example_row", None)
    command = Analyze(
        request_id="r",
        model_path=str(path),
        dataset_path=str(dataset),
        rows=len(rows),
        config=config_for(Algorithm.LORA, **settings),
        example_row=example_row,
    )
    return analyze(command, RecordingChannel()).model_dump()


def other_template(tiny_path: Path, folder: Path, template: str) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder / "model")
    return folder / "model"


def test_lengths_and_what_is_lost_are_counted_exactly(tiny_path: Path, tmp_path: Path) -> None:
    rows = [chat("a", "b"), chat("a", "b" * 60, "c"), chat("a" * 80, "b"), chat("a", "b" * 80)]
    found = run(tiny_path, tmp_path, rows, max_seq_length=64)
    tokenizer = load_tokenizer(tiny_path)
    lengths = [len(tokenizer(tokenizer.apply_chat_template(row["messages"], tokenize=False)).input_ids) for row in rows]
    assert (found["rows"], found["tokens"]["total"], found["tokens"]["maximum"]) == (4, sum(lengths), max(lengths))
    assert found["tokens"]["p50"] == sorted(lengths)[1]
    assert sum(bin_["rows"] for bin_ in found["histogram"]) == 4
    assert all(bin_["from_tokens"] <= bin_["to_tokens"] for bin_ in found["histogram"])
    rows_of = {name: finding["examples"] for name, finding in found["findings"].items()}
    assert rows_of["truncated"] == [1, 2, 3]
    assert rows_of["answer_lost"] == rows_of["nothing_to_learn"] == [2]
    assert rows_of["answer_cut"] == [1, 3]
    assert rows_of["refused"] == rows_of["without_end_mark"] == []


def test_the_example_marks_what_is_trained_and_what_is_cut_off(tiny_path: Path, tmp_path: Path) -> None:
    rows = [chat("say é", "ünd", "b" * 60)]
    example = run(tiny_path, tmp_path, rows, max_seq_length=64)["example"]
    assert "".join(piece["text"] for piece in example["pieces"]) == (
        "<|user|>say é<|end|>\n<|assistant|>ünd<|end|>\n<|user|>say é<|end|>\n<|assistant|>" + "b" * 60 + "<|end|>\n"
    )
    trained = [piece["text"] for piece in example["pieces"] if piece["trained"]]
    assert trained[0] == "ünd<|end|>" and set(trained[1]) == {"b"} and len(trained) == 2
    cut_off = "".join(piece["text"] for piece in example["pieces"] if piece["cut_off"])
    assert cut_off.startswith("b") and cut_off.endswith("<|end|>\n")
    assert sum(piece["tokens"] for piece in example["pieces"] if not piece["cut_off"]) == 64
    assert run(tiny_path, tmp_path, [*rows, chat("x", "y")], example_row=1)["example"]["row"] == 1
    long = run(tiny_path, tmp_path, [chat("a" * 30_000, "b")], train_on="all")["example"]
    assert not long["complete"] and sum(len(piece["text"]) for piece in long["pieces"]) == 20_000


words = st.text("abcdefgh é", min_size=1, max_size=60).filter(str.strip)


@given(
    st.lists(
        st.one_of(st.builds(chat, words, words, words), words.map(lambda text: {"text": text})), min_size=1, max_size=12
    ),
    st.integers(8, 64),
    st.sampled_from(["assistant", "last_assistant", "all"]),
    st.booleans(),
    st.integers(1, 5),
    st.integers(1, 3),
    st.one_of(st.none(), st.integers(1, 9)),
)
def test_the_counts_are_those_of_the_trainer(
    tiny_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[dict[str, Any]],
    limit: int,
    train_on: str,
    packing: bool,
    batch_size: int,
    accumulation: int,
    max_steps: int | None,
) -> None:
    folder = tmp_path_factory.mktemp("analysis")
    settings = {
        "max_seq_length": limit,
        "train_on": train_on,
        "packing": packing,
        "batch_size": batch_size,
        "gradient_accumulation": accumulation,
        "max_steps": max_steps,
    }
    found = run(tiny_path, folder, rows, **settings)
    tokenizer = RowTokenizer(load_tokenizer(tiny_path), train_on, limit)
    tokenized = [
        piece
        for number, row in enumerate(read_rows(folder / "rows.jsonl"))
        for piece in tokenizer.rows(number, row)
        if piece.trained_tokens
    ]
    config = config_for(Algorithm.LORA, **settings)
    batches = epoch_batches(RowStore(tokenized), Grouping(batch_size, limit, packing, 0), seed=0, epoch=0)
    assert found["epoch"]["rows"] == len(tokenized)
    assert found["epoch"]["batches"] == len(batches)
    assert found["epoch"]["tokens"] == sum(batch.tokens for batch in batches)
    assert found["epoch"]["trained_tokens"] == sum(batch.trained_tokens for batch in batches)
    assert found["epoch"]["total_steps"] == (planned_steps(config, len(batches)) if batches else 0)


def test_what_the_template_drops_or_refuses_is_told(tiny_path: Path, tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    calling = {
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    }
    thinking = chat("q", "a")
    thinking["messages"][1]["reasoning_content"] = "hm"
    rows = [chat("q", "a") | {"tools": [tool]}, calling, thinking]
    found = run(tiny_path, tmp_path, rows)
    assert found["left_out"] == [{"what": "reasoning", "rows": 1}, {"what": "tools", "rows": 1}]
    assert found["findings"]["refused"] == {"rows": 1, "examples": [1]}
    assert found["refusals"] == [{"reason": "the model's chat template leaves tool calls out", "rows": 1}]
    qwen = other_template(tiny_path, tmp_path, trl_templates(with_marks=False)["qwen3"])
    found = run(qwen, tmp_path, rows, max_seq_length=256)
    assert (found["left_out"], found["refusals"]) == ([], [])
    endless = other_template(tiny_path, tmp_path, WRITTEN["no marks at all"])
    assert run(endless, tmp_path, rows[:1])["findings"]["without_end_mark"]["rows"] == 1


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3,
        "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'a' * 10**12 }}",
        "{{ ''.__class__.__mro__ }}",
        "{% for",
    ],
)
def test_a_hostile_template_is_refused_and_comes_to_an_end(tiny_path: Path, tmp_path: Path, template: str) -> None:
    model = other_template(tiny_path, tmp_path, template)
    try:
        found = run(model, tmp_path, [chat("q", "a")])
    except BadModel as error:
        assert "does not come to an end" in error.message or "too much memory" in error.message
        return
    assert (found["findings"]["refused"]["rows"], found["epoch"]["rows"]) == (1, 0)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BadModel, match="no tokenizer"):
        run(tmp_path, tmp_path, [chat("q", "a")])


THOUGHTS: dict[str, dict[str, str]] = {
    "a block": {"content": "<think>\nhm\n</think>\n\na"},
    "a block that the prompt opens": {"content": "hm\n</think>\n\na"},
    "a field": {"content": "a", "reasoning_content": "hm"},
}
EVERY = "{% for m in messages %}<|{{ m.role }}|>{{ m.reasoning_content or '' }}{{ m.content }}<|end|>{% endfor %}"


def thinking_rows(thought: dict[str, str]) -> list[dict[str, Any]]:
    """Return rows whose thinking is in no, the first, the last and every answer."""
    rows = [chat("w hm?", "hm", "a") for _ in range(4)]
    for number, places in enumerate([(), (1,), (3,), (1, 3)]):
        for place in places:
            rows[number]["messages"][place] |= thought
    return rows


def lost(found: dict[str, Any]) -> tuple[list[int], list[int]]:
    findings = found["findings"]
    return findings["earlier_thinking_left_out"]["examples"], findings["last_thinking_left_out"]["examples"]


@pytest.mark.parametrize("kind", THOUGHTS)
@pytest.mark.parametrize(
    ("family", "earlier", "last"),
    [("qwen3", [1, 3], []), ("deepseek_r1_distill", [1, 3], [2, 3]), ("every", [], [])],
)
def test_thinking_that_the_template_drops_is_told(
    tiny_path: Path, tmp_path: Path, kind: str, family: str, earlier: list[int], last: list[int]
) -> None:
    template = (trl_templates(with_marks=False) | {"every": EVERY})[family]
    found = run(
        other_template(tiny_path, tmp_path, template), tmp_path, thinking_rows(THOUGHTS[kind]), max_seq_length=256
    )
    assert lost(found) == (earlier, last)
    assert found["findings"]["refused"]["rows"] == 0


@pytest.mark.parametrize("opened", ["<thinking>", "[THINK]", "<|START_THINKING|>", "◁think▷", "<reasoning>"])
def test_thinking_in_other_marks_is_found(tiny_path: Path, tmp_path: Path, opened: str) -> None:
    closed = opened.replace("START", "END") if "START" in opened else f"{opened[0]}/{opened[1:]}"
    dropping = (
        "{% for m in messages %}<|{{ m.role }}|>"
        f"{{{{ m.content if loop.last else m.content.split('{closed}')[-1] }}}}<|end|>{{% endfor %}}"
    )
    rows = [chat("q", f"{opened}hm{closed}a", "b"), chat("q", f"{opened} {closed}a", f"{opened}hm{closed}b")]
    assert lost(run(other_template(tiny_path, tmp_path, dropping), tmp_path, rows)) == ([0], [])
    assert lost(run(tiny_path, tmp_path, rows)) == ([], [])
