"""A dataset service over a folder, and files in every shape people have them."""

import csv
import gzip
import io
import json
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from services.dataset_service import DatasetService
from services.datasets.files import DatasetFiles
from services.datasets.imports import Imports
from services.datasets.intake import read_dataset
from services.datasets.read_settings import ReadSettings
from store.database import Database
from store.records import DatasetRecord


class FixedClock:
    def now(self) -> datetime:
        return datetime(2026, 1, 1, tzinfo=UTC)

    def monotonic(self) -> float:
        return 0.0


@contextmanager
def dataset_service(folder: Path, max_upload_bytes: int = 2**20, **more: Any) -> Iterator[DatasetService]:
    """A service that reads in this process."""
    database = Database(f"sqlite:///{folder / 'studio.db'}")
    database.migrate()
    files = DatasetFiles(folder / "datasets")
    clock = FixedClock()
    yield DatasetService(database, files, Imports(clock), clock, max_upload_bytes, **{"read": read_dataset, **more})
    database.close()


def upload(service: DatasetService, content: bytes, filename: str = "a.jsonl", **settings: Any) -> DatasetRecord:
    """Store one file, as the route does."""
    values = {"format": None, "column_map": {}, "on_bad_rows": "reject", "encoding": None, "text_rows": None} | settings
    with service.imports.running(filename, "receiving", len(content)) as progress:
        draft = service.draft(progress)
        file = draft.receive(filename)
        try:
            for at in range(0, len(content), 2**16):
                file.write(content[at : at + 2**16])
        except BaseException:
            file.abandon()
            service.discard(draft)
            raise
        file.close()
        return service.finish(draft, filename, ReadSettings(**values), {"kind": "upload"})


def rows_of(service: DatasetService, dataset_id: str) -> list[dict[str, Any]]:
    """All normal rows."""
    return [json.loads(line) for line in service.rows_path(dataset_id).read_bytes().splitlines()]


def left_in(folder: Path) -> list[str]:
    """Everything below a folder, to see what an attempt leaves."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# Writers: rows of columns → the bytes of a file. Cells of CSV and nested columns of Parquet are JSON.


def as_jsonl(rows: Sequence[dict[str, Any]], newline: str = "\n") -> bytes:
    return newline.join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


def as_json(rows: Sequence[dict[str, Any]], indent: int | None = None) -> bytes:
    return json.dumps(list(rows), ensure_ascii=False, indent=indent).encode()


def as_objects(rows: Sequence[dict[str, Any]]) -> bytes:
    return "\n".join(json.dumps(row, indent=1) for row in rows).encode()


def as_csv(rows: Sequence[dict[str, Any]], delimiter: str = ",", newline: str = "\n") -> bytes:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, columns, delimiter=delimiter, lineterminator=newline)
    writer.writeheader()
    writer.writerows({column: _cell(row.get(column)) for column in columns} for row in rows)
    return out.getvalue().encode()


def as_parquet(rows: Sequence[dict[str, Any]]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = list(dict.fromkeys(column for row in rows for column in row))
    table = pa.table({column: [_parquet_cell(row.get(column)) for row in rows] for column in columns})
    out = io.BytesIO()
    pq.write_table(table, out, row_group_size=3)
    return out.getvalue()


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else json.dumps(value)


def _parquet_cell(value: Any) -> Any:
    # Structs of different members would be made alike by Arrow: nested columns are published as JSON.
    return json.dumps(value) if isinstance(value, list | dict) else value


def gzipped(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)


def zipped(content: bytes, name: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("__MACOSX/._x", b"")
        archive.writestr(f"folder/{name}", content)
    return out.getvalue()
