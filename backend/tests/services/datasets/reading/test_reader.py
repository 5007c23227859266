"""Any container, encoding and line ending gives the same rows; what is broken is named by its line."""

import gzip
import io
import random
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import DatasetRejected
from services.datasets.reading import source_row
from services.datasets.reading.reader import NotUtf8, ReadOptions, open_rows, recognise
from services.datasets.reading.source_row import SourceRow
from tests.support.datasets_double import as_csv, as_json, as_jsonl, as_objects, as_parquet, gzipped, zipped

PAIRS = [{"prompt": f"p{n}", "completion": f"c{n}"} for n in range(5)]


def read(path: Path, content: bytes, name: str = "a.jsonl", **options: Any) -> list[SourceRow]:
    values = {"encoding": None, "text_rows": None, "max_bytes": 2**28} | options
    path = path / "file"
    path.write_bytes(content)
    told = ReadOptions(**values)
    try:
        with open_rows(path, name, told) as file:
            return list(file.rows)
    except NotUtf8:
        with open_rows(path, name, told, recognise(path, name, told)) as file:
            return list(file.rows)


def values(rows: list[SourceRow]) -> list[Any]:
    return [row.value for row in rows]


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (as_jsonl(PAIRS), "a.jsonl"),
        (as_jsonl(PAIRS), "a.json"),
        (as_jsonl(PAIRS), "a.txt"),
        (as_jsonl(PAIRS), "a"),
        (as_jsonl(PAIRS, "\r\n"), "a.jsonl"),
        (as_jsonl(PAIRS, "\r"), "a.jsonl"),
        (as_jsonl(PAIRS, "\n\n"), "a.jsonl"),
        (as_json(PAIRS), "a.json"),
        (as_json(PAIRS, indent=2), "a.jsonl"),
        (as_objects(PAIRS), "a.json"),
        (as_csv(PAIRS), "a.csv"),
        (as_csv(PAIRS).replace(b"\n", b"\r\n"), "a.csv"),
        (as_csv(PAIRS).replace(b"\n", b"\r"), "a.csv"),
        (as_csv(PAIRS, "\t"), "a.csv"),
        (as_csv(PAIRS, ";"), "a.csv"),
        (as_csv(PAIRS, "\t"), "a.tsv"),
        (as_csv(PAIRS), "a.tsv"),
        (as_parquet(PAIRS), "a.parquet"),
        (as_parquet(PAIRS), "a.bin"),
    ],
)
@pytest.mark.parametrize("packing", ["plain", "gzip", "zip", "gzip in zip"])
def test_the_same_rows_in_every_file(tmp_path: Path, content: bytes, name: str, packing: str) -> None:
    if "gzip" in packing:
        content, name = gzipped(content), name + ".gz"
    if "zip" in packing.split():
        content, name = zipped(content, name), "a.zip"
    assert values(read(tmp_path, content, name)) == PAIRS
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "cp1252"])
@pytest.mark.parametrize("write", [as_jsonl, as_json, as_csv])
def test_encodings_are_recognised(tmp_path: Path, encoding: str, write: Any) -> None:
    rows = [{"prompt": "Où est le café, à Liège ?", "completion": "Là-bas."}] * 3
    name = "a.csv" if write is as_csv else "a.json"
    assert values(read(tmp_path, write(rows).decode().encode(encoding), name)) == rows


def test_other_encodings_are_named_by_hand(tmp_path: Path) -> None:
    rows = [{"prompt": "你好吗?", "completion": "我很好,谢谢。"}] * 3
    content = as_jsonl(rows).decode().encode("gb18030")
    with pytest.raises(DatasetRejected, match="encoding=gb18030"):
        read(tmp_path, content)
    assert values(read(tmp_path, content, encoding="gb18030")) == rows
    with pytest.raises(DatasetRejected, match="not utf-8, as it was said"):
        read(tmp_path, content, encoding="utf-8")
    for name in ("klingon", "base64", "rot13"):
        with pytest.raises(DatasetRejected, match="not known"):
            read(tmp_path, content, encoding=name)


def test_broken_bytes_in_utf8_are_an_error_of_their_row(tmp_path: Path) -> None:
    rows = [{"prompt": "été", "completion": "là"}] * 3
    lines = as_jsonl(rows).split(b"\n")
    lines[1] = lines[1].replace("là".encode(), b"\xff")
    found = read(tmp_path, b"\n".join(lines))
    assert [(row.line, row.error) for row in found if row.error] == [(2, "not UTF-8 at byte 35")]
    with pytest.raises(DatasetRejected, match=r"Line 2: not UTF-8"):
        read(tmp_path, b"[" + b",\n".join(lines) + b"]", "a.json")


@pytest.mark.parametrize(
    ("text", "rows", "found"),
    [
        ("one\ntwo\n\nthree\n", None, ["one\ntwo", "three"]),
        ("one\r\ntwo\r\n \r\nthree", None, ["one\ntwo", "three"]),
        ("one\ntwo\n\n", None, ["one", "two"]),
        ("one\ntwo\n\nthree\n", "line", ["one", "two", "three"]),
        ("one\ntwo\n", "paragraph", ["one\ntwo"]),
        ("[Verse 1]\nla", None, ["[Verse 1]", "la"]),
        ("{not json\nla", None, ["{not json", "la"]),
    ],
)
def test_plain_text_by_lines_or_paragraphs(tmp_path: Path, text: str, rows: Any, found: list[str]) -> None:
    read_rows = read(tmp_path, text.encode(), "a.txt", text_rows=rows)
    assert [row.value for row in read_rows] == [{"text": text} for text in found]


def test_lines_are_counted_through_cells_objects_and_paragraphs(tmp_path: Path) -> None:
    assert [row.line for row in read(tmp_path, b'prompt,completion\n"a\nb\nc",x\nd,y\n', "a.csv")] == [2, 5]
    assert [row.line for row in read(tmp_path, as_json(PAIRS, indent=1), "a.json")] == [2, 6, 10, 14, 18]
    assert [row.line for row in read(tmp_path, as_objects(PAIRS), "a.json")] == [1, 5, 9, 13, 17]
    assert [row.line for row in read(tmp_path, b"a\nb\n\n\nc\n", "a.txt")] == [1, 5]


@pytest.mark.parametrize(
    ("content", "name", "words"),
    [
        (b"", "a.jsonl", "empty"),
        (b" \n ", "a.jsonl", "empty"),
        (b"hello", "a.dat", "neither JSON"),
        (b"\x00\x01\x02\x00", "a.jsonl", "binary"),
        (b'[{"prompt": "p"', "a.json", "Line 1: not JSON"),
        (
            b'[{"prompt": "p"}\n{"prompt": "q"}]',
            "a.json",
            "Line 2: not JSON: '\\[,]' is expected|Line 2: not JSON: ',' is",
        ),
        (b'[{"prompt": "p"},\n{"prompt": q}]', "a.json", "Line 2: not JSON: Expecting value"),
        (b'[{"prompt": "p",\n"prompt": "q"}]', "a.json", "there twice"),
        (b'[{"prompt": "p"}] more', "a.json", "more behind"),
        (b'{"prompt":\n"p"', "a.json", "Line 2: not JSON"),
        (b"[" * 100_000, "a.json", "nested too deeply"),
        (b'[{"n": ' + b"1" * 5000 + b"}]", "a.json", "not JSON"),
        (b'a,b\n"x"y,z\n', "a.csv", "not CSV"),
        (b"BZh91AY", "a.jsonl.bz2", "bzip2"),
        (gzip.compress(b'{"prompt": "p"}', mtime=0)[:-9], "a.gz", "broken or cut off"),
        (b"PK\x03\x04 no zip", "a.zip", "cannot be read"),
        (zipped(zipped(b"x", "b"), "a.zip"), "a.zip", "zip file inside"),
        (b"PAR1 no parquet", "a.parquet", "Parquet"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, content: bytes, name: str, words: str) -> None:
    with pytest.raises(DatasetRejected, match=words):
        read(tmp_path, content, name)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_bad_lines_are_named_and_reading_goes_on(tmp_path: Path) -> None:
    lines = [b"{broken", b'{"a": 1}', b"[1]", b'{"a": 1, "a": 2}', b'{"a": ' + b"[" * 9000, b'{"a": NaN}']
    found = read(tmp_path, b"\n".join(lines))
    assert [row.line for row in found if row.error] == [1, 3, 4, 5]
    assert [row.value for row in found if not row.error] == [{"a": 1}, {"a": None}]


def test_a_zip_of_several_files_names_them(tmp_path: Path) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("train.jsonl", b"{}")
        archive.writestr("../../test.jsonl", b"{}")
    with pytest.raises(DatasetRejected, match=r"train\.jsonl"):
        read(tmp_path, out.getvalue(), "a.zip")


@pytest.mark.parametrize("pack", [gzipped, lambda content: zipped(content, "a.jsonl")])
def test_a_bomb_is_refused_before_it_bursts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pack: Any) -> None:
    monkeypatch.setattr("services.datasets.reading.containers._RATIO_FROM_BYTES", 2**20)
    bomb = pack(b'{"prompt": "' + b"x" * 20 * 2**20 + b'"}')
    assert len(bomb) < 2**20
    with pytest.raises(DatasetRejected, match=r"holds more than|longer than"):
        read(tmp_path, bomb, "a.jsonl")
    lines = pack(b'{"prompt": "p"}\n' * 2**17)
    with pytest.raises(DatasetRejected, match="no data shrinks that much"):
        read(tmp_path, lines, "a.jsonl")
    with pytest.raises(DatasetRejected, match="the limit is 1000"):
        read(tmp_path, pack(as_jsonl(PAIRS) * 10), "a.jsonl", max_bytes=1000)


@pytest.mark.parametrize(
    ("head", "body", "tail", "name"),
    [
        (b'{"prompt": "p"}\n{"prompt": "', b"x", b'"}', "a.jsonl"),
        (b'[{"prompt": "p"},\n{"prompt": "', b"x", b'"}]', "a.json"),
        (b'[{"prompt": "p"},\n{"prompt": [', b"1,", b"1]}]", "a.json"),
        (b'{"prompt":\n"', b"x", b'"}', "a.json"),
        (b"prompt\np\n", b"x", b"", "a.csv"),
        (b'prompt\n"', b"x\n", b'"', "a.csv"),
        (b"p\n", b"x", b"", "a.txt"),
        (b"p\n\n", b"x\n", b"", "a.txt"),
    ],
)
def test_a_row_over_the_limit_is_refused_by_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head: bytes, body: bytes, tail: bytes, name: str
) -> None:
    content = head + body * (source_row.MAX_ROW_BYTES // len(body) + 1000) + tail
    with pytest.raises(DatasetRejected, match=r"(Line \d+: the row is longer|not CSV.*field larger)"):
        read(tmp_path, content, name)


def test_a_list_is_read_across_the_edges_of_what_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    rows = [{"n": n, "text": 'é\\"\n' * rng.randrange(40), "list": [1.5, None, {"a": "]}"}]} for n in range(300)]
    content = as_json(rows, indent=1)
    monkeypatch.setattr("services.datasets.reading.json_rows.CHUNK_BYTES", 37)
    assert values(read(tmp_path, content, "a.json")) == rows
    assert values(read(tmp_path, as_objects(rows), "a.json")) == rows


def test_columns_of_bytes_are_left_out_of_parquet_and_nulls_of_structs_dropped(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    turns = [[{"role": "user", "content": "q", "name": None}, {"role": "assistant", "content": "a", "name": "x"}]]
    out = io.BytesIO()
    pq.write_table(pa.table({"messages": turns, "image": [b"\x89PNG"], "when": [None]}), out)
    row = read(tmp_path, out.getvalue(), "a.parquet")[0].value
    assert row == {
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "name": "x"}],
        "when": None,
    }


cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=20)


@given(st.lists(st.tuples(cells, cells), min_size=1, max_size=6), st.sampled_from([",", "\t", ";", "|"]))
def test_any_cells_come_back_from_a_table(tmp_path_factory: Any, rows: list[tuple[str, str]], mark: str) -> None:
    path = tmp_path_factory.mktemp("csv")
    table = [{"prompt": left, "completion": right + "."} for left, right in rows]
    # csv.writer quotes the line breaks that are its own only.
    found = read(path, as_csv(table, mark, "\r\n"), "a.csv")
    assert [row.value for row in found] == table
