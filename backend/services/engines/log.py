"""What an engine prints: a capped file, and its last lines."""

import os
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
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)

    def tail(self) -> list[str]:
        """Return the last lines."""
        return list(self._tail)

    def copy(self, stream: BinaryIO) -> None:
        """Copy an engine's output to the file until the engine ends.

        Everything that the engine prints is read, whether or not it can be written: an engine whose output nobody reads
        would stop.
        """
        file, size = self._path.open("ab"), self._path.stat().st_size
        with stream:
            # Bounded reads: a line of a gigabyte must not be held in memory.
            for line in iter(lambda: stream.readline(65536), b""):
                self._tail.append(line.decode("utf-8", "replace").rstrip())
                try:
                    if size + len(line) > _CAP_BYTES:
                        file.close()
                        os.replace(self._path, self._path.with_suffix(".log.1"))
                        file, size = self._path.open("ab"), 0
                    size += file.write(line)
                    file.flush()
                except (OSError, ValueError):  # a full disk
                    continue
        with suppress(OSError):
            file.close()
