"""Recognises a file's type by its content, or by its name if the content does not tell."""

import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeAlias, cast

from core.errors import DatasetRejected
from services.datasets.reading import (
    csv_rows,
    encodings,
    excel_rows,
    frames,
    json_rows,
    other_files,
    parquet_rows,
    text_rows,
)
from services.datasets.reading.containers import Unpacked, unpack
from services.datasets.reading.source_row import MAX_ROW_BYTES, NotUtf8, SourceRow
from services.datasets.reading.table_header import TableFacts

_Buffered: TypeAlias = "io.BufferedReader[Any]"
_PEEK_BYTES = 64 * 2**10
_TABLES = (".csv", ".tsv", ".tab")
_TEXTS = (".txt", ".text", ".md")
_LOOKED_AT_LINES = 5


@dataclass(frozen=True)
class ReadOptions:
    """What the client says of the file.

    Attributes:
        encoding: Its encoding, or None to recognise it.
        text_rows: What is a row of plain text, or None to choose.
        max_bytes: The most that a packed file may hold.
    """

    encoding: str | None
    text_rows: text_rows.TextRows | None
    max_bytes: int


@dataclass(frozen=True)
class FileRows:
    """A file's rows and what it turned out to be, in words: `JSONL`, `gzip`, `utf-8`.

    Attributes:
        facts: What is worth telling of a table. It is complete once all rows are read.
    """

    container: str
    packing: tuple[str, ...]
    encoding: str | None
    rows: Iterator[SourceRow]
    facts: TableFacts


@contextmanager
def open_rows(path: Path, filename: str, options: ReadOptions, encoding: str | None = None) -> Iterator[FileRows]:
    """Open a file.

    Args:
        encoding: The encoding that was recognised after `NotUtf8`. Broken bytes are then errors of their rows.

    Raises:
        DatasetRejected: It cannot be read as a whole.
        NotUtf8: Raised while the rows are read; `recognise` tells what to open it as.
    """
    facts = TableFacts()
    if other_files.is_workbook(path):
        rows = excel_rows.read_workbook(path, options.max_bytes, facts)
        yield FileRows("an Excel workbook", (), None, rows, facts)
        return
    unpacked = unpack(path, filename, options.max_bytes)
    with unpacked.stream as stream:
        if stream.peek(4)[:4] == parquet_rows.MAGIC:
            with _seekable(unpacked, path) as plain:
                yield FileRows("Parquet", unpacked.packing, None, parquet_rows.read_parquet(plain), facts)
            return
        is_text = PurePosixPath(unpacked.name).suffix.lower() in _TEXTS
        if advice := other_files.advice_for(stream.peek(512)[:512], is_text=is_text):
            raise DatasetRejected(advice, errors=[])
        named = encodings.check_encoding(options.encoding) if options.encoding is not None else None
        text, recognised = _utf8(stream, named or encoding)
        container, rows = _rows(text, unpacked.name, options, facts, trusted=encoding is not None)
        yield FileRows(container, unpacked.packing, recognised, rows, facts)


def recognise(path: Path, filename: str, options: ReadOptions) -> str:
    """Tell the encoding of a file that is not UTF-8.

    Raises:
        DatasetRejected: It is not recognised, or is not what the client said.
    """
    if options.encoding is not None:
        raise DatasetRejected(f"The file is not {options.encoding}, as it was said to be.", errors=[])
    with unpack(path, filename, options.max_bytes).stream as stream:
        return encodings.recognise_single_byte(stream)


@contextmanager
def _seekable(unpacked: Unpacked, path: Path) -> Iterator[Path]:
    """Give the path of a file's content. Parquet is read from its end, so a packed file is unpacked first."""
    if not unpacked.packing:
        yield path
        return
    descriptor, name = tempfile.mkstemp(suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            shutil.copyfileobj(unpacked.stream, file)
        yield Path(name)
    finally:
        Path(name).unlink()


def _utf8(stream: _Buffered, encoding: str | None) -> tuple[_Buffered, str]:
    head = stream.peek(_PEEK_BYTES)[:_PEEK_BYTES]
    guessed, mark = encodings.guess(head) if encoding is None or not _is_wide(encoding) else (encoding, 0)
    if encoding is None or mark:
        encoding = guessed
    stream.read(mark)
    head = stream.peek(_PEEK_BYTES)[:_PEEK_BYTES]
    only_cr = b"\r" in head and b"\n" not in head
    view = encodings.Utf8View(cast(BinaryIO, stream), encoding, only_cr=only_cr)
    return io.BufferedReader(cast(Any, view), _PEEK_BYTES), encoding


def _is_wide(encoding: str) -> bool:
    return encoding.startswith(("utf-16", "utf-32"))


def _rows(
    stream: _Buffered, name: str, options: ReadOptions, facts: TableFacts, *, trusted: bool
) -> tuple[str, Iterator[SourceRow]]:
    suffix = PurePosixPath(name).suffix.lower()
    head = stream.peek(_PEEK_BYTES)[:_PEEK_BYTES]
    start = head.lstrip()
    if not start:
        raise DatasetRejected("The file is empty.", errors=[])
    if start.startswith(b"[") and suffix not in (*_TABLES, *_TEXTS):
        return "JSON list", json_rows.read_list(cast(BinaryIO, stream), trusted=trusted)
    if start.startswith(b"{"):
        lines, begun = _begin(stream)
        whole = io.BufferedReader(cast(Any, _Rejoined(begun, stream)), _PEEK_BYTES)
        if json := _objects(whole, lines, suffix, facts, trusted=trusted):
            return json
        stream = whole
    text = encodings.TextLines(cast(BinaryIO, stream), trusted=trusted)
    words = head.decode("utf-8", "replace")
    if suffix in _TABLES:
        mark = csv_rows.separator(words, suffix)
        return f"a table separated by {csv_rows.name_of(mark)}", csv_rows.read_table(text, mark, facts)
    if suffix in _TEXTS:
        rows = options.text_rows or text_rows.unit(words)
        return f"text, a row a {rows}", text_rows.read_text(text, rows)
    raise DatasetRejected(
        f"{name!r:.80} is neither JSON, JSONL, CSV, Excel nor Parquet: it begins with {start[:20]!r}. "
        "A CSV file must be named .csv or .tsv, and plain text .txt.",
        errors=[],
    )


def _objects(
    whole: _Buffered, lines: list[bytes], suffix: str, facts: TableFacts, *, trusted: bool
) -> tuple[str, Iterator[SourceRow]] | None:
    """Read objects: one a line, or over several lines, or a single one that is a table. None if it is other text."""
    stream = cast(BinaryIO, whole)
    is_long = len(lines) == 1 and len(lines[0]) > MAX_ROW_BYTES
    if any(json_rows.is_object(line) for line in lines) or (suffix in (".jsonl", ".ndjson") and not is_long):
        return "JSONL", frames.unfold(json_rows.read_lines(stream, trusted=trusted), facts)
    if suffix in (*_TABLES, *_TEXTS):
        return None
    limit = frames.MAX_BYTES if frames.may_be(b"".join(lines)[:1000]) else MAX_ROW_BYTES
    return "JSON objects", frames.unfold(json_rows.read_sequence(stream, trusted=trusted, max_row_bytes=limit), facts)


def _begin(stream: _Buffered) -> tuple[list[bytes], bytes]:
    """Read the first lines that are not blank, within the size of one row; return them and all that was read."""
    lines: list[bytes] = []
    begun = b""
    while len(lines) < _LOOKED_AT_LINES and len(begun) <= MAX_ROW_BYTES:
        line = stream.readline(MAX_ROW_BYTES + 1 - len(begun))
        if not line:
            break
        begun += line
        if line.strip():
            lines.append(line)
    return lines, begun


class _Rejoined(io.RawIOBase):
    """A stream of the part that was read already, followed by the rest."""

    def __init__(self, begun: bytes, rest: _Buffered) -> None:
        self._begun, self._rest = memoryview(begun), rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._begun:
            return self._rest.readinto1(buffer)
        size = min(len(buffer), len(self._begun))
        buffer[:size], self._begun = self._begun[:size], self._begun[size:]
        return size


__all__ = ["FileRows", "NotUtf8", "ReadOptions", "open_rows", "recognise"]
