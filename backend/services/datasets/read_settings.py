"""How a client wants its files read."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from domain.datasets.formats import DatasetFormat
from services.datasets.reading.text_rows import TextRows

BadRows = Literal["reject", "skip"]


@dataclass(frozen=True)
class ReadSettings:
    """How a client wants its files read.

    Attributes:
        format: How to read the rows, or None to recognise it.
        column_map: The format's field → the file's column, for columns under other names.
        on_bad_rows: Refuse the files, or keep the good rows.
        encoding: Of text, or None to recognise it.
        text_rows: What is a row of plain text, or None to choose.
    """

    format: DatasetFormat | None
    column_map: Mapping[str, str]
    on_bad_rows: BadRows
    encoding: str | None
    text_rows: TextRows | None
