"""Decides how a file's rows are read: by their columns, or as the client says."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from domain.datasets.formats import FIELDS, FORMATS, DatasetFormat, Reading, column_value
from domain.datasets.turns import from_text

_TURNS = FIELDS["messages"].required["messages"]
_PROMPTS = FIELDS["prompt_completion"].required["prompt"]
_SOUND_LIKE_ANSWERS = ("solution", "answer", "reply", "response", "output", "completion")
_ANSWERS = FIELDS["prompt_completion"].required["completion"]
_LABELS = FIELDS["kto"].required["label"]


class NotRecognised(ValueError):
    """The format of the rows cannot be recognised. The message says what to do."""


def settle(rows: Sequence[Mapping[str, Any]], format_: DatasetFormat | None, column_map: Mapping[str, str]) -> Reading:
    """Decide the format from the first rows of a file.

    Args:
        rows: At least one.
        format_: As the client says, or None to recognise it.
        column_map: The format's field → the column it is in, or a path into one (`instances.0.output`).

    Raises:
        NotRecognised: The format cannot be recognised, or the client's settings do not fit the columns.
    """
    columns = list(dict.fromkeys(column for row in rows for column in row))
    absent = [column for column in column_map.values() if all(column_value(row, column) is None for row in rows)]
    if absent:
        raise NotRecognised(f"column_map names {absent}, of which the first rows have nothing; columns: {columns}.")
    if format_ is None and not column_map:
        return _detect(rows, columns)
    candidates = FORMATS if format_ is None else (format_,)
    for candidate in candidates:
        fields = FIELDS[candidate]
        if set(column_map) <= set(fields.all) and all(
            name in column_map or any(column in columns for column in aliases)
            for name, aliases in fields.required.items()
        ):
            said = [f"format={format_}"] if format_ is not None else []
            said += [f"column_map={json.dumps(dict(column_map))}"] if column_map else []
            return Reading(candidate, _mapped(candidate, column_map), "the client said " + ", ".join(said))
    raise NotRecognised(_does_not_fit(candidates, columns, column_map))


def _mapped(format_: DatasetFormat, column_map: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    taken = set(column_map.values())
    return {
        name: (column_map[name],) if name in column_map else tuple(alias for alias in aliases if alias not in taken)
        for name, aliases in FIELDS[format_].all.items()
    }


def _does_not_fit(candidates: Sequence[DatasetFormat], columns: list[str], column_map: Mapping[str, str]) -> str:
    known = {candidate: list(FIELDS[candidate].all) for candidate in candidates}
    unknown = sorted(set(column_map) - {name for names in known.values() for name in names})
    if unknown:
        return f"column_map names the fields {unknown}, which no such format has; the fields are {known}."
    needed = {candidate: list(FIELDS[candidate].required) for candidate in candidates}
    return f"The columns {columns} lack what the format needs ({needed}); name the others in column_map."


def _detect(rows: Sequence[Mapping[str, Any]], columns: list[str]) -> Reading:
    present = {column for column in columns if any(row.get(column) is not None for row in rows)}
    seen = f"in the first {len(rows)} rows" if len(rows) > 1 else "in the only row looked at"

    def reading_of(format_: DatasetFormat, *named: str) -> Reading:
        words = " and ".join(repr(name) for name in named)
        others = [name for columns in FIELDS[format_].optional.values() for name in columns if name in present]
        more = [name for name in dict.fromkeys(others) if name not in named]
        return Reading(format_, FIELDS[format_].all, f"{words} {seen}" + (f"; {more} are read too" if more else ""))

    if chosen := [
        (good, bad) for good, bad in zip(*FIELDS["preference"].required.values(), strict=True) if {good, bad} <= present
    ]:
        return reading_of("preference", *chosen[0])
    turns = [column for column in _TURNS if column in present and _holds_list(rows, column)]
    answers = [column for column in _ANSWERS if column in present]
    prompts = [column for column in _PROMPTS if column in present]
    label = next((column for column in _LABELS if column in present and _is_boolean(rows, column)), None)
    if label is not None and (turns or (prompts and answers)):
        return reading_of("kto", label, *(turns[:1] or [prompts[0], answers[0]]))
    if turns:
        keys = _turn_keys(rows, turns[0])
        sharegpt = "from" in keys and "role" not in keys
        return reading_of("sharegpt" if sharegpt else "messages", turns[0], *(("from",) if sharegpt else ()))
    if "instruction" in present and len(answers) == 1:
        return reading_of("alpaca", "instruction", answers[0])
    if len(prompts) == 1 and len(answers) == 1:
        return reading_of("prompt_completion", prompts[0], answers[0])
    texts = [column for column in FIELDS["text"].required["text"] if column in present]
    if len(texts) == 1 and not (prompts or answers or "instruction" in present):
        return reading_of("text", texts[0])
    asking = ["instruction"] if "instruction" in present else []
    known = bool(asking or prompts or answers)
    wrapped = None if known else _wrapped(rows, columns)
    raise NotRecognised(wrapped or _advice(rows, columns, [*asking, *prompts], answers))


def _wrapped(rows: Sequence[Mapping[str, Any]], columns: list[str]) -> str | None:
    """Advise on a single object that holds the rows in a list: `{"data": [{...}, ...]}`."""
    if len(rows) != 1:
        return None
    lists = [
        column
        for column in columns
        if isinstance(rows[0][column], list) and rows[0][column] and isinstance(rows[0][column][0], dict)
    ]
    return f"The file is one object; its rows may be the list {lists[0]!r}: save that on its own." if lists else None


def _holds_list(rows: Sequence[Mapping[str, Any]], column: str) -> bool:
    """Tell whether a column holds lists, or JSON lists in text, as in a CSV cell."""
    value = next(row[column] for row in rows if row.get(column) is not None)
    return isinstance(value, list) or (isinstance(value, str) and value.lstrip().startswith("["))


def _is_boolean(rows: Sequence[Mapping[str, Any]], column: str) -> bool:
    values = [row[column] for row in rows if row.get(column) is not None]
    return all(isinstance(value, bool) or str(value).lower() in ("true", "false") for value in values)


def _turn_keys(rows: Sequence[Mapping[str, Any]], column: str) -> set[str]:
    for row in rows:
        try:
            turns = from_text(row.get(column), column)
        except ValueError:
            continue
        if isinstance(turns, list) and turns and isinstance(turns[0], Mapping):
            return set(turns[0])
    return set()


def _advice(rows: Sequence[Mapping[str, Any]], columns: list[str], prompts: list[str], answers: list[str]) -> str:
    others = [column for column in columns if column not in (*prompts, *answers)]
    if prompts and not answers:
        example = json.dumps({"prompt": prompts[0], "completion": _likely_answer(rows, others)})
        return (
            f"{prompts[0]!r} holds questions, but no column is known to hold the answers ({list(_ANSWERS)}); the "
            f"others are {others}. If one does, map it, e.g. column_map={example}; if none does, there is nothing "
            "to learn from."
        )
    if answers and not prompts:
        example = json.dumps({"prompt": _likely_answer(rows, others), "completion": answers[0]})
        return (
            f"{answers[0]!r} holds answers, but no column is known to hold questions ({list(_PROMPTS)}); the others "
            f"are {others}. Map one, e.g. column_map={example}."
        )
    if prompts and answers:
        example = json.dumps({"prompt": prompts[0], "completion": answers[0]})
        return f"Of {prompts} and {answers} several could be the prompt or the answer: map them, e.g. {example}."
    return (
        f"The format is not recognised from the columns {columns}. Known are {list(FORMATS)}; map other columns with "
        'column_map, e.g. {"prompt": "question", "completion": "reply"} or {"text": "body"}.'
    )


def _likely_answer(rows: Sequence[Mapping[str, Any]], columns: list[str]) -> str:
    """Guess the answer's column for the advice's example: a nested answer, a typical name, or the longest texts."""
    for column in columns:
        value = rows[0].get(column)
        path, inner = (f"{column}.0", value[0]) if isinstance(value, list) and value else (column, value)
        named = [name for name in _ANSWERS if isinstance(inner, Mapping) and name in inner]
        if named:
            return f"{path}.{named[0]}"
    telling = [column for column in columns if any(word in column.lower() for word in _SOUND_LIKE_ANSWERS)]
    texts = {
        column: sum(len(row[column]) for row in rows if isinstance(row.get(column), str))
        for column in telling or columns
    }
    return max(texts, key=lambda column: texts[column], default="the column with the answers")
