"""Plain text: a row a line, or a row a paragraph."""

import re
from collections.abc import Iterator
from typing import Literal

from services.datasets.reading.encodings import TextLines
from services.datasets.reading.source_row import MAX_ROW_BYTES, SourceRow, too_long

TextRows = Literal["line", "paragraph"]
_BLANK_LINE = re.compile(r"\n[ \t\r]*\n")


def unit(head: str) -> TextRows:
    """Choose: paragraphs where blank lines set them apart, otherwise lines."""
    return "paragraph" if _BLANK_LINE.search(head.strip()) else "line"


def read_text(lines: TextLines, rows: TextRows) -> Iterator[SourceRow]:
    """Read lines, or paragraphs set apart by blank lines, as rows of one column `text`.

    Raises:
        DatasetRejected: A row is longer than it may be.
        NotUtf8: The file is not, and was not known to be.
    """
    first, parts, size = 0, list[str](), 0
    number = 0
    while line := lines.readline(MAX_ROW_BYTES + 1):
        number += 1
        if line.strip():
            first = first or number
            parts.append(line)
            size += len(line)
            if size > MAX_ROW_BYTES:
                raise too_long(first)
        if parts and (rows == "line" or not line.strip()):
            yield _row(first, parts)
            first, parts, size = 0, [], 0
    if parts:
        yield _row(first, parts)


def _row(line: int, parts: list[str]) -> SourceRow:
    return SourceRow(line, {"text": "\n".join(part.rstrip("\r\n") for part in parts)})
