"""Tables as spreadsheets and pandas write them: what is not needed never hinders, and what is left out is said."""

import io
import json
import zipfile
from collections.abc import Iterator
from datetime import date, datetime, time
from pathlib import Path
from typing import Any

import openpyxl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import DatasetRejected
from services.dataset_service import DatasetService
from store.records import DatasetRecord
from tests.support.datasets_double import dataset_service, gzipped, rows_of, upload, zipped

PAIRS = [{"prompt": f"p{n}", "completion": f"c{n}"} for n in range(3)]


@pytest.fixture
def service(tmp_path: Path) -> Iterator[DatasetService]:
    with dataset_service(tmp_path, max_upload_bytes=2**24) as service:
        yield service


def said(service: DatasetService, dataset: DatasetRecord) -> list[tuple[str, str]]:
    """The first and the last words of each row."""
    rows = rows_of(service, dataset.id)
    return [(row["messages"][0]["content"], row["messages"][-1]["content"]) for row in rows]


def workbook(*sheets: tuple[str, list[list[Any]]], hidden: tuple[str, ...] = ()) -> bytes:
    book = openpyxl.Workbook()
    book.remove(book.active)
    for title, rows in sheets:
        sheet = book.create_sheet(title)
        for row in rows:
            sheet.append(row)
        sheet.sheet_state = "hidden" if title in hidden else "visible"
    out = io.BytesIO()
    book.save(out)
    return out.getvalue()


def as_csv(rows: list[list[str | None]], mark: str) -> bytes:
    return "".join(mark.join(cell or "" for cell in row) + "\r\n" for row in rows).encode()


def as_split(rows: list[list[str | None]]) -> bytes:
    return json.dumps({"columns": rows[0], "index": list(range(len(rows) - 1)), "data": rows[1:]}).encode()


WRITERS = {
    "a.csv": lambda rows: as_csv(rows, ","),
    "semicolons.csv": lambda rows: as_csv(rows, ";"),
    "a.tsv": lambda rows: as_csv(rows, "\t"),
    "sep.csv": lambda rows: b"sep=^\r\n" + as_csv(rows, "^"),
    "a.xlsx": lambda rows: workbook(("s", rows)),
    "a.json": as_split,
}


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_columns_without_a_name_never_hinder_and_are_said(service: DatasetService, name: str) -> None:
    rows = [
        ["prompt", "completion", "", "", ""],
        ["p0", "c0", None, None, None],
        ["p1", "c1", None, None, "and the bus too"],
    ]
    dataset = upload(service, WRITERS[name](rows), name)
    assert said(service, dataset) == [("p0", "c0"), ("p1", "c1")]
    assert (list(dataset.columns), list(service.manifest(dataset.id).unused_columns)) == (
        ["prompt", "completion", "column 5"],
        ["column 5"],
    )
    words = " ".join(dataset.warnings)
    assert "1 rows have text in 'column 5', which has no name" in words
    if name != "a.xlsx":  # where the file itself ends with the last value, there is no empty column to tell of
        assert "columns 3-4 have no name and no value" in words


@pytest.mark.parametrize("name", sorted(WRITERS))
@pytest.mark.parametrize(
    ("header", "mapping", "found"),
    [
        (["v1", "v2", "", "", ""], {"completion": "v1", "prompt": "v2"}, [("p", "c")]),
        (["", "v1", "v2"], {"completion": "v1", "prompt": "v2"}, [("p", "c")]),
        (["", "v1", "v2"], {"completion": "column 2", "prompt": "v2"}, None),
        (["", "v1", ""], {"completion": "v1", "prompt": "column 3"}, [("p", "c")]),
        (["v1", "v1", "v2"], {"completion": "v1 (column 2)", "prompt": "v2"}, [("p", "c")]),
        (["v1", "v1", "v2"], {"completion": "v1", "prompt": "v2"}, None),
    ],
)
def test_a_column_map_names_any_column(
    service: DatasetService, name: str, header: list[str], mapping: dict[str, str], found: Any
) -> None:
    values: list[str | None] = (
        ["c", "p", None, None, None] if header[0] == "v1" and header[1] == "v2" else ["x", "c", "p"]
    )
    content = WRITERS[name]([header, values])
    if found is None:
        with pytest.raises(DatasetRejected, match="column_map names") as refusal:
            upload(service, content, name, column_map=mapping)
        if "v1" in mapping.values():
            assert "they are called ['v1 (column 1)', 'v1 (column 2)']" in refusal.value.detail
        return
    assert said(service, upload(service, content, name, column_map=mapping)) == found


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_two_columns_of_one_name_are_an_error_only_if_one_is_read(service: DatasetService, name: str) -> None:
    write = WRITERS[name]
    dataset = upload(service, write([["id", "prompt", "id", "completion"], ["1", "p", "2", "c"]]), name)
    assert said(service, dataset) == [("p", "c")]
    assert list(service.manifest(dataset.id).unused_columns) == ["id (column 1)", "id (column 3)"]
    assert "'id' more than once" in " ".join(dataset.warnings)
    for header in (["prompt", "prompt", "completion"], ["prompt", "completion", "completion"]):
        with pytest.raises(DatasetRejected, match="more than once"):
            upload(service, write([header, ["a", "b", "c"]]), name)
    # A column that a format reads beside those that it needs.
    with pytest.raises(DatasetRejected, match=r"\['input'\] more than once"):
        upload(service, write([["instruction", "input", "input", "output"], ["a", "b", "c", "d"]]), name)


def test_cells_behind_the_header_are_dropped_if_empty_and_refused_if_not(service: DatasetService) -> None:
    dataset = upload(service, b"prompt,completion\np,c,,\n", "a.csv")
    assert said(service, dataset) == [("p", "c")]
    with pytest.raises(DatasetRejected, match="4 columns where the header has 2"):
        upload(service, b"prompt,completion\np,c,,d\n", "a.csv")
    with pytest.raises(DatasetRejected, match="1 columns where the header has 2"):
        upload(service, b"prompt,completion\np\n", "a.csv")


@settings(max_examples=20)
@given(st.lists(st.sampled_from(["", " ", "prompt", "completion", "id", "column 1"]), min_size=1, max_size=6))
def test_any_header_is_read_or_refused_in_words(tmp_path_factory: pytest.TempPathFactory, header: list[str]) -> None:
    with dataset_service(tmp_path_factory.mktemp("header")) as service:
        content = as_csv([list(header), [f"v{n}" for n in range(len(header))]], ",")
        try:
            dataset = upload(service, content, "a.csv")
        except DatasetRejected as refusal:
            assert not header.count("prompt") == header.count("completion") == 1, refusal.detail
            return
        expected = (f"v{header.index('prompt')}", f"v{header.index('completion')}")
        assert said(service, dataset) == [expected]


@pytest.mark.parametrize("first", ["sep=;", "SEP=;", '"sep=;"', "\ufeffsep=;"])
def test_a_line_that_names_the_separator_is_none_of_the_rows(service: DatasetService, first: str) -> None:
    content = f"{first}\r\nprompt;completion\r\n" + '"a, b, c, d";"x"\r\n'
    assert said(service, upload(service, content.encode(), "a.csv")) == [("a, b, c, d", "x")]


def packed(*names: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name in names:
            archive.writestr(name, "application/vnd.oasis.opendocument.spreadsheet")
    return out.getvalue()


def columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def labelled(values: list[Any], labels: str = "0123456789") -> dict[str, Any]:
    return dict(zip(labels, values, strict=False))


FRAMES = {
    "columns": {name: labelled(values) for name, values in columns(PAIRS).items()},
    "columns, labels": {name: labelled(values, "xyz") for name, values in columns(PAIRS).items()},
    "index": labelled(PAIRS),
    "index, labels": labelled(PAIRS, "xyz"),
    "split": {"columns": list(PAIRS[0]), "index": [0, 1, 2], "data": [list(row.values()) for row in PAIRS]},
    "split, no index": {"columns": list(PAIRS[0]), "data": [list(row.values()) for row in PAIRS]},
    "table": {
        "schema": {"fields": [], "primaryKey": ["index"], "pandas_version": "1.4.0"},
        "data": [{"index": n, **row} for n, row in enumerate(PAIRS)],
    },
    "lists": columns(PAIRS),
}


@pytest.mark.parametrize("form", sorted(FRAMES))
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_every_form_of_a_pandas_table_is_read(
    service: DatasetService, form: str, indent: int | None, name: str
) -> None:
    if indent is not None and name == "a.jsonl":
        return  # a row a line is what the name says
    content = json.dumps(FRAMES[form], indent=indent).encode()
    for stored in (content, gzipped(content), zipped(content, name)):
        dataset = upload(service, stored, name)
        assert said(service, dataset) == [(row["prompt"], row["completion"]) for row in PAIRS]
        assert "the file is one object, read as a" in " ".join(dataset.warnings)


def test_a_pandas_table_of_conversations_and_unknown_columns(service: DatasetService) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert (
        said(service, upload(service, json.dumps({"messages": {"0": turns, "1": turns}}).encode())) == [("q", "a")] * 2
    )
    frame = {"frage": {"0": "p0", "1": "p1"}, "antwort": {"0": "c0", "1": "c1"}}
    mapping = {"prompt": "frage", "completion": "antwort"}
    dataset = upload(service, json.dumps(frame).encode(), column_map=mapping)
    assert said(service, dataset) == [("p0", "c0"), ("p1", "c1")]


def test_one_row_is_no_table(service: DatasetService) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows: list[dict[str, Any]] = [
        {"messages": turns, "tools": [{"name": "f"}, {"name": "g"}]},
        {"prompt": turns[0], "completion": turns[1]},
        {"prompt": turns[:1], "completion": turns[1:]},
        {"prompt": "q", "completion": "a"},
    ]
    for row in rows:
        assert said(service, upload(service, json.dumps(row).encode())) == [("q", "a")]
    with pytest.raises(DatasetRejected, match="no column names"):
        upload(service, b'[["q", "a"]]', "a.json")


def test_a_pandas_table_may_be_longer_than_a_row_and_a_row_may_not(tmp_path: Path) -> None:
    with dataset_service(tmp_path, max_upload_bytes=2**26) as service:
        values = {str(n): "x" * 2**10 for n in range(5000)}
        table = json.dumps({"prompt": values, "completion": values}).encode()
        assert upload(service, table, "a.json").rows == 5000
        row = {"messages": [{"role": "user", "content": "x" * 9 * 2**20}, {"role": "assistant", "content": "a"}]}
        for indent in (None, 1):
            with pytest.raises(DatasetRejected, match="the row is longer"):
                upload(service, json.dumps(row, indent=indent).encode(), "a.json")


def test_a_workbook_is_read_as_excel_shows_it(service: DatasetService) -> None:
    values = [
        ("  indented\n\tcode ", "  indented\n\tcode "),
        (42, "42"),
        (1.0, "1"),
        (0.1, "0.1"),
        (True, "TRUE"),
        (date(2026, 5, 1), "2026-05-01"),
        (datetime(2026, 5, 1, 13, 30), "2026-05-01 13:30:00"),
        (time(13, 30), "13:30:00"),
        ("line_x000D_\nbreak", "line\nbreak"),
        ("12007 ", "12007 "),
    ]
    rows: list[list[Any]] = [[], [None, None, "prompt", "completion", None], []]
    rows += [[None, None, "p", value] for value, _ in values]
    dataset = upload(service, workbook(("empty", []), ("rows", rows), ("notes", [])), "a.xlsx")
    assert [answer for _, answer in said(service, dataset)] == [text for _, text in values]
    assert list(dataset.columns) == ["prompt", "completion"]
    assert service.manifest(dataset.id).detected[0] == "an Excel workbook"


def test_sheets_that_are_not_read_are_said(service: DatasetService) -> None:
    rows = [["prompt", "completion"], ["p", "c"]]
    dataset = upload(service, workbook(("hidden", rows), ("one", rows), ("two", rows), hidden=("hidden",)), "a.xlsx")
    assert any("only the sheet 'one' is read; ['two', 'hidden']" in warning for warning in dataset.warnings)
    assert upload(service, workbook(("hidden", rows), ("v", []), hidden=("hidden",)), "a.xlsx").rows == 1
    with pytest.raises(DatasetRejected, match="no rows"):
        upload(service, workbook(("empty", [])), "a.xlsx")


def test_formulas_without_a_result_and_errors_are_said(service: DatasetService) -> None:
    rows = [["prompt", "completion", "n"], ["p", "c", "=1+1"], ["p", "d", "#N/A"]]
    dataset = upload(service, workbook(("s", rows)), "a.xlsx")
    assert dataset.rows == 2
    assert "1 cells hold a formula without its result" in " ".join(dataset.warnings)
    assert "1 cells hold an error" in " ".join(dataset.warnings)
    for rows in ([["p", "=1+1"]], [["p", "c"], ["p", "=1+1"]]):
        with pytest.raises(DatasetRejected, match="1 cells hold a formula without its result"):
            upload(service, workbook(("s", [["prompt", "completion"], *rows])), "a.xlsx")


def test_a_workbook_that_bursts_or_is_broken_is_refused(
    service: DatasetService, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = workbook(("s", [["prompt", "completion"], *[["p", "x" * 30_000]] * 300]))
    with pytest.raises(DatasetRejected, match=r"broken|cannot be read"):
        upload(service, content[: len(content) // 2], "a.xlsx")
    with pytest.raises(DatasetRejected, match="workbook cannot be read"):
        upload(service, packed("xl/workbook.xml"), "a.xlsx")
    with pytest.raises(DatasetRejected, match="send the workbook as it is"):
        upload(service, zipped(content, "a.xlsx"), "a.zip")
    monkeypatch.setattr("services.datasets.reading.excel_rows._RATIO_FROM_BYTES", 2**10)
    monkeypatch.setattr("services.datasets.reading.excel_rows._MAX_RATIO", 2)
    with pytest.raises(DatasetRejected, match="no data shrinks that much"):
        upload(service, content, "a.xlsx")


def test_a_cell_in_the_last_column_or_row_costs_nothing(service: DatasetService) -> None:
    book = openpyxl.Workbook()
    for at, value in {"A1": "prompt", "B1": "completion", "A2": "p", "B2": "c", "XFD2": "far", "A1048576": "p"}.items():
        book.active[at] = value
    book.active["B1048576"] = "d"
    out = io.BytesIO()
    book.save(out)
    dataset = upload(service, out.getvalue(), "a.xlsx")
    assert said(service, dataset) == [("p", "c"), ("p", "d")]


@pytest.mark.parametrize(
    ("content", "name", "words"),
    [
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), "a.xls", r"before 2007 \(.xls\), or one with a password"),
        (b"ARROW1\x00\x00", "a.feather", "Arrow"),
        (b"FEA1\x00", "a.feather", "Feather"),
        (b"ORC\x00\x01", "a.orc", "ORC"),
        (b"Obj\x01avro", "a.avro", "Avro"),
        (b"\x89HDF\r\n\x1a\n", "a.h5", "HDF5"),
        (b"SQLite format 3\x00", "a.db", "SQLite"),
        (b"\x80\x04\x95", "a.pkl", "pickle"),
        (b"%PDF-1.7", "a.pdf", "PDF"),
        (b"{\\rtf1 hello}", "a.rtf", "RTF"),
        (b"<html><table>", "a.xls", "web page"),
        (b'<?xml version="1.0"?>', "a.xml", "XML"),
        (packed("xl/workbook.bin"), "a.xlsb", "xlsb"),
        (packed("mimetype", "content.xml"), "a.ods", r"\(.ods\)"),
        (packed("word/document.xml"), "a.docx", "Word"),
        (packed("Index/Document.iwa"), "a.numbers", "Numbers"),
        (bytes(257) + b"ustar" + bytes(250), "a.tar", "tar"),
    ],
)
def test_other_files_are_named_with_what_to_do(service: DatasetService, content: bytes, name: str, words: str) -> None:
    with pytest.raises(DatasetRejected, match=words) as refusal:
        upload(service, content, name)
    assert any(advice in refusal.value.detail for advice in (".csv", ".txt", "JSON lines", "zip"))


def test_text_that_begins_like_another_file_is_text(service: DatasetService) -> None:
    assert upload(service, b"<html>\nORC\n", "a.txt").rows == 2
    assert upload(service, b"ORC,prompt,completion\n1,p,c\n", "a.csv").rows == 1
    assert upload(service, b"FEA1,prompt,completion\n1,p,c\n", "a.csv").rows == 1
