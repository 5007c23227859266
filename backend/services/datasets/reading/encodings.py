"""Which encoding a file is in, and its text as UTF-8 whatever it is."""

import codecs
import io
import re
from typing import Any, BinaryIO

from core.errors import DatasetRejected
from services.datasets.reading.source_row import CHUNK_BYTES, NotUtf8

_MARKS = (  # UTF-32's little-endian mark begins with UTF-16's
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# Latin-1 with the quotes and dashes that Windows puts where Latin-1 has control characters.
SINGLE_BYTE = "cp1252"
_HIGH = re.compile(rb"[\x80-\xff]")
_MULTIBYTE = re.compile(rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}")
# Accented letters are 5 % of French and 15 % of Czech text; an Asian encoding has more high bytes than others.
_MAX_HIGH = 0.25


def guess(head: bytes) -> tuple[str, int]:
    """Guess by a file's first bytes.

    Returns:
        The encoding, and how many bytes its mark takes. `utf-8` may turn out wrong further on.

    Raises:
        DatasetRejected: The bytes are no text.
    """
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return encoding, len(mark)
    even, odd = head[0::2].count(0), head[1::2].count(0)
    if even or odd:
        # Every ASCII character of UTF-16 has one zero byte, always on the same side.
        if odd > len(head) / 20 and not even:
            return "utf-16-le", 0
        if even > len(head) / 20 and not odd:
            return "utf-16-be", 0
        raise DatasetRejected(f"The file is binary: it begins with {head[:20]!r}.", errors=[])
    return "utf-8", 0


def recognise_single_byte(stream: BinaryIO) -> str:
    """Tell what a file that is not UTF-8 is: Windows-1252 (and so Latin-1), or UTF-8 with broken bytes.

    Returns:
        `cp1252` or `utf-8`.

    Raises:
        DatasetRejected: It is neither.
    """
    high = paired = total = undefined = 0
    while chunk := stream.read(CHUNK_BYTES):
        total += len(chunk)
        high += len(_HIGH.findall(chunk))
        paired += sum(map(len, _MULTIBYTE.findall(chunk)))
        undefined += sum(chunk.count(byte) for byte in (0x81, 0x8D, 0x8F, 0x90, 0x9D))
    if paired > high / 2:
        return "utf-8"
    if undefined or high > total * _MAX_HIGH or paired > high / 10:
        raise DatasetRejected(
            "The encoding is not recognised: it is neither UTF-8, UTF-16 nor Latin-1. Save the file as UTF-8, or name "
            "its encoding, e.g. encoding=gb18030.",
            errors=[],
        )
    return SINGLE_BYTE


def check_encoding(name: str) -> str:
    """Return the canonical name of an encoding that a client names.

    Raises:
        DatasetRejected: There is no such text encoding.
    """
    try:
        info = codecs.lookup(name)
        if not info._is_text_encoding:
            raise LookupError(f"{name} is no text encoding")
    except (LookupError, ValueError) as error:
        raise DatasetRejected(f"encoding={name!r:.40} is not known.", errors=[]) from error
    return info.name


class Utf8View(io.RawIOBase):
    """A stream's text in UTF-8, line breaks of old Macs replaced.

    Args:
        stream: Positioned behind its mark.
        encoding: Its encoding. UTF-8 is passed on unchecked.
        only_cr: Whether lines end in a carriage return alone.
    """

    def __init__(self, stream: BinaryIO, encoding: str, *, only_cr: bool) -> None:
        self._stream, self._encoding, self._only_cr = stream, encoding, only_cr
        self._decoder = None if encoding == "utf-8" else codecs.getincrementaldecoder(encoding)("strict")
        self._left = b""
        self._ended = False

    def readable(self) -> bool:
        """Whether it can be read: always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer with UTF-8, and return how many bytes that are; 0 at the end."""
        while not self._left and not self._ended:
            self._left = self._next(len(buffer))
        size = min(len(buffer), len(self._left))
        buffer[:size], self._left = self._left[:size], self._left[size:]
        return size

    def _next(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._ended = not data
        if self._decoder is not None:
            try:
                data = self._decoder.decode(data, final=self._ended).encode("utf-8")
            except UnicodeError as error:  # for UTF-16 without its mark it is not the subclass for decoding
                raise DatasetRejected(f"The file is not {self._encoding}: {error}.", errors=[]) from error
        return data.replace(b"\r", b"\n") if self._only_cr else data


class TextLines:
    """Lines of UTF-8 as text, kept whole with their line breaks.

    Args:
        trusted: Whether the file is known to be UTF-8 but for some broken bytes, which are then kept as lone
            surrogates for the row to be refused; otherwise the first broken byte raises NotUtf8.
    """

    def __init__(self, stream: BinaryIO, *, trusted: bool) -> None:
        self._stream, self._errors = stream, "surrogateescape" if trusted else "strict"

    def readline(self, limit: int) -> str:
        """Return the next line, a piece of it if it is longer than `limit` bytes, or "" at the end."""
        line = self._stream.readline(limit)
        try:
            return line.decode("utf-8", self._errors)
        except UnicodeDecodeError as error:
            if len(line) >= limit:  # cut inside a character
                return line.decode("utf-8", "replace")
            raise NotUtf8 from error
