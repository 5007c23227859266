"""Parquet, some rows at a time. pyarrow is imported when the first such file comes."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from core.errors import DatasetRejected
from services.datasets.reading.source_row import MAX_ROW_BYTES, SourceRow

MAGIC = b"PAR1"
_BATCH_BYTES = 4 * 2**20
_MAX_BATCH_ROWS = 1024


def read_parquet(path: Path) -> Iterator[SourceRow]:
    """Read a file's rows. Columns of bytes are left out: they hold images or sound.

    Raises:
        DatasetRejected: It is broken, or a row is longer than it may be.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        # With a buffer, pages are read one after the other; without, whole column chunks are held.
        with pq.ParquetFile(path, buffer_size=2**20, pre_buffer=False) as file:
            schema = file.schema_arrow
            kept = [field.name for field in schema if not _is_bytes(pa, field.type)]
            if not kept:
                raise DatasetRejected(f"The Parquet file has no column of text: {schema.names}.", errors=[])
            for batch in file.iter_batches(_batch_rows(file.metadata), columns=kept, use_threads=False):
                if batch.nbytes > MAX_ROW_BYTES * batch.num_rows + _BATCH_BYTES:
                    raise DatasetRejected(f"A row behind row {number} is longer than {MAX_ROW_BYTES} bytes.", errors=[])
                for row in batch.to_pylist():
                    number += 1
                    yield SourceRow(number, {name: _plain(value) for name, value in row.items()})
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DatasetRejected(f"The Parquet file cannot be read behind row {number}: {error}", errors=[]) from error


def _batch_rows(metadata: Any) -> int:
    sizes = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    widest = max((group.total_byte_size / max(1, group.num_rows) for group in sizes), default=1.0)
    return max(1, min(_MAX_BATCH_ROWS, int(_BATCH_BYTES / max(1.0, widest))))


def _is_bytes(pa: Any, kind: Any) -> bool:
    if pa.types.is_struct(kind):
        return any(_is_bytes(pa, kind.field(index).type) for index in range(kind.num_fields))
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind))


def _plain(value: Any) -> Any:
    """Return a value as JSON has it. A struct's null members are dropped: Parquet gives every row all of them."""
    if isinstance(value, Mapping):
        return {name: _plain(member) for name, member in value.items() if member is not None}
    if isinstance(value, list | tuple):
        return [_plain(member) for member in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
