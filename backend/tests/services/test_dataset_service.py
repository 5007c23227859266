"""Datasets: read as they come, kept whole or refused with what is wrong, stored once, nothing half stored."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import DatasetNotTrainable, DatasetRejected, ImportNotFound, TooLarge
from services.dataset_service import DatasetService
from services.datasets.imports import ImportCancelled
from services.datasets.intake import IntakeRequest, IntakeResult, read_dataset
from services.datasets.worker import read_in_process
from tests.support.datasets_double import (
    as_csv,
    as_json,
    as_jsonl,
    as_parquet,
    dataset_service,
    gzipped,
    left_in,
    rows_of,
    upload,
    zipped,
)

GOOD = '{"prompt": "p", "completion": "c"}'
SHARED = Path(__file__).resolve().parents[4] / "shared" / "data" / "datasets"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with dataset_service(tmp_path_factory.mktemp("datasets")) as made:
        yield made


def folder(service: DatasetService) -> Path:
    return service._files._folder


def test_bad_lines_are_named_and_the_good_ones_kept_if_asked(service: DatasetService) -> None:
    content = "\n".join([GOOD, "{broken", GOOD, '{"prompt": "p"}', "[1]", GOOD]).encode()
    with pytest.raises(DatasetRejected) as caught:
        upload(service, content)
    assert [error["line"] for error in caught.value.extras["errors"]] == [2, 4, 5]
    assert caught.value.extras["good_rows"] == 3
    record = upload(service, content, on_bad_rows="skip")
    assert (record.rows, record.rejected_rows) == (3, 3)
    assert "line 4: 'completion' is missing" in record.warnings[0]


@pytest.mark.parametrize(
    ("content", "filename", "words"),
    [
        (b"", "a.jsonl", "empty"),
        (b'{"x": "p", "y": "c"}', "a.jsonl", "not recognised"),
        (b"[]", "a.json", "no rows"),
        (b"prompt,completion\n", "a.csv", "no rows"),
        (b"{broken\n{broken", "a.jsonl", "no row can be used"),
        (gzipped(as_jsonl([{"prompt": "p"}])), "a.gz", "nothing to learn from"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_and_leaves_nothing(
    service: DatasetService, content: bytes, filename: str, words: str
) -> None:
    before = left_in(folder(service))
    with pytest.raises(DatasetRejected, match=words):
        upload(service, content, filename)
    assert left_in(folder(service)) == before


def test_a_file_over_the_limit_is_refused_while_it_comes(service: DatasetService) -> None:
    before = left_in(folder(service))
    with pytest.raises(TooLarge):
        upload(service, b"x" * (2**20 + 1))
    assert left_in(folder(service)) == before


def test_rows_that_grow_beyond_measure_are_refused(tmp_path: Path) -> None:
    """Parquet writes a repeated text once: a small file may hold rows without end."""
    content = as_parquet([{"prompt": "x" * 10_000, "completion": "c"}] * 200)
    with dataset_service(tmp_path, max_upload_bytes=100_000) as service:
        assert len(content) < 100_000
        with pytest.raises(DatasetRejected, match="The rows take more than"):
            upload(service, content, "a.parquet")
        assert left_in(folder(service)) == ["content"]


def test_what_was_found_is_said(service: DatasetService) -> None:
    rows = [{"instruction": "i", "context": "c", "response": "r", "category": "x"}] * 2
    record = upload(service, gzipped(as_csv(rows, "\t")), "dolly.csv.gz")
    manifest = service.manifest(record.id)
    assert record.format == "alpaca"
    assert manifest.detected[0] == "a table separated by tabs, gzip, utf-8"
    assert "'instruction' and 'response'" in manifest.detected[1] and "context" in manifest.detected[1]
    assert manifest.unused_columns == ("category",)
    assert record.warnings == [
        "1 rows repeat an earlier row; they are kept (line 3 repeats line 2)",
        "the columns ['category'] are not used",
    ]


def test_text_that_is_not_what_it_seems_is_told(service: DatasetService) -> None:
    rows = [{"prompt": "Ça va ?", "completion": "Oui {{name}}<|im_end|>"}]
    record = upload(service, as_jsonl(rows).decode().encode("latin-1"))
    assert rows_of(service, record.id)[0]["messages"][0]["content"] == "Ça va ?"
    assert sorted(warning.split(",")[0] for warning in record.warnings) == [
        "'a.jsonl' is not UTF-8; it was read as Windows-1252 (Latin-1)",
        "1 rows hold '<|im_end|>'",
        "1 rows hold '{{name}}'",
    ]


def test_the_same_content_is_on_the_disk_once(tmp_path: Path) -> None:
    content = as_jsonl([{"prompt": "p" * 1000, "completion": "c"}] * 50)
    with dataset_service(tmp_path) as service:
        first, second = upload(service, content, "a.jsonl"), upload(service, content, "b.jsonl")
        other = upload(service, as_json([{"prompt": "p" * 1000, "completion": "c"}] * 50), "b.json")
        paths = [service.folder(record.id) / "original" / "0000" for record in (first, second)]
        assert os.path.samefile(*paths)
        assert os.path.samefile(service.rows_path(first.id), service.rows_path(other.id))
        assert [service.download(record.id, "original").filename for record in (first, second)] == [
            "a.jsonl",
            "b.jsonl",
        ]
        service.delete(first.id)
        assert paths[1].read_bytes() == content
        for record in (second, other):
            service.delete(record.id)
        assert left_in(folder(service)) == ["content"]


def test_each_objective_takes_its_kind_of_rows_and_the_refusal_names_the_others(service: DatasetService) -> None:
    preferences = upload(service, b'{"prompt": "q", "chosen": "a", "rejected": "b"}')
    judged = upload(service, b'{"prompt": "q", "completion": "a", "label": true}')
    answers = upload(service, GOOD.encode())
    assert (preferences.format, preferences.rows) == ("preference", 1)
    assert service.check_trainable(preferences.id, "assistant", "dpo") == preferences
    assert service.check_trainable(preferences.id, "assistant", "orpo") == preferences
    assert service.check_trainable(judged.id, "assistant", "kto") == judged
    with pytest.raises(DatasetNotTrainable, match=r"holds preferences; objective='sft' learns .* it is dpo or orpo"):
        service.check_trainable(preferences.id, "assistant")
    with pytest.raises(DatasetNotTrainable, match=r"holds judged answers .* Here it is kto"):
        service.check_trainable(judged.id, "assistant", "dpo")
    with pytest.raises(DatasetNotTrainable, match=r"holds answers or text; objective='kto' .* Here it is sft"):
        service.check_trainable(answers.id, "assistant", "kto")


def test_a_dataset_whose_every_answer_has_weight_0_is_refused_for_training(service: DatasetService) -> None:
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "b", "weight": 0},
    ]
    record = upload(service, json.dumps({"messages": turns}).encode())
    assert service.check_trainable(record.id, "assistant") == service.check_trainable(record.id, "all") == record
    with pytest.raises(DatasetNotTrainable, match="every last answer has weight 0"):
        service.check_trainable(record.id, "last_assistant")


def test_leftovers_of_a_cut_off_upload_are_removed(tmp_path: Path) -> None:
    with dataset_service(tmp_path) as service:
        kept = upload(service, GOOD.encode())
        before = left_in(folder(service))
        half = folder(service) / "ds_half.tmp" / "original"
        half.mkdir(parents=True)
        (half / "0000").write_bytes(b"half")
        os.link(half / "0000", folder(service) / "content" / ("0" * 64))
        service.remove_leftovers()
        assert left_in(folder(service)) == before
        assert service.preview(kept.id, 0, 1)


def test_a_dataset_of_the_first_version_can_still_be_used(tmp_path: Path) -> None:
    with dataset_service(tmp_path) as service:
        record = upload(service, GOOD.encode())
        place = service.folder(record.id)
        (place / "dataset.json").unlink()
        os.replace(place / "original" / "0000", place / "old")
        (place / "original").rmdir()
        os.replace(place / "old", place / "original")
        assert service.check_trainable(record.id, "assistant") == record
        assert Path(service.download(record.id, "original").content).read_text() == GOOD  # type: ignore[arg-type]
        service.delete(record.id)


def test_a_reader_that_dies_is_an_error_of_one_upload(tmp_path: Path) -> None:
    def die(_request: IntakeRequest, _report: Any) -> IntakeResult:
        raise DatasetRejected("The process that read the file ended with signal 11; its file is broken.", errors=[])

    with dataset_service(tmp_path, read=die) as service:
        with pytest.raises(DatasetRejected, match="signal 11"):
            upload(service, GOOD.encode())
        assert left_in(folder(service)) == ["content"]


def test_the_reader_of_its_own_process_says_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(gzipped(as_parquet([{"prompt": f"p{n}", "completion": "c"} for n in range(5000)])))
    request = IntakeRequest([(str(tmp_path / "file"), "a")], str(tmp_path), None, {}, False, None, None, 2**30)
    seen: list[int] = []
    result = read_in_process(request, lambda rows, _size: seen.append(rows))
    assert (result.rows, result.format, sorted({*seen} - {0})) == (5000, "prompt_completion", [2000, 4000])
    (tmp_path / "file").write_bytes(b"{broken")
    with pytest.raises(DatasetRejected, match="not JSON") as caught:
        read_in_process(request, lambda *_: None)
    assert caught.value.extras["errors"][0]["line"] == 1
    monkeypatch.setattr("services.datasets.worker._BACKEND", tmp_path)  # no module there: it dies at once
    with pytest.raises(DatasetRejected, match="exit code 1"):
        read_in_process(request, lambda *_: None)


def test_a_reader_is_ended_by_what_its_report_raises_however_long_it_is_silent(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "never")  # whoever opens it waits for a writer that does not come
    request = IntakeRequest([(str(tmp_path / "never"), "a")], str(tmp_path), None, {}, False, None, None, 2**30)

    def unwanted(*_: int) -> None:
        raise ImportCancelled("as told")

    with pytest.raises(ImportCancelled):
        read_in_process(request, unwanted)
    assert [child for child in psutil.Process().children() if "services.datasets.intake" in child.cmdline()] == []


def test_an_import_that_is_cancelled_leaves_nothing_wherever_it_is(tmp_path: Path) -> None:
    service: DatasetService

    def cancel_while_reading(request: IntakeRequest, report: Any) -> IntakeResult:
        result = read_dataset(request, report)
        service.imports.cancel(service.imports.all()[0].id)
        return result

    with dataset_service(tmp_path, read=cancel_while_reading) as service:
        with pytest.raises(ImportCancelled):
            upload(service, GOOD.encode())
        with service.imports.running("x", "receiving", None) as progress:
            draft = service.draft(progress)
            file = draft.receive("a.jsonl")
            file.write(b"{")
            assert service.imports.cancel(progress.id) is progress
            with pytest.raises(ImportCancelled):
                file.write(b"}")
            file.abandon()
            service.discard(draft)
        with pytest.raises(ImportNotFound):
            service.imports.cancel(progress.id)
        assert left_in(folder(service)) == ["content"]


# Whatever the format and the file, the same rows.

words = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12).filter(str.strip)
plain = st.builds(lambda role, text: {"role": role, "content": text}, st.just("assistant"), words)
weighted = st.builds(lambda turn: {**turn, "weight": 0}, plain)
calling = st.builds(
    lambda name, arguments: {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}],
    },
    words,
    st.dictionaries(words, st.one_of(words, st.integers(-9, 9), st.none()), max_size=2),
)
thinking = st.builds(lambda turn, text: {**turn, "reasoning_content": text}, plain, words)
exchanges = st.lists(
    st.tuples(st.builds(lambda text: {"role": "user", "content": text}, words), st.one_of(plain, weighted, thinking)),
    min_size=1,
    max_size=3,
).map(lambda pairs: [turn for pair in pairs for turn in pair])
with_tools = st.builds(
    lambda call, result, rest, tool: {
        "messages": [rest[0], call, {"role": "tool", "content": result}, *rest[1:]],
        "tools": [{"type": "function", "function": {"name": tool, "parameters": {"type": "object"}}}],
    },
    calling,
    words,
    exchanges,
    words,
)
conversations = st.one_of(exchanges.map(lambda turns: {"messages": turns}), with_tools)
preferences = st.builds(
    lambda asked, good, bad: {
        "prompt": [{"role": "user", "content": asked}],
        "chosen": [{"role": "assistant", "content": good}],
        "rejected": [{"role": "assistant", "content": bad + "!" if bad == good else bad}],
    },
    words,
    words,
    words,
)
judged = st.builds(
    lambda asked, said, label: {
        "prompt": [{"role": "user", "content": asked}],
        "completion": [{"role": "assistant", "content": said}],
        "label": label,
    },
    words,
    words,
    st.booleans(),
)
texts = st.builds(lambda text: {"text": text}, words)
datasets = st.one_of(*(st.lists(kind, min_size=1, max_size=4) for kind in (conversations, preferences, judged, texts)))
_FILES: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "jsonl": as_jsonl,
    "json": as_json,
    "csv": lambda rows: as_csv(rows, newline="\r\n"),
    "tsv": lambda rows: as_csv(rows, "\t", "\r\n"),
    "parquet": as_parquet,
}
_PACKING = {
    "": lambda content, _name: content,
    ".gz": lambda content, _name: gzipped(content),
    ".zip": zipped,
}


@given(datasets, st.sampled_from(sorted(_FILES)), st.sampled_from(sorted(_PACKING)), st.data())
def test_normal_rows_written_in_any_file_come_back_the_same(
    service: DatasetService, rows: list[dict[str, Any]], kind: str, packing: str, data: st.DataObject
) -> None:
    content = _FILES[kind](rows)
    if kind != "parquet":
        content = content.decode().encode(data.draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16"])))
    name = f"a.{kind}"
    record = upload(service, _PACKING[packing](content, name), name + packing)
    assert rows_of(service, record.id) == rows
    again = upload(service, Path(service.download(record.id, "normalised").content).read_bytes())  # type: ignore[arg-type]
    assert rows_of(service, again.id) == rows
    assert service.manifest(again.id).rows_sha256 == service.manifest(record.id).rows_sha256


pairs = st.lists(st.tuples(words, words, words), min_size=1, max_size=4)
_SHAPES: dict[str, Callable[[str, str, str], dict[str, Any]]] = {
    "alpaca": lambda a, b, c: {"instruction": a, "output": b, "system": c},
    "sharegpt": lambda a, b, c: {
        "conversations": [{"from": "human", "value": a}, {"from": "gpt", "value": b}],
        "system": c,
    },
    "messages": lambda a, b, c: {
        "messages": [
            {"role": "developer", "content": c},
            {"role": "user", "content": [{"type": "text", "text": a}]},
            {"role": "assistant", "content": b},
        ]
    },
    "prompt_completion": lambda a, b, c: {"system_prompt": c, "question": a, "answer": b},
}


@given(pairs, st.sampled_from(sorted(_FILES)))
def test_every_format_of_the_same_content_gives_the_same_rows(
    service: DatasetService, content: list[tuple[str, str, str]], kind: str
) -> None:
    found = []
    for format_, shape in _SHAPES.items():
        record = upload(service, _FILES[kind]([shape(*row) for row in content]), f"a.{kind}")
        assert record.format == format_
        found.append(rows_of(service, record.id))
    assert all(rows == found[0] for rows in found)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not here")
@pytest.mark.parametrize("path", sorted(SHARED.rglob("*.*")) if SHARED.is_dir() else [], ids=lambda path: path.name)
def test_published_files_are_taken_or_refused_with_advice(tmp_path: Path, path: Path) -> None:
    expected = _PUBLISHED.get(path.name)
    with dataset_service(tmp_path, max_upload_bytes=2**26) as service:
        try:
            record = upload(service, path.read_bytes(), path.name)
        except DatasetRejected as error:
            assert expected is not None and expected in error.detail, error.detail
            return
        assert expected is None
        rows = rows_of(service, record.id)
        assert len(rows) == record.rows > 0
        again = upload(service, service.rows_path(record.id).read_bytes())
        assert rows_of(service, again.id) == rows


_PUBLISHED = {
    "code_alpaca_2k.json": "line 1187: 'output' is empty",
    "awesome_chatgpt_prompts_2025-01.csv": "no column is known to hold the answers",
    "waimai_10k.csv": "not recognised",
    "axolotl_conversation_missingturns.json": "conversations[1].content is empty",
    "instructionwild_seed_prompts_ch.jsonl": "nothing to learn from",
    "unsloth_plan_vs_answer.jsonl": '"completion": "text"',
    "logic_rl_3ppl_train.parquet": "no column is known to hold the answers",
    "verl_arithmetic_train.parquet": "nothing to learn from",
    "HumanEval.jsonl.gz": "no column is known to hold the answers",
    "alpaca_seed_tasks.jsonl": "instances.0.output",
    "mtbench_question.jsonl": "not recognised",
}
