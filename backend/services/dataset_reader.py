"""Rows of an uploaded file with the line each came from; bad lines are reported, never dropped in silence."""

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from core.errors import DatasetRejected

MAX_LINE_BYTES = 8 * 2**20
# A JSON array must be held whole to be parsed; larger sets belong in JSONL, which is read line by line.
MAX_JSON_BYTES = 512 * 2**20


@dataclass(frozen=True)
class SourceRow:
    """One row, or why there is none.

    Attributes:
        line: Line of the file, from 1; for a JSON array the element's number.
    """

    line: int
    value: dict[str, Any] | None
    error: str | None


def read_rows(path: Path, filename: str) -> Iterator[SourceRow]:
    """Read a JSONL, JSON, CSV or TSV file; the content decides where the name does not.

    Raises:
        DatasetRejected: The file as a whole cannot be read.
    """
    with path.open("rb") as file:
        first = _first_bytes(file)
        suffix = Path(filename).suffix.lower()
        if suffix in (".csv", ".tsv"):
            yield from _csv_rows(file, "\t" if suffix == ".tsv" else _delimiter(first))
        elif first.startswith(b"[") or (first.startswith(b"{") and not _first_line_is_object(file)):
            yield from _json_rows(file)
        elif first.startswith(b"{"):
            yield from _jsonl_rows(file)
        else:
            raise DatasetRejected(
                f"{filename!r:.80} is neither JSON, JSONL nor CSV: it begins with {first[:20]!r}. "
                "A CSV file must be named .csv or .tsv.",
                errors=[],
            )


def _first_bytes(file: BinaryIO) -> bytes:
    data = file.read(4096)
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DatasetRejected("The file is UTF-16; save it as UTF-8.", errors=[])
    start = 3 if data.startswith(b"\xef\xbb\xbf") else 0
    file.seek(start)
    stripped = data[start:].lstrip()
    if not stripped:
        raise DatasetRejected("The file is empty.", errors=[])
    return stripped


def _first_line_is_object(file: BinaryIO) -> bool:
    position = file.tell()
    line = next((line for line in iter(lambda: file.readline(MAX_LINE_BYTES + 1), b"") if line.strip()), b"")
    file.seek(position)
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        # A lone "{" begins an indented object; anything else is a bad first line of JSONL.
        return line.strip() != b"{"


def _jsonl_rows(file: BinaryIO) -> Iterator[SourceRow]:
    for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), start=1):
        if len(line) > MAX_LINE_BYTES:
            raise DatasetRejected(
                f"Line {number} is longer than {MAX_LINE_BYTES} bytes.",
                errors=[{"line": number, "message": f"longer than {MAX_LINE_BYTES} bytes"}],
            )
        if line.strip():
            yield _parse(number, line)


def _parse(number: int, text: bytes) -> SourceRow:
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        return SourceRow(number, None, f"not UTF-8 at byte {error.start}")
    except RecursionError:
        return SourceRow(number, None, "nested too deeply")
    except ValueError as error:
        return SourceRow(number, None, f"not JSON: {error}")
    if not isinstance(value, dict):
        return SourceRow(number, None, "not a JSON object")
    return SourceRow(number, value, None)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _json_rows(file: BinaryIO) -> Iterator[SourceRow]:
    data = file.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise DatasetRejected(f"A JSON array may have {MAX_JSON_BYTES} bytes; save larger sets as JSONL.", errors=[])
    try:
        document = json.loads(data, parse_constant=_no_constant)
    except RecursionError as error:
        raise DatasetRejected("The file is nested too deeply.", errors=[]) from error
    except ValueError as error:
        line = getattr(error, "lineno", None)
        raise DatasetRejected(
            f"The file is not JSON: {error}", errors=[{"line": line, "message": str(error)}]
        ) from error
    rows = document if isinstance(document, list) else [document]
    for number, row in enumerate(rows, start=1):
        if isinstance(row, dict):
            yield SourceRow(number, row, None)
        else:
            yield SourceRow(number, None, "not a JSON object")


def _delimiter(first: bytes) -> str:
    """Choose between comma, semicolon and tab by the header line: people name TSV files .csv."""
    header = first.split(b"\n", 1)[0].decode("utf-8", "replace")
    return max(",;\t", key=header.count)


def _csv_rows(file: BinaryIO, delimiter: str) -> Iterator[SourceRow]:
    text = io.TextIOWrapper(file, encoding="utf-8", errors="strict", newline="")
    csv.field_size_limit(MAX_LINE_BYTES)
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    try:
        header = next(reader)
        line = reader.line_num + 1
        for values in reader:
            if values:
                yield _csv_row(line, header, values)
            line = reader.line_num + 1
    except UnicodeDecodeError as error:
        raise DatasetRejected(
            f"The file is not UTF-8: {error.reason} after line {reader.line_num}.", errors=[]
        ) from error
    except csv.Error as error:
        errors = [{"line": reader.line_num, "message": str(error)}]
        raise DatasetRejected(f"Line {reader.line_num} is not CSV: {error}", errors=errors) from error
    finally:
        text.detach()


def _csv_row(line: int, header: list[str], values: list[str]) -> SourceRow:
    if len(values) != len(header):
        return SourceRow(line, None, f"{len(values)} columns where the header has {len(header)}")
    row: dict[str, Any] = dict(zip(header, values, strict=True))
    if isinstance(row.get("messages"), str):
        try:
            row["messages"] = json.loads(row["messages"])
        except (ValueError, RecursionError) as error:
            return SourceRow(line, None, f"'messages' is not JSON: {error}")
    return SourceRow(line, row, None)
