"""The header of a table: spreadsheets write columns without a name, and columns with the same one."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from core.errors import DatasetRejected


class TableHeader:
    """A table's columns, each under a name of its own.

    A column without a name, and one whose name another column has too, is named by its position: `column 3`,
    `id (column 3)`. A `column_map` may name it so. A column without a name has no value in a row where it is empty, and
    does not exist where it is empty everywhere.

    Attributes:
        doubled: Each name that several columns have → what they are called instead.
    """

    def __init__(self, names: Iterable[str]) -> None:
        written = list(names)
        while written and not written[-1].strip():
            written.pop()
        self._named = len(written)
        count = Counter(written)
        self._names: list[str] = []
        self.doubled: dict[str, list[str]] = {}
        self._unnamed: dict[int, str] = {}
        for position, name in enumerate(written):
            if not name.strip():
                self._names.append(self._by_position(position, count))
            elif count[name] > 1:
                own = _free(f"{name} (column {position + 1})", count)
                self._names.append(own)
                self.doubled.setdefault(name, []).append(own)
            else:
                self._names.append(name)
        self._taken = count
        self._filled: Counter[int] = Counter()

    def row(self, values: Sequence[Any], width: int) -> dict[str, Any]:
        """Return a row by its columns' names.

        Args:
            values: At least as many as there are named columns.
            width: How many columns the file gives the header, those without a name at its end included.

        Raises:
            ValueError: There is a value behind the last column of the header. The message says so.
        """
        row: dict[str, Any] = {}
        for position, value in enumerate(values):
            blank = value is None or (isinstance(value, str) and not value.strip())
            if position >= max(width, self._named):
                if not blank:
                    raise ValueError(f"{len(values)} columns where the header has {width}")
                continue
            if position < self._named and position not in self._unnamed:
                row[self._names[position]] = value
            elif not blank:
                self._filled[position] += 1
                name = self._unnamed.get(position) or self._by_position(position, self._taken)
                row[name] = value
        return row

    @property
    def names(self) -> list[str]:
        """The columns' own names, up to the last one that has a name in the file."""
        return self._names

    @property
    def last_named(self) -> int:
        """The number of columns up to the last one that has a name."""
        return self._named

    def notes(self, width: int) -> list[str]:
        """Say what was left out, once all rows are read."""
        empty = [n + 1 for n in range(width) if (n >= self._named or n in self._unnamed) and not self._filled[n]]
        notes = [
            f"{self._filled[position]} rows have text in {name!r}, which has no name in the header"
            for position, name in sorted(self._unnamed.items())
            if self._filled[position]
        ]
        if empty:
            notes.append(f"{_columns(empty)} no name and no value; left out")
        notes += [
            f"the header has {name!r} more than once; the columns are called {columns}"
            for name, columns in self.doubled.items()
        ]
        return notes

    def _by_position(self, position: int, taken: "Counter[str]") -> str:
        name = self._unnamed[position] = _free(f"column {position + 1}", taken)
        return name


@dataclass
class TableFacts:
    """What a reader tells of a table beside its rows: the header once it is read, the notes once all rows are.

    Attributes:
        width: How many columns the header has, those without a name included.
        others: Notes that have nothing to do with the header.
        cells: What is wrong with cells, in words → how many it is wrong with.
    """

    header: TableHeader | None = None
    width: int = 0
    others: list[str] = field(default_factory=list)
    cells: "Counter[str]" = field(default_factory=Counter)

    @property
    def doubled(self) -> dict[str, list[str]]:
        """Each name that several columns have → what they are called instead."""
        return self.header.doubled if self.header is not None else {}

    def notes(self) -> list[str]:
        """Say what was left out, once all rows are read."""
        return [*(self.header.notes(self.width) if self.header is not None else []), *self.others, *self.losses()]

    def losses(self) -> list[str]:
        """Say what cells of the rows read so far were left out."""
        return [f"{count} {what}" for what, count in self.cells.items()]


def require_single(facts: TableFacts, used: Iterable[Sequence[str]]) -> None:
    """Refuse a header that has a column more than once, if the column is one that is read.

    Args:
        used: For each field of the format the columns that it is looked for in; the first that is there counts.

    Raises:
        DatasetRejected: A field would be read from a name that several columns have.
    """
    if facts.header is None or not facts.doubled:
        return
    for columns in used:
        found = next((name for name in columns if name in facts.header.names or name in facts.doubled), None)
        if found is not None and found in facts.doubled:
            raise DatasetRejected(twice([found], facts.doubled), errors=[])


def twice(names: Iterable[str], doubled: dict[str, list[str]]) -> str:
    """Say that columns are in the header more than once, and how to name one of them."""
    said = list(names)
    called = [column for name in said for column in doubled[name]]
    return (
        f"The header has the columns {said} more than once. Rename them, or name the one that counts in column_map: "
        f"they are called {called}."
    )


def _columns(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    text = ", ".join("-".join(map(str, run)) for run in runs)
    return f"column {text} has" if len(numbers) == 1 else f"columns {text} have"


def _free(name: str, taken: "Counter[str]") -> str:
    while name in taken:
        name += "'"
    return name
