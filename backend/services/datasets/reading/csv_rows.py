"""CSV and TSV: the separator is what the header uses, whatever the file is called."""

import csv
from collections.abc import Iterator

from core.errors import DatasetRejected
from services.datasets.reading.encodings import TextLines
from services.datasets.reading.source_row import MAX_ROW_BYTES, SourceRow, rejected, too_long

_SEPARATORS = ",\t;|"
SEPARATOR_NAMES = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}


def separator(head: str, suffix: str) -> str:
    """Choose the separator by the header line; a tie goes to what the name says."""
    header = head.lstrip("\ufeff").splitlines()[0] if head.strip() else ""
    preferred = "\t" if suffix in (".tsv", ".tab") else ","
    return max(_SEPARATORS, key=lambda mark: (_fields(header, mark), mark == preferred))


def _fields(header: str, mark: str) -> int:
    try:
        return len(next(csv.reader([header], delimiter=mark), []))
    except csv.Error:
        return 0


class _Lines:
    """Feeds lines to the parser and keeps one row from growing without end."""

    def __init__(self, lines: TextLines) -> None:
        self._lines = lines
        self.number = 0
        self.row_bytes = 0

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._lines.readline(MAX_ROW_BYTES + 1)
        if not line:
            raise StopIteration
        self.number += 1
        self.row_bytes += len(line)
        if self.row_bytes > MAX_ROW_BYTES:
            raise too_long(self.number)
        return line


def read_table(lines: TextLines, mark: str) -> Iterator[SourceRow]:
    """Read a table with a header; every value is text.

    Raises:
        DatasetRejected: It is no table, its header names a column twice, or a row is longer than it may be.
        NotUtf8: The file is not, and was not known to be.
    """
    csv.field_size_limit(MAX_ROW_BYTES)
    source = _Lines(lines)
    reader = csv.reader(source, delimiter=mark, strict=True)
    try:
        header = next(reader, [])
        while header == []:
            header = next(reader)
        twice = sorted({name for name in header if header.count(name) > 1})
        if twice:
            raise DatasetRejected(f"The header has the columns {twice} more than once.", errors=[])
        source.row_bytes, line = 0, source.number + 1
        for values in reader:
            if values:
                yield _row(line, header, values)
            source.row_bytes, line = 0, source.number + 1
    except StopIteration:
        return
    except csv.Error as error:
        raise rejected(source.number, f"not CSV separated by {SEPARATOR_NAMES[mark]}: {error}") from error


def _row(line: int, header: list[str], values: list[str]) -> SourceRow:
    if len(values) != len(header):
        return SourceRow(line, None, f"{len(values)} columns where the header has {len(header)}")
    return SourceRow(line, dict(zip(header, values, strict=True)))
