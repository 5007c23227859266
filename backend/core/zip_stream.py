"""A zip file that is made while it is sent. No copy is stored."""

import io
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

_CHUNK_BYTES = 2**20


class _Pipe(io.RawIOBase):
    """A write-only file whose content `drain` takes out."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._position = 0

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        part = bytes(data)  # type: ignore[call-overload]
        self._parts.append(part)
        self._position += len(part)
        return len(part)

    def tell(self) -> int:
        return self._position

    def drain(self) -> bytes:
        """Return what was written since the last call."""
        parts, self._parts = self._parts, []
        return b"".join(parts)


def zip_files(files: Sequence[tuple[str, Path]]) -> Iterator[bytes]:
    """Yield an uncompressed zip of (name in the zip, path). Weights do not shrink, and data is often packed already."""
    pipe = _Pipe()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_STORED) as archive:
        for name, path in files:
            with path.open("rb") as source, archive.open(zipfile.ZipInfo.from_file(path, name), "w") as target:
                while chunk := source.read(_CHUNK_BYTES):
                    target.write(chunk)
                    yield pipe.drain()
    yield pipe.drain()
