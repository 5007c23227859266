"""JSON in its three shapes: an object a line, one list, and objects one after the other over several lines."""

import codecs
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from services.datasets.reading.source_row import CHUNK_BYTES, MAX_ROW_BYTES, NotUtf8, SourceRow, rejected, too_long

_TAIL = 16  # an error in so many characters at the window's end may come from the cut alone


class DoubledKey(ValueError):
    """An object has a key twice: one of the values would be lost."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        names = [name for name, _ in pairs]
        raise DoubledKey(f"the key {next(name for name in names if names.count(name) > 1)!r:.60} is there twice")
    return members


# pandas writes NaN for a cell without a value.
_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=lambda _name: None)


def is_object(line: bytes) -> bool:
    """Tell whether a line is a JSON object."""
    try:
        return isinstance(_DECODER.decode(line.decode("utf-8", "replace")), dict)
    except (ValueError, RecursionError):
        return False


def read_lines(stream: BinaryIO, *, trusted: bool) -> Iterator[SourceRow]:
    """Read one object from each line. A line without an object is an error of that row only.

    Raises:
        DatasetRejected: A line is longer than a row may be.
        NotUtf8: The file is not, and was not known to be.
    """
    for number, line in enumerate(iter(lambda: stream.readline(MAX_ROW_BYTES + 1), b""), start=1):
        if len(line) > MAX_ROW_BYTES:
            raise too_long(number)
        if line.strip():
            yield _parse(number, line, trusted=trusted)


def _parse(number: int, line: bytes, *, trusted: bool) -> SourceRow:
    try:
        value = _DECODER.decode(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        if not trusted:
            raise NotUtf8 from error
        return SourceRow(number, None, f"not UTF-8 at byte {error.start}")
    except RecursionError:
        return SourceRow(number, None, "nested too deeply")
    except DoubledKey as error:
        return SourceRow(number, None, str(error))
    except ValueError as error:
        return SourceRow(number, None, f"not JSON: {error}")
    return _row(number, value)


def _row(number: int, value: Any) -> SourceRow:
    if isinstance(value, list):
        return SourceRow(number, None, "a list, not a JSON object: its values have no column names")
    if not isinstance(value, dict):
        return SourceRow(number, None, "not a JSON object")
    return SourceRow(number, value)


def read_list(stream: BinaryIO, *, trusted: bool) -> Iterator[SourceRow]:
    """Read the elements of one list, one at a time.

    Raises:
        DatasetRejected: It is not JSON; the line is named.
    """
    window = _Window(stream, trusted=trusted)
    window.take("[")
    if window.next() == "]":
        return
    while True:
        window.next()
        yield window.row()
        if window.next() == "]":
            window.take("]")
            break
        window.take(",")
    if window.next():
        raise rejected(window.line, "there is more behind the end of the list")


def read_sequence(stream: BinaryIO, *, trusted: bool, max_row_bytes: int = MAX_ROW_BYTES) -> Iterator[SourceRow]:
    """Read objects one after the other, of any number of lines each.

    Args:
        max_row_bytes: The most that the first object may take; the others are rows.

    Raises:
        DatasetRejected: It is not JSON; the line is named.
    """
    window = _Window(stream, trusted=trusted, max_row_bytes=max_row_bytes)
    while window.next():
        yield window.row()
        window.max_row_bytes = MAX_ROW_BYTES


class _Window:
    """The part of a text that is being read. A value that is cut by the window's end is read again with more."""

    def __init__(self, stream: BinaryIO, *, trusted: bool, max_row_bytes: int = MAX_ROW_BYTES) -> None:
        self._stream, self.max_row_bytes = stream, max_row_bytes
        self._trusted = trusted
        self._decoder = codecs.getincrementaldecoder("utf-8")("strict")
        self._text, self._at = "", 0
        self.line = 1

    def _fill(self) -> bool:
        """Read more text; tell whether there was any."""
        data = self._stream.read(max(CHUNK_BYTES, len(self._text) - self._at))
        try:
            more = self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            if not self._trusted:
                raise NotUtf8 from error
            line = self.line + self._text.count("\n", self._at) + data.count(b"\n", 0, error.start)
            raise rejected(line, "not UTF-8") from error
        self._text, self._at = self._text[self._at :] + more, 0
        return bool(data)

    def _move(self, to: int) -> None:
        self.line += self._text.count("\n", self._at, to)
        self._at = to

    def next(self) -> str:
        """Move to the next character that is no space, and return it; "" at the end."""
        while True:
            rest = len(self._text)
            at = self._at
            while at < rest and self._text[at] in " \t\r\n":
                at += 1
            self._move(at)
            if at < rest:
                return self._text[at]
            if not self._fill():
                return ""

    def take(self, mark: str) -> None:
        """Step over a mark.

        Raises:
            DatasetRejected: Something else is there.
        """
        character = self.next()
        if character != mark:
            where = f"{character!r}" if character else "the end of the file"
            raise rejected(self.line, f"not JSON: {mark!r} is expected, and there is {where}")
        self._move(self._at + 1)

    def row(self) -> SourceRow:
        """Read a value.

        Raises:
            DatasetRejected: It is not JSON, or longer than a row may be.
        """
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except RecursionError as error:
                raise rejected(self.line, "nested too deeply") from error
            except DoubledKey as error:
                raise rejected(self.line, str(error)) from error
            except ValueError as error:
                self._more_or_raise(error)
                continue
            # A number or a word at the window's end may continue after it.
            if end == len(self._text) and not isinstance(value, dict | list | str) and self._fill():
                continue
            if end - self._at > self.max_row_bytes:
                raise too_long(self.line, self.max_row_bytes)
            line = self.line
            self._move(end)
            return _row(line, value)

    def _more_or_raise(self, error: ValueError) -> None:
        """Read more if the window's end may have cut the value. Otherwise raise an error with its place."""
        at, cut, reason = self._at, False, str(error)
        if isinstance(error, json.JSONDecodeError):
            at, reason = error.pos, error.msg
            cut = at >= len(self._text) - _TAIL or reason.startswith("Unterminated string")
        if cut and len(self._text) - self._at > self.max_row_bytes:
            raise too_long(self.line, self.max_row_bytes)
        line = self.line + self._text.count("\n", self._at, at)
        if not cut or not self._fill():
            raise rejected(line, f"not JSON: {reason}") from error
