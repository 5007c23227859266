"""Tables in one JSON object, as pandas and `datasets` write them: by column, by row label, split, or with a schema."""

import json
import re
from collections.abc import Iterator, Mapping
from itertools import chain, islice
from typing import Any

from domain.datasets.formats import FIELDS
from services.datasets.reading.source_row import MAX_ROW_BYTES, SourceRow, too_long
from services.datasets.reading.table_header import TableFacts, TableHeader

# Such an object is one value of JSON, so it is held as a whole: in memory that takes up to ten times its size.
MAX_BYTES = 256 * 2**20
_KNOWN = frozenset(
    name for fields in FIELDS.values() for names in fields.all.values() for name in names
)  # the columns that formats have
_TURN = frozenset(("role", "from"))
_SPLIT = frozenset(("columns", "index", "data", "index_names", "column_names"))
# The beginning of an object by columns or by labels, of a split one, and of one with a schema.
_BEGINS = re.compile(rb'\s*\{\s*"(?:[^"\\]|\\.){0,200}"\s*:\s*(?:\{|\[)')


def may_be(head: bytes) -> bool:
    """Tell by a file's beginning whether it may be such an object."""
    return _BEGINS.match(head) is not None


def unfold(rows: Iterator[SourceRow], facts: TableFacts) -> Iterator[SourceRow]:
    """Read a file's only object as a table if it is one; any other rows stay as they are.

    Args:
        facts: Takes what is worth telling.

    Raises:
        DatasetRejected: The object is no table, and longer than a row may be.
    """
    first = list(islice(rows, 2))
    if len(first) == 1 and first[0].value is not None:
        read = _by_form(first[0].value, facts)
        if read is not None:
            yield from read
            return
    if first and len(json.dumps(first[0].value, ensure_ascii=False).encode("utf-8", "replace")) > MAX_ROW_BYTES:
        raise too_long(first[0].line)
    yield from chain(first, rows)


def _by_form(value: dict[str, Any], facts: TableFacts) -> Iterator[SourceRow] | None:
    if _is_split(value):
        facts.others.append("the file is one object, read as a pandas table: orient='split'")
        return _split(value, facts)
    if set(value) == {"schema", "data"} and _all(value["data"], dict):
        index = value["schema"].get("primaryKey", []) if isinstance(value["schema"], Mapping) else []
        facts.others.append("the file is one object, read as a pandas table: orient='table'")
        return (
            SourceRow(n, {k: v for k, v in row.items() if k not in index}) for n, row in enumerate(value["data"], 1)
        )
    members = list(value.values())
    if _all(members, dict) and not any(_TURN & member.keys() for member in members):
        by_column = _is_by_column(value)
        if by_column is not None:
            facts.others.append(
                f"the file is one object, read as a pandas table: orient={'columns' if by_column else 'index'!r}"
            )
            return _by_column(value) if by_column else (SourceRow(n, row) for n, row in enumerate(members, 1))
    if _all(members, list) and _are_columns(members):
        facts.others.append("the file is one object, read as a table of columns: each is the list of its values")
        return (
            SourceRow(n, dict(zip(value, cells, strict=True))) for n, cells in enumerate(zip(*members, strict=True), 1)
        )
    return None


def _all(values: Any, kind: type) -> bool:
    return isinstance(values, list) and bool(values) and all(isinstance(value, kind) for value in values)


def _are_columns(members: list[list[Any]]) -> bool:
    """Tell whether lists are columns: of one length, and none of them a list of turns or of tools."""
    lengths = {len(member) for member in members}
    return len(lengths) == 1 and 0 not in lengths and not any(isinstance(m, dict) for member in members for m in member)


def _is_split(value: dict[str, Any]) -> bool:
    return (
        {"columns", "data"} <= value.keys() <= _SPLIT
        and isinstance(value["columns"], list)
        and _all(value["data"], list)
    )


def _split(value: dict[str, Any], facts: TableFacts) -> Iterator[SourceRow]:
    names = [_name(name) for name in value["columns"]]
    header = facts.header = TableHeader(names)
    width = facts.width = len(names)
    for number, cells in enumerate(value["data"], 1):
        try:
            if len(cells) != width:
                raise ValueError(f"{len(cells)} values where there are {width} columns")
            yield SourceRow(number, header.row(cells, width))
        except ValueError as error:
            yield SourceRow(number, None, str(error))


def _name(name: Any) -> str:
    """Return a column's name as text; pandas has numbers and lists of several levels too."""
    return ".".join(map(str, name)) if isinstance(name, list) else "" if name is None else str(name)


def _is_by_column(value: dict[str, dict[str, Any]]) -> bool | None:
    """Tell whether the outer names are the columns; None if the object is no table.

    Both ways round look alike. Labels that are numbers are rows. Names that formats know are columns. Otherwise there
    are fewer columns than rows.
    """
    members = list(value.values())
    inner = dict.fromkeys(name for member in members for name in member)
    if not inner:
        return None
    outer_numbers, inner_numbers = (all(name.isdecimal() for name in names) for names in (value, inner))
    if outer_numbers != inner_numbers:
        return inner_numbers
    outer_known, inner_known = (bool(_KNOWN.intersection(names)) for names in (value, inner))
    if outer_known != inner_known:
        return outer_known if _same_names(members) or inner_known else None
    # One object with objects in it may be one row of anything: it is a table only if every member has the same names.
    return len(value) <= len(inner) if _same_names(members) and len(value) > 1 else None


def _same_names(members: list[dict[str, Any]]) -> bool:
    return all(member.keys() == members[0].keys() for member in members)


def _by_column(value: dict[str, dict[str, Any]]) -> Iterator[SourceRow]:
    labels = dict.fromkeys(label for column in value.values() for label in column)
    for number, label in enumerate(labels, 1):
        yield SourceRow(number, {name: column[label] for name, column in value.items() if label in column})
