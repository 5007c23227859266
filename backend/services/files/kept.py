"""The content of files that are no datasets: while they arrive, until their rows are read, and where these are bad."""

import os
import shutil
from pathlib import Path

from core.errors import TooLarge
from core.files import fsync_folder, storage_errors


class IncomingFile:
    """A file while it arrives. Closing it flushes it; `KeptFiles.keep` gives it its place.

    Args:
        path: Where it is written.
        name: The client's name for it.
        max_bytes: A larger one is refused.
    """

    def __init__(self, path: Path, name: str, max_bytes: int) -> None:
        self.path, self.name, self._max_bytes = path, name, max_bytes
        self.size_bytes = 0
        self._file = path.open("xb")

    def write(self, data: bytes) -> int:
        """Append.

        Raises:
            TooLarge: The file is larger than allowed.
            StorageFull: There is no space for it.
        """
        self.size_bytes += len(data)
        if self.size_bytes > self._max_bytes:
            raise TooLarge(f"The file is larger than {self._max_bytes} bytes.")
        with storage_errors(self.path):
            return self._file.write(data)

    def close(self) -> None:
        """Flush it to the disk."""
        with storage_errors(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def abandon(self) -> None:
        """Delete it."""
        self._file.close()
        self.path.unlink(missing_ok=True)


class KeptFiles:
    """A folder with a plain file for each id.

    Args:
        folder: Made if it is not there.
        max_bytes: The largest file.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        folder.mkdir(parents=True, exist_ok=True)

    def incoming(self, file_id: str, name: str) -> IncomingFile:
        """Open a place for a file that arrives."""
        return IncomingFile(self._folder / f"{file_id}.tmp", name, self._max_bytes)

    def keep(self, file_id: str) -> Path:
        """Give a file that has arrived its place."""
        path = self.path(file_id)
        os.replace(path.with_name(f"{file_id}.tmp"), path)
        fsync_folder(self._folder)
        return path

    def path(self, file_id: str) -> Path:
        """Return where a file's content is, if it is here."""
        return self._folder / file_id

    def delete(self, file_id: str) -> None:
        """Delete a file's content, if it is here."""
        self.path(file_id).unlink(missing_ok=True)

    def remove_leftovers(self) -> None:
        """Delete what cut-off uploads left."""
        for path in self._folder.glob("*.tmp"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
