"""What an engine prints: a capped file, and its last lines."""

import os
import shutil
import threading
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

_CAP_BYTES = 4 * 2**20
_TAIL_LINES = 40


class EngineLog:
    """Keeps the output of one engine.

    Args:
        path: The file. At the cap a new one is begun, and one older part is kept beside it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()  # held while the file is written or moved
        self._file: BinaryIO | None = None
        self._size = 0
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)

    def tail(self) -> list[str]:
        """Return the last lines."""
        return list(self._tail)

    def copy(self, stream: BinaryIO) -> None:
        """Copy an engine's output to the file until the engine ends.

        Everything that the engine prints is read, whether or not it can be written: an engine whose output nobody reads
        would stop.
        """
        with suppress(OSError), self._lock:
            self._open()
        with stream:
            # Bounded reads: a line of a gigabyte must not be held in memory.
            for line in iter(lambda: stream.readline(65536), b""):
                self._tail.append(line.decode("utf-8", "replace").rstrip())
                with suppress(OSError, ValueError), self._lock:  # a full disk
                    self._write(line)
        with suppress(OSError), self._lock:
            self._close()

    def move(self, path: Path) -> None:
        """Go on in another file. What was written until now is moved to its end.

        Raises:
            OSError: It cannot be written. The file stays where it was.
        """
        with self._lock:
            written = self._file is not None
            self._close()
            try:
                if path.exists() and self._path.exists():
                    with self._path.open("rb") as before, path.open("ab") as behind:
                        shutil.copyfileobj(before, behind)
                    self._path.unlink()
                elif self._path.exists():
                    os.replace(self._path, path)
                self._path = path
            finally:
                if written:
                    with suppress(OSError):  # the next line tries again
                        self._open()

    def _open(self) -> None:
        self._file = self._path.open("ab")
        self._size = self._path.stat().st_size

    def _write(self, line: bytes) -> None:
        if self._file is None:
            self._open()
        if self._size + len(line) > _CAP_BYTES:
            self._close()
            os.replace(self._path, self._path.with_suffix(".log.1"))
            self._open()
        if self._file is not None:
            self._size += self._file.write(line)
            self._file.flush()

    def _close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()
