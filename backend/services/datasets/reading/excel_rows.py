"""Excel workbooks, row by row. openpyxl is imported when the first one comes."""

import re
import zipfile
import zlib
from collections.abc import Iterator
from datetime import date, datetime, time
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import ParseError

from core.errors import DatasetRejected
from services.datasets.reading.source_row import MAX_ROW_BYTES, SourceRow, rejected
from services.datasets.reading.table_header import TableFacts, TableHeader

# A sheet has up to 16,384 columns, and one cell in the last one makes every row so long.
MAX_COLUMNS = 512
_MAX_RATIO = 200  # a sheet's tags shrink to a fiftieth
_RATIO_FROM_BYTES = 64 * 2**20
# What openpyxl raises on files that are no workbook, or a broken one.
_BROKEN = (
    zipfile.BadZipFile,
    zlib.error,
    ParseError,
    KeyError,
    ValueError,
    TypeError,
    AttributeError,
    IndexError,
    EOFError,
    OSError,
    NotImplementedError,
    RuntimeError,
)
# A formula's result is stored by the program that last saved the workbook; those of other programs may store none.
_NO_RESULT = (
    "cells hold a formula without its result, and are left out: open the workbook in Excel and save it, so that the "
    "results are stored"
)
_ERROR = "cells hold an error such as #N/A, and are left out"
_BEYOND = f"rows have more than {MAX_COLUMNS} columns; those behind are not read"
_CARRIAGE_RETURN = re.compile(r"_x000D_\n?")  # how a workbook writes the line breaks of other programs


def read_workbook(path: Path, max_bytes: int, facts: TableFacts) -> Iterator[SourceRow]:
    """Read the rows of a workbook's first sheet that has any. The first of them is the header.

    Every value is text, as in a CSV file that Excel saves. A formula is its stored result. Hidden sheets are read
    only if no other has rows.

    Args:
        max_bytes: A workbook that holds more is refused, and so is one that was packed to less than a 200th.
        facts: Takes what is worth telling.

    Raises:
        DatasetRejected: It cannot be read, or holds more than it may.
    """
    try:
        _check_size(path, max_bytes)
        yield from _Workbook(path, facts).rows()
    except _BROKEN as error:
        raise DatasetRejected(
            f"The Excel workbook cannot be read: {error}. Open it in Excel and save it anew, as .xlsx or .csv.",
            errors=[],
        ) from error


def _check_size(path: Path, max_bytes: int) -> None:
    with zipfile.ZipFile(path) as archive:
        if any(member.flag_bits & 1 for member in archive.infolist()):
            raise DatasetRejected("The Excel workbook is encrypted.", errors=[])
        held_bytes = sum(member.file_size for member in archive.infolist())  # none yields more than it says
    packed_bytes = path.stat().st_size
    grown = held_bytes > max(_RATIO_FROM_BYTES, _MAX_RATIO * packed_bytes)
    if grown or held_bytes > max_bytes:
        raise DatasetRejected(
            f"The Excel workbook holds {held_bytes} bytes in {packed_bytes}: "
            f"{'no data shrinks that much' if grown else f'the limit is {max_bytes}'}.",
            errors=[],
        )


class _Workbook:
    """One workbook, read once, beside it a second time for its formulas if it has any."""

    def __init__(self, path: Path, facts: TableFacts) -> None:
        self._path, self._facts = path, facts

    def rows(self) -> Iterator[SourceRow]:
        import openpyxl

        with self._path.open("rb") as file:
            book = openpyxl.load_workbook(file, read_only=True, data_only=True)
            sheets = sorted(book.worksheets, key=lambda sheet: sheet.sheet_state != "visible")
            filled = [sheet for sheet in sheets if _has_rows(sheet)]
            if filled:
                self._tell_sheets(filled)
                yield from self._sheet_rows(filled[0], filled[0].title)
            book.close()

    def _sheet_rows(self, sheet: Any, title: str) -> Iterator[SourceRow]:
        header: TableHeader | None = None
        width = 0
        for line, (cells, formulas) in enumerate(zip(_cells(sheet), self._formulas(title), strict=False), 1):
            values = [self._text(cell) for cell in cells[:MAX_COLUMNS]]
            self._count(_BEYOND, any(cell.value is not None for cell in cells[MAX_COLUMNS:]))
            self._count(_NO_RESULT, sum(values[at] is None for at in formulas if at < len(values)))
            if not any(value and value.strip() for value in values):
                continue
            if sum(len(value) for value in values if value) > MAX_ROW_BYTES:
                raise rejected(line, f"the row is longer than {MAX_ROW_BYTES} characters")
            if header is None:
                header, width = TableHeader(value or "" for value in values), len(values)
                self._facts.header, self._facts.width = header, width
                continue
            values += [None] * (header.last_named - len(values))
            # What stands beside a table belongs to nobody's row.
            yield SourceRow(line, header.row(values, max(width, len(values))))
            self._facts.width = max(self._facts.width, len(values))

    def _formulas(self, title: str) -> Iterator[list[int]]:
        """Yield for each row the positions of its formulas; for a sheet without formulas, nothing in every row."""
        import openpyxl

        if not _mentions_formulas(self._path):
            while True:
                yield []
        with self._path.open("rb") as file:
            book = openpyxl.load_workbook(file, read_only=True)
            for cells in _cells(book[title]):
                yield [at for at, cell in enumerate(cells) if cell.data_type == "f"]
            book.close()

    def _text(self, cell: Any) -> str | None:
        value = cell.value
        if value is None or cell.data_type == "e":
            self._count(_ERROR, value is not None)
            return None
        return _as_text(value)

    def _count(self, what: str, times: int) -> None:
        if times:
            self._facts.cells[what] += times

    def _tell_sheets(self, filled: list[Any]) -> None:
        names = [sheet.title for sheet in filled]
        if len(names) > 1:
            self._facts.others.append(
                f"only the sheet {names[0]!r:.80} is read; {names[1:10]} have rows too: send each on its own, as a "
                "workbook or CSV file, or put their rows below one another"
            )


def _cells(sheet: Any) -> Iterator[Any]:
    sheet.reset_dimensions()  # what a file says of its size may be wrong, and every row would be filled up to it
    return iter(sheet.iter_rows())


def _has_rows(sheet: Any) -> bool:
    return any(cell.value not in (None, "") for cells in _cells(sheet) for cell in cells)


def _mentions_formulas(path: Path) -> bool:
    """Tell whether any sheet holds a formula, by its XML: a second reading takes as long as the first."""
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.filename.startswith("xl/worksheets/") and member.filename.endswith(".xml"):
                with archive.open(member) as file:
                    tail = b""
                    while chunk := file.read(2**20):
                        if re.search(rb"<(?:\w+:)?f[ />]", tail + chunk):
                            return True
                        tail = chunk[-16:]
    return False


def _as_text(value: Any) -> str:
    """Write a value as Excel writes it in a CSV file, but dates and times as ISO 8601."""
    if isinstance(value, str):
        return _CARRIAGE_RETURN.sub("\n", value)
    if isinstance(value, bool):
        return "TRUE" if value else "FALSE"
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)
    if isinstance(value, datetime):
        return value.date().isoformat() if value.time() == time() else value.isoformat(" ")
    if isinstance(value, date | time):
        return value.isoformat()
    return str(value)
