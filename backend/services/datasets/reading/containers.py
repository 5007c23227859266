"""Opens gzip and zip files as streams. What comes out is limited in size."""

import gzip
import io
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from core.errors import DatasetRejected
from services.datasets.reading import other_files

# gzip shrinks text to a quarter, and repetitive rows to a fiftieth. What shrinks more is not a dataset.
_MAX_RATIO = 200
_RATIO_FROM_BYTES = 64 * 2**20
_PEEK_BYTES = 64 * 2**10
_OTHER_PACKERS = {
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "Zstandard",
    b"7z\xbc\xaf": "7-Zip",
    b"Rar!": "RAR",
}


@dataclass(frozen=True)
class Unpacked:
    """A file's content.

    Attributes:
        stream: The bytes, of which the first 64 KiB can be peeked at.
        name: What the content is called.
        packing: `gzip`, `zip`, both from the outside in, or nothing.
    """

    stream: "io.BufferedReader[Any]"
    name: str
    packing: tuple[str, ...]


def unpack(path: Path, filename: str, max_bytes: int) -> Unpacked:
    """Open a file, taking up to two layers of packing off.

    Args:
        max_bytes: A file with more content is refused, and so is one that was packed to less than a 200th.

    Raises:
        DatasetRejected: It is packed otherwise, broken, encrypted, or holds several files.
    """
    stream: io.BufferedReader[Any] = io.BufferedReader(path.open("rb", buffering=0), _PEEK_BYTES)
    name, packing = filename, tuple[str, ...]()
    packed_bytes = path.stat().st_size
    while True:
        head = stream.peek(8)[:8]
        if head.startswith(b"\x1f\x8b"):
            layer: IO[bytes] = cast(IO[bytes], gzip.GzipFile(fileobj=stream))
            name, kind = name.removesuffix(".gz"), "gzip"
        elif head.startswith(b"PK\x03\x04") and not packing:
            if advice := other_files.zip_advice(path):
                raise DatasetRejected(advice, errors=[])
            layer, name = _only_member(path)
            kind = "zip"
        else:
            break
        packing = (*packing, kind)
        if len(packing) > 2:
            raise DatasetRejected("The file is packed more than twice.", errors=[])
        stream = io.BufferedReader(cast(Any, _Bounded(layer, kind, packed_bytes, max_bytes)), _PEEK_BYTES)
    for magic, other in _OTHER_PACKERS.items():
        if head.startswith(magic):
            raise DatasetRejected(f"The file is packed with {other}; unpack it, or use gzip or zip.", errors=[])
    if head.startswith(b"PK\x03\x04") and PurePosixPath(name).suffix.lower() in (".xlsx", ".xlsm"):
        raise DatasetRejected(f"{name!r:.80} is packed; send the workbook as it is.", errors=[])
    if head.startswith(b"PK\x03\x04"):
        raise DatasetRejected("There is a zip file inside the packed file; unpack it first.", errors=[])
    return Unpacked(stream, name, packing)


def _only_member(path: Path) -> tuple[IO[bytes], str]:
    try:
        archive = zipfile.ZipFile(path)
        members = [
            member for member in archive.infolist() if not member.is_dir() and not _is_left_behind(member.filename)
        ]
        if len(members) != 1:
            names = [member.filename for member in members[:10]]
            raise DatasetRejected(
                f"The zip file holds {len(members)} files {names}; send each dataset on its own.", errors=[]
            )
        if members[0].flag_bits & 1:
            raise DatasetRejected("The zip file is encrypted.", errors=[])
        return archive.open(members[0]), PurePosixPath(members[0].filename).name
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        raise DatasetRejected(f"The zip file cannot be read: {error}", errors=[]) from error


def _is_left_behind(name: str) -> bool:
    """Tell whether a member is what a file manager adds: `__MACOSX/`, `.DS_Store`, `Thumbs.db`, `desktop.ini`."""
    path = PurePosixPath(name)
    return "__MACOSX" in path.parts or path.name.startswith(".") or path.name.lower() in ("thumbs.db", "desktop.ini")


class _Bounded(io.RawIOBase):
    """The content of a packed stream, up to a size. Errors of the stream become refusals."""

    def __init__(self, layer: IO[bytes], kind: str, packed_bytes: int, max_bytes: int) -> None:
        self._layer, self._kind = layer, kind
        self._packed_bytes, self._max_bytes = packed_bytes, max_bytes
        self._read_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._layer.read(len(buffer))
        except (EOFError, gzip.BadGzipFile, zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError) as error:
            raise DatasetRejected(f"The {self._kind} file is broken or cut off: {error}", errors=[]) from error
        self._read_bytes += len(data)
        grown = self._read_bytes > max(_RATIO_FROM_BYTES, _MAX_RATIO * self._packed_bytes)
        if grown or self._read_bytes > self._max_bytes:
            raise DatasetRejected(
                f"The {self._kind} file holds more than {self._read_bytes} bytes in {self._packed_bytes}: "
                f"{'no data shrinks that much' if grown else f'the limit is {self._max_bytes}'}.",
                errors=[],
            )
        buffer[: len(data)] = data
        return len(data)
