"""Reads files into normal rows. `python -m services.datasets.intake` does it in a process of its own.

A client's file is parsed in a process of its own, so that it cannot harm the server. The process has a memory limit and
a low priority. If it dies, only one upload fails.
"""

import hashlib
import json
import os
import resource
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from core.confinement import confine
from core.errors import DatasetRejected, StorageFull
from core.files import storage_errors
from domain.datasets.detection import NotRecognised, settle
from domain.datasets.formats import DatasetFormat, NormalRow, Reading, normalise
from domain.datasets.turns import RowRejected
from services.datasets.reading.duplicates import Duplicates
from services.datasets.reading.marks import find_marks
from services.datasets.reading.reader import NotUtf8, ReadOptions, open_rows, recognise
from services.datasets.reading.source_row import SourceRow
from services.datasets.reading.table_header import TableFacts, require_single, twice
from services.datasets.reading.text_rows import TextRows

_MAX_ERRORS = 100
_MAX_NOTES = 200  # distinct notes; a file of random keys must not fill the memory
_DETECTION_ROWS = 100
_DETECTION_BYTES = 8 * 2**20
_PROGRESS_ROWS = 2000
# Field names and escapes make rows longer. A Parquet file that repeats one text in a billion rows is refused.
_MAX_GROWTH = 2
_MAX_MEMORY_BYTES = 4 * 2**30
_NICE = 5

Report = Callable[[int, int], None]


@dataclass(frozen=True)
class IntakeRequest:
    """What to read and how.

    Attributes:
        files: (path, file name) of each part, in order.
        folder: Where `rows.jsonl` goes.
        format: How to read the rows, or None to recognise it.
        column_map: The format's field → the file's column, for columns under other names.
        skip_bad_rows: Keep the good rows of a file that has bad ones.
        encoding: Of text, or None to recognise it.
        text_rows: What is a row of plain text, or None to choose.
        max_bytes: The most that a packed file may hold.
    """

    files: list[tuple[str, str]]
    folder: str
    format: DatasetFormat | None
    column_map: dict[str, str]
    skip_bad_rows: bool
    encoding: str | None
    text_rows: TextRows | None
    max_bytes: int


@dataclass
class IntakeResult:
    """What was read.

    Attributes:
        detected: In words: container, packing, encoding and by what the format was recognised.
        columns: All that were seen, in order.
        unused_columns: Those that were not read.
        answers: Rows with an answer that may be learned, and rows whose last answer may.
        errors: Line and message of the first rows that cannot be used.
        rows_sha256: Of `rows.jsonl`.
    """

    format: str = ""
    detected: list[str] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    unused_columns: list[str] = field(default_factory=list)
    rows: int = 0
    rejected: int = 0
    answers: tuple[int, int] = (0, 0)
    errors: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    duplicates: int = 0
    rows_sha256: str = ""


def read_dataset(request: IntakeRequest, report: Report) -> IntakeResult:
    """Write `rows.jsonl`.

    Args:
        report: Called now and then with the rows read and the bytes written.

    Raises:
        DatasetRejected: The files cannot be read, have no usable row, or have bad ones that are not to be skipped.
    """
    encodings: dict[str, str] = {}
    while True:
        try:
            return _Intake(request, encodings, report).run()
        except NotUtf8:
            path, filename = next(file for file in request.files if file[0] not in encodings)
            encodings[path] = recognise(Path(path), filename, _options(request))


def _options(request: IntakeRequest) -> ReadOptions:
    return ReadOptions(request.encoding, request.text_rows, request.max_bytes)


class _Intake:
    """One pass over the files.

    Args:
        encodings: path → encoding, for files that turned out not to be UTF-8.
    """

    def __init__(self, request: IntakeRequest, encodings: dict[str, str], report: Report) -> None:
        self._request, self._encodings, self._report = request, encodings, report
        self._result = IntakeResult()
        self._digest = hashlib.sha256()
        self._duplicates = Duplicates(Path(request.folder))
        self._notes: Counter[str] = Counter()
        self._columns: dict[str, None] = {}
        self._tables: list[str] = []
        self._losses: list[str] = []
        self._reading: Reading | None = None
        self._written_bytes = 0

    def run(self) -> IntakeResult:
        target = Path(self._request.folder) / "rows.jsonl"
        try:
            with storage_errors(target), target.open("wb") as file:
                for row in self._rows():
                    normal = self._normal(row)
                    if normal is not None:
                        self._keep(normal, row, file)
                file.flush()
                os.fsync(file.fileno())
            self._finish()
        finally:
            self._duplicates.close()
        return self._result

    def _rows(self) -> Iterator[SourceRow]:
        """Decide the format from the first rows, then yield the rows of all files."""
        several = len(self._request.files) > 1
        for path, filename in self._request.files:
            with open_rows(Path(path), filename, _options(self._request), self._encodings.get(path)) as file:
                kept = list(_first(file.rows)) if self._reading is None else []
                samples = [row.value for row in kept if row.value is not None]
                if self._reading is None and samples:
                    self._settle(samples, file.facts)
                self._describe([file.container, *file.packing, *filter(None, [file.encoding])], filename, several)
                for number, row in enumerate(chain(kept, file.rows)):
                    if number == 0:
                        self._check_header(file.facts)
                    if several and row.error is not None:
                        row = SourceRow(row.line, None, f"{filename}: {row.error}")
                    yield row
                self._losses += file.facts.losses()
                self._tables += [f"{filename}: {note}" if several else note for note in file.facts.notes()]

    def _settle(self, samples: list[dict[str, Any]], facts: TableFacts) -> None:
        try:
            self._reading = settle(samples, self._request.format, self._request.column_map)
        except NotRecognised as error:
            more = [twice(facts.doubled, facts.doubled)] if facts.doubled else []
            raise DatasetRejected(" ".join([str(error), *more, *facts.losses()]), errors=[]) from error
        self._result.format = self._reading.format

    def _check_header(self, facts: TableFacts) -> None:
        if self._reading is not None:
            require_single(facts, self._reading.fields.values())

    def _describe(self, words: list[str], filename: str, several: bool) -> None:
        text = ", ".join(words)
        if several:
            text = f"{filename}: {text}"
        self._result.detected.append(text)
        if "cp1252" in words:
            self._notes[f"{filename!r:.80} is not UTF-8; it was read as Windows-1252 (Latin-1)"] += 1

    def _normal(self, row: SourceRow) -> NormalRow | None:
        error = row.error
        if row.value is not None and self._reading is not None:
            self._columns.update(dict.fromkeys(row.value) if len(self._columns) < _MAX_NOTES else {})
            try:
                return normalise(row.value, self._reading)
            except RowRejected as rejected:
                error = str(rejected)
        self._result.rejected += 1
        if len(self._result.errors) < _MAX_ERRORS:
            self._result.errors.append({"line": row.line, "message": error})
        return None

    def _keep(self, normal: NormalRow, row: SourceRow, file: Any) -> None:
        result = self._result
        file.write(normal.line)
        self._written_bytes += len(normal.line)
        if self._written_bytes > _MAX_GROWTH * self._request.max_bytes:
            raise DatasetRejected(f"The rows take more than {self._written_bytes} bytes.", errors=[])
        self._digest.update(normal.line)
        self._duplicates.add(normal.line, row.line)
        result.rows += 1
        result.answers = (result.answers[0] + normal.learnable[0], result.answers[1] + normal.learnable[1])
        for note in (*normal.notes, *find_marks(normal.line)):
            if note in self._notes or len(self._notes) < _MAX_NOTES:
                self._notes[note] += 1
        if result.rows % _PROGRESS_ROWS == 0:
            self._report(result.rows, self._written_bytes)

    def _finish(self) -> None:
        result = self._result
        result.columns = list(self._columns)
        result.rows_sha256 = self._digest.hexdigest()
        self._refuse_bad()
        reading = self._reading
        if reading is None:
            raise DatasetRejected("The file has no rows.", errors=[])
        result.detected.append(f"{reading.format}: {reading.evidence}")
        used = {column.split(".")[0] for column in reading.columns} | reading.columns
        result.unused_columns = [column for column in result.columns if column not in used]
        self._warn()

    def _refuse_bad(self) -> None:
        result = self._result
        if result.rejected and (not self._request.skip_bad_rows or not result.rows):
            what = "on_bad_rows=skip keeps the others" if result.rows else "no row can be used"
            first = result.errors[0]
            raise DatasetRejected(
                f"{result.rejected} rows cannot be used, the first on line {first['line']}: "
                f"{first['message']}; {'; '.join([what, *self._losses])}.",
                errors=result.errors,
                rejected_rows=result.rejected,
                good_rows=result.rows,
            )

    def _warn(self) -> None:
        result, warnings = self._result, self._result.warnings
        if result.rejected:
            lines = ", ".join(f"line {error['line']}: {error['message']}" for error in result.errors[:10])
            more = f" and {result.rejected - 10} more" if result.rejected > 10 else ""
            warnings.append(f"{result.rejected} rows were left out: {lines}{more}")
        result.duplicates, examples = self._duplicates.count()
        if result.duplicates:
            shown = ", ".join(f"line {later} repeats line {first}" for first, later in examples)
            warnings.append(f"{result.duplicates} rows repeat an earlier row; they are kept ({shown})")
        if result.unused_columns:
            warnings.append(f"the columns {result.unused_columns} are not used")
        if result.answers[0] < result.rows:
            warnings.append(f"{result.rows - result.answers[0]} rows have weight 0 on every answer: nothing is learned")
        warnings += self._tables[:20]
        for note, count in self._notes.most_common(20):
            warnings.append(note if note.endswith("(Latin-1)") else f"{count} rows {note}")


def _first(rows: Iterator[SourceRow]) -> Iterator[SourceRow]:
    """Yield the rows that decide the format: the first hundred, or fewer if they are long."""
    size, good = 0, 0
    for row in rows:
        yield row
        good += row.value is not None
        size += len(str(row.value))
        if good >= _DETECTION_ROWS or size > _DETECTION_BYTES:
            return


def main() -> int:
    """Read the request from stdin, do it, and write progress and outcome to stdout, one JSON object a line."""
    os.nice(_NICE)
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (_MAX_MEMORY_BYTES, _MAX_MEMORY_BYTES))
    confine()
    told = json.loads(sys.stdin.readline())
    request = IntakeRequest(**told | {"files": [tuple(file) for file in told["files"]]})
    try:
        result = read_dataset(request, lambda rows, size: _say({"rows": rows, "bytes": size}))
    except (DatasetRejected, StorageFull) as error:
        _say({"error": type(error).__name__, "detail": error.detail, "extras": error.extras})
    except MemoryError:
        _say({"error": "DatasetRejected", "detail": "Reading it takes more than 4 GiB of memory.", "extras": {}})
    else:
        _say({"result": asdict(result)})
    return 0


def _say(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
