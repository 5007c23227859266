"""What every reader yields, and the limits that all of them keep."""

from dataclasses import dataclass
from typing import Any

from core.errors import DatasetRejected

# No row of text is longer in any published set; it bounds what is held in memory at once.
MAX_ROW_BYTES = 8 * 2**20
CHUNK_BYTES = 2**20


@dataclass(frozen=True)
class SourceRow:
    """One row, or why there is none.

    Attributes:
        line: The line of the file it begins on, from 1; in Parquet the row's number.
    """

    line: int
    value: dict[str, Any] | None
    error: str | None = None


class NotUtf8(Exception):
    """The file was taken for UTF-8 and is not."""


def rejected(line: int, message: str) -> DatasetRejected:
    """Return the refusal of a whole file for what is wrong on one line."""
    return DatasetRejected(f"Line {line}: {message}.", errors=[{"line": line, "message": message}])


def too_long(line: int, max_row_bytes: int = MAX_ROW_BYTES) -> DatasetRejected:
    """Return the refusal of a row over the limit."""
    return rejected(line, f"the row is longer than {max_row_bytes} bytes")
