"""CSV and TSV: the separator is what the header uses, whatever the file is called."""

import csv
import re
from collections.abc import Iterator

from services.datasets.reading.encodings import TextLines
from services.datasets.reading.source_row import MAX_ROW_BYTES, SourceRow, rejected, too_long
from services.datasets.reading.table_header import TableFacts, TableHeader

_SEPARATORS = ",\t;|"
SEPARATOR_NAMES = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}


_SAID = re.compile(r'"?sep=([^\w"\r\n])"?\s*', re.IGNORECASE)  # Excel's own line


def separator(head: str, suffix: str) -> str:
    """Choose the separator: by the line `sep=;` if the file begins with it, else by the header line.

    A tie goes to what the name says.
    """
    header = head.lstrip("\ufeff").lstrip("\r\n").splitlines()[0] if head.strip() else ""
    if said := _SAID.fullmatch(header.rstrip("\r\n")):
        return said[1]
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


def read_table(lines: TextLines, mark: str, facts: TableFacts) -> Iterator[SourceRow]:
    """Read a table with a header; every value is text.

    Args:
        facts: Takes what is worth telling of the header.

    Raises:
        DatasetRejected: It is no table, or a row is longer than it may be.
        NotUtf8: The file is not, and was not known to be.
    """
    csv.field_size_limit(MAX_ROW_BYTES)
    source = _Lines(lines)
    try:
        reader = csv.reader(source, delimiter=mark, strict=True)
        written = next(reader, [])
        while not any(name.strip() for name in written) or _is_separator_line(written, source.number, mark):
            written = next(reader)
        header, width = TableHeader(written), len(written)
        facts.header, facts.width = header, width
        source.row_bytes, line = 0, source.number + 1
        for values in reader:
            if values:
                yield _row(line, header, width, values)
            source.row_bytes, line = 0, source.number + 1
    except StopIteration:
        return
    except csv.Error as error:
        raise rejected(source.number, f"not CSV separated by {name_of(mark)}: {error}") from error


def _is_separator_line(values: list[str], line: int, mark: str) -> bool:
    """Tell whether a file's first line only says its separator. The separator splits that line in two."""
    return line == 1 and mark.join(values).lower() == f"sep={mark}"


def _row(line: int, header: TableHeader, width: int, values: list[str]) -> SourceRow:
    if len(values) < header.last_named:
        return SourceRow(line, None, f"{len(values)} columns where the header has {width}")
    try:
        return SourceRow(line, header.row(values, width))
    except ValueError as error:
        return SourceRow(line, None, str(error))


def name_of(mark: str) -> str:
    """Name a separator in words."""
    return SEPARATOR_NAMES.get(mark, repr(mark))
