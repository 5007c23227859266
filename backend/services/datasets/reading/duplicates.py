"""Counts repeated rows in bounded memory: digests in buckets, which go to the disk when they grow."""

import hashlib
import shutil
import struct
import tempfile
from pathlib import Path

_BUCKETS = 64
_SPILL_BYTES = 512 * 2**10  # a bucket held in memory; all of them are 32 MiB
# Half of a 64-bit digest and the line: two different rows of ten million share a digest with a chance of 3e-6.
_ENTRY = struct.Struct("<8sQ")
_EXAMPLES = 5


class Duplicates:
    """Takes rows and tells how many repeat an earlier one.

    Args:
        folder: Where buckets are laid aside.
    """

    def __init__(self, folder: Path) -> None:
        self._parent = folder
        self._folder: Path | None = None
        self._buckets = [bytearray() for _ in range(_BUCKETS)]

    def add(self, row: bytes, line: int) -> None:
        """Take a row."""
        digest = hashlib.blake2b(row, digest_size=8).digest()
        bucket = self._buckets[digest[0] % _BUCKETS]
        bucket += _ENTRY.pack(digest, line)
        if len(bucket) >= _SPILL_BYTES:
            self._spill(digest[0] % _BUCKETS)

    def _spill(self, number: int) -> None:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(suffix=".tmp", dir=self._parent))
        with (self._folder / str(number)).open("ab") as file:
            file.write(self._buckets[number])
        self._buckets[number].clear()

    def count(self) -> tuple[int, list[tuple[int, int]]]:
        """Return how many rows repeat an earlier one, and some pairs of (first line, later line)."""
        repeated = 0
        examples: list[tuple[int, int]] = []
        for number, bucket in enumerate(self._buckets):
            spilled = self._folder / str(number) if self._folder is not None else None
            entries = (spilled.read_bytes() if spilled is not None and spilled.exists() else b"") + bytes(bucket)
            first: dict[bytes, int] = {}
            for digest, line in _ENTRY.iter_unpack(entries):
                earlier = first.setdefault(digest, line)
                if earlier != line:
                    repeated += 1
                    examples.append((earlier, line))
            examples = sorted(examples, key=lambda pair: pair[1])[:_EXAMPLES]
        return repeated, examples

    def close(self) -> None:
        """Delete what was laid aside."""
        if self._folder is not None:
            shutil.rmtree(self._folder)
