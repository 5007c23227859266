"""Uploads: read by line, kept whole or refused with what is wrong, nothing half stored."""

import io
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import DatasetRejected
from services.dataset_service import DatasetService, Upload
from store.database import Database


class FixedClock:
    def now(self) -> datetime:
        return datetime(2026, 1, 1, tzinfo=UTC)

    def monotonic(self) -> float:
        return 0.0


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("datasets")
    database = Database(f"sqlite:///{folder / 'studio.db'}")
    database.migrate()
    yield DatasetService(database, folder / "datasets", FixedClock(), max_upload_bytes=2**20)
    database.close()


def upload(service: DatasetService, content: bytes, filename: str = "a.jsonl", **options: Any) -> Any:
    values = {"name": "", "format": None, "column_map": {}, "on_bad_rows": "reject"} | options
    return service.add(Upload(file=io.BytesIO(content), filename=filename, **values))


GOOD = '{"prompt": "p", "completion": "c"}'


@pytest.mark.parametrize(
    ("filename", "content", "rows"),
    [
        ("a.jsonl", GOOD + "\n\n" + GOOD, 2),
        ("a.jsonl", "\ufeff" + GOOD, 1),
        ("a.jsonl", GOOD.replace(", ", ",") + "\r\n" + GOOD, 2),
        ("a.json", f"[{GOOD}, {GOOD}, {GOOD}]", 3),
        ("a.json", GOOD + "\n" + GOOD, 2),
        ("a.json", json.dumps({"prompt": "p", "completion": "c"}, indent=2), 1),
        ("a.csv", 'prompt,completion\n"two\nlines",c\np,c\n', 2),
        ("a.csv", "prompt\tcompletion\np\tc\n", 1),
        ("a.tsv", "instruction\tinput\toutput\ni\t\to\n", 1),
    ],
)
def test_files_as_people_name_them(service: DatasetService, filename: str, content: str, rows: int) -> None:
    assert upload(service, content.encode(), filename).rows == rows


def test_bad_lines_are_named_and_the_good_ones_kept_if_asked(service: DatasetService) -> None:
    content = "\n".join([GOOD, "{broken", GOOD, '{"prompt": "p"}', "[1]", GOOD]).encode()
    with pytest.raises(DatasetRejected) as caught:
        upload(service, content)
    assert [error["line"] for error in caught.value.extras["errors"]] == [2, 4, 5]
    assert caught.value.extras["good_rows"] == 3
    record = upload(service, content, on_bad_rows="skip")
    assert (record.rows, record.rejected_rows) == (3, 3)
    assert "line 4: 'completion' is missing" in record.warnings[0]


def test_line_numbers_of_csv_count_the_lines_inside_cells(service: DatasetService) -> None:
    content = b'prompt,completion\n"a\nb\nc",x\nonly one column\n'
    with pytest.raises(DatasetRejected) as caught:
        upload(service, content, "a.csv")
    assert [error["line"] for error in caught.value.extras["errors"]] == [5]


@pytest.mark.parametrize(
    ("content", "filename", "words"),
    [
        (b"", "a.jsonl", "empty"),
        (b"hello", "a.txt", "neither JSON"),
        ('{"prompt": 1}'.encode("utf-16"), "a.jsonl", "UTF-16"),
        (b'[{"prompt": "p"', "a.json", "not JSON"),
        (b'{"x": "p", "y": "c"}', "a.jsonl", "not recognised"),
        (b"[]", "a.json", "no rows"),
        (b'{"prompt": "\xff", "completion": "c"}', "a.jsonl", "not UTF-8"),
        (b'{"prompt": NaN, "completion": "c"}', "a.jsonl", "NaN"),
        (b"[" * 100_000, "a.json", "nested too deeply"),
        (b'{"prompt": "' + b"x" * 2**20 + b'"}', "a.jsonl", "larger than"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_and_leaves_nothing(
    service: DatasetService, content: bytes, filename: str, words: str
) -> None:
    before = sorted(path.name for path in service._folder.iterdir())
    with pytest.raises(DatasetRejected, match=words):
        upload(service, content, filename)
    assert sorted(path.name for path in service._folder.iterdir()) == before


def test_columns_are_mapped_by_hand(service: DatasetService) -> None:
    content = b'{"ask": "p", "reply": "c"}'
    record = upload(service, content, column_map={"prompt": "ask", "completion": "reply"})
    assert record.format == "prompt_completion"
    assert [turn["content"] for turn in service.preview(record.id, 0, 1)[0]] == ["p", "c"]
    with pytest.raises(DatasetRejected, match="column_map names"):
        upload(service, content, column_map={"prompt": "nothing"})


def test_repeated_rows_are_said(service: DatasetService) -> None:
    assert "1 rows repeat" in upload(service, f"{GOOD}\n{GOOD}".encode()).warnings[0]


text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(str.strip)


@given(st.lists(st.tuples(text, text), min_size=1, max_size=5), st.sampled_from(["jsonl", "json"]))
def test_what_is_uploaded_is_what_is_trained_on(
    service: DatasetService, pairs: list[tuple[str, str]], kind: str
) -> None:
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    content = json.dumps(rows) if kind == "json" else "\n".join(json.dumps(row) for row in rows)
    record = upload(service, content.encode(), f"a.{kind}")
    read = [tuple(turn["content"] for turn in row) for row in service.preview(record.id, 0, 10)]
    assert read == pairs


def test_leftovers_of_a_cut_off_upload_are_removed(service: DatasetService) -> None:
    kept = upload(service, GOOD.encode())
    (service._folder / "ds_half.tmp").mkdir()
    service.remove_leftovers()
    names = {path.name for path in Path(service._folder).iterdir()}
    assert kept.id in names and "ds_half.tmp" not in names
